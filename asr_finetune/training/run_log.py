"""Logs for TensorBoard: what is public in one folder, what no ε covers in another, within `not_private`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asr_finetune.config.schema import LogConfig
from asr_finetune.training.run_folder import RunFolder
from dpkernels.files import writing

if TYPE_CHECKING:  # it needs the package tensorboard, which is optional
    from torch.utils.tensorboard import SummaryWriter

# Keys of a history entry that do not depend on the private data, or that ε covers; any other key is NOT PRIVATE.
PUBLIC = ("epsilon", "learning_rate", "clip_norm")
_CURVE = ("wer", "wer_lo", "wer_hi")  # measured on public validation data
_FOLDER = "tensorboard"
_FILES = "events.out.tfevents."  # the time and more follow


class RunLog:
    """The logs of a run.

    Args:
        config: the section `log`; unless it asks for logs, nothing is written.
        folder: the run's.
        step: steps taken so far; later entries of earlier parts of the run are dropped.

    Raises:
        WriteError: the logs cannot be written, here or in a method.
    """

    def __init__(self, config: LogConfig, folder: RunFolder, step: int) -> None:
        self._public: SummaryWriter | None = None
        self._secret: list[SummaryWriter] = []
        self._place = folder.path / _FOLDER
        if not (config.tensorboard and folder.ranks.is_first):
            return
        from torch.utils.tensorboard import SummaryWriter

        places = (self._place, folder.not_private / _FOLDER)
        with writing(self._place):
            for place in places:
                _put_first(place)
            self._public, secret = (SummaryWriter(str(place), purge_step=step + 1) for place in places)
        self._secret = [secret, self._public] if config.not_private else [secret]

    def step(self, entry: Mapping[str, Any]) -> None:
        """Log an entry of the history."""
        step = int(entry["step"])
        for key, value in entry.items():
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or key in ("step", "epsilon_step")
            ):
                continue
            if key not in PUBLIC:
                self._add(self._secret, f"NOT PRIVATE/{key}", value, step)
            else:
                # ε is not computed at every step: it is logged at the step that it is for
                at = entry.get("epsilon_step", step) if key == "epsilon" else step
                self._add([self._public], key, value, at)

    def validation(self, point: Mapping[str, Any]) -> None:
        """Log a point of the curve on public data."""
        for key in _CURVE:
            if point[key] is not None:
                self._add([self._public], f"validation/{key}", point[key], point["step"])

    def _add(self, writers: Sequence[SummaryWriter | None], tag: str, value: float, step: int) -> None:
        with writing(self._place):
            for writer in writers:
                if writer is not None:
                    writer.add_scalar(tag, value, step)

    def close(self) -> None:
        """Write what is left, and close the files."""
        with writing(self._place):
            for writer in [self._public, *self._secret]:
                if writer is not None:
                    writer.close()


def _put_first(folder: Path) -> None:
    """Number the logs of a run's earlier parts, so that their names come before those of later parts.

    TensorBoard reads a folder's files in the order of their names, which have the time: a clock that was set back would
    put a run's later part before its earlier one, and the entries that the later part replaces would stay.
    """
    for number, file in enumerate(sorted(folder.glob(f"{_FILES}*"))):
        rest = file.name.removeprefix(_FILES).partition(".")[2]
        file.rename(folder / f"{_FILES}{number:010d}.{rest}")
