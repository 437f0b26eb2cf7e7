"""Logs for TensorBoard: what is public in one folder, what no ε covers in another, within `not_private`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from asr_finetune.config.schema import LogConfig
from asr_finetune.training.run_folder import RunFolder

if TYPE_CHECKING:  # it needs the package tensorboard, which is optional
    from torch.utils.tensorboard import SummaryWriter

# Keys of a history entry that do not depend on the private data; any other key is NOT PRIVATE.
PUBLIC = ("epsilon", "learning_rate")
_CURVE = ("wer", "wer_lo", "wer_hi")  # measured on public validation data
_FOLDER = "tensorboard"


class RunLog:
    """The logs of a run.

    Args:
        config: the section `log`; unless it asks for logs, nothing is written.
        folder: the run's.
        step: steps taken so far; later entries of earlier parts of the run are dropped.
    """

    def __init__(self, config: LogConfig, folder: RunFolder, step: int) -> None:
        self._public: SummaryWriter | None = None
        self._secret: list[SummaryWriter] = []
        if not (config.tensorboard and folder.ranks.is_first):
            return
        from torch.utils.tensorboard import SummaryWriter

        self._public, secret = (
            SummaryWriter(str(place / _FOLDER), purge_step=step + 1)
            for place in (folder.path, folder.not_private)
        )
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
                for writer in self._secret:
                    writer.add_scalar(f"NOT PRIVATE/{key}", value, step)
            elif self._public is not None:
                # ε is not computed at every step: it is logged at the step that it is for
                self._public.add_scalar(
                    key, value, entry.get("epsilon_step", step) if key == "epsilon" else step
                )

    def validation(self, point: Mapping[str, Any]) -> None:
        """Log a point of the curve on public data."""
        for key in _CURVE:
            if self._public is not None and point[key] is not None:
                self._public.add_scalar(f"validation/{key}", point[key], point["step"])

    def close(self) -> None:
        """Write what is left, and close the files."""
        for writer in {self._public, *self._secret} - {None}:
            writer.close()  # type: ignore[union-attr]
