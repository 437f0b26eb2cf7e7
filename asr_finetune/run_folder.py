"""The output folder of a run: what is written where, and whether a run in it may be resumed.

config.yaml                 the configuration the run was started with
ledger.jsonl                what was spent, written before it is spent
checkpoint/state.pt         the last checkpoint
adapter/ or model/          what was trained
metrics.json                error rates before and after
run.json                    the finished run, as the report reads it
not_private/                losses, clip rates, transcripts, names of recordings: not for others
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from asr_finetune.checkpoint import write_json, write_text
from asr_finetune.config import Config, ConfigError, changed_keys

# They change where and how fast a run goes, and neither what is learnt in expectation nor what is spent.
MAY_CHANGE = frozenset(
    {
        "output",
        "model.device",
        "train.physical_batch_size",
        "train.num_workers",
        "train.cache_features",
        "train.checkpoint_every",
        "evaluate.batch_size",
    }
)
_NOTICE = (
    "What is in this folder was computed from the private data without noise: losses, clip rates, "
    "transcripts and names\nof recordings. No epsilon covers it. Do not pass it on.\n"
)


class RunFolderError(ValueError):
    """An output folder that this run cannot use: the message says why and what to do."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run's output."""

    path: Path

    @property
    def config(self) -> Path:
        """The configuration."""
        return self.path / "config.yaml"

    @property
    def ledger(self) -> Path:
        """The privacy ledger."""
        return self.path / "ledger.jsonl"

    @property
    def checkpoint(self) -> Path:
        """Folder of the checkpoint."""
        return self.path / "checkpoint"

    @property
    def metrics(self) -> Path:
        """Error rates before and after."""
        return self.path / "metrics.json"

    @property
    def run(self) -> Path:
        """The record of the finished run."""
        return self.path / "run.json"

    @property
    def not_private(self) -> Path:
        """Folder of what must not be passed on."""
        return self.path / "not_private"

    def prepare(self, config: Config, *, resume: bool) -> bool:
        """Make the folder for `config`, or find that a run in it may be continued.

        Returns:
            Whether a run was started here before.

        Raises:
            RunFolderError: a run is here and `resume` is False; or files of a run without its configuration.
            ConfigError: the configuration changed; the message names the keys.
        """
        if self.config.is_file():
            if not resume:
                raise RunFolderError(
                    f"output={str(self.path)!r} holds a run, and resume is off: give another --output. "
                    "(Starting over in the same folder would forget the budget that its ledger counts.)"
                )
            self._check_unchanged(config)
            return True
        if self.ledger.exists() or self.checkpoint.exists():
            raise RunFolderError(
                f"output={str(self.path)!r} holds a ledger or a checkpoint, but no config.yaml: what they "
                "belong to is unknown. Put config.yaml back, or give another --output."
            )
        self.not_private.mkdir(parents=True, exist_ok=True)
        write_text(self.not_private / "README.txt", _NOTICE)
        write_text(self.config, config.to_yaml())
        return False

    def _check_unchanged(self, config: Config) -> None:
        old = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        changes = changed_keys(old, config.to_dict())
        refused = {key: values for key, values in changes.items() if key not in MAY_CHANGE}
        if refused:
            listed = "".join(f"\n  {key}: was {old!r}, is {new!r}" for key, (old, new) in refused.items())
            raise ConfigError(
                f"output={str(self.path)!r} holds a run with another configuration:{listed}\n"
                "Resume it with the values it had, or give another --output."
            )

    def read_json(self, path: Path) -> Any:
        """The content of a JSON file, or None where there is none."""
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def note_metrics(self, **values: Any) -> None:
        """Add entries to metrics.json."""
        write_json(self.metrics, {**(self.read_json(self.metrics) or {}), **values})

    def note_history(self, entry: dict[str, Any]) -> None:
        """Append a line to not_private/history.jsonl."""
        with open(self.not_private / "history.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def history(self) -> list[dict[str, Any]]:
        """The lines of not_private/history.jsonl; one that a crash cut short is left out."""
        path = self.not_private / "history.jsonl"
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
        return [json.loads(line) for line in lines]

    def trim_history(self, step: int) -> None:
        """Drop the lines after `step`: those steps are taken again."""
        lines = "".join(json.dumps(entry) + "\n" for entry in self.history() if entry["step"] <= step)
        write_text(self.not_private / "history.jsonl", lines)
