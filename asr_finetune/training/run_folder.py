"""The output folder of a run: what is written where, and whether a run in it may be resumed.

config.yaml                 the configuration the run was started with, without the names of speakers
ledger.jsonl                what was spent, written before it is spent
checkpoint/state.pt         the last checkpoint
adapter/ or model/          what was trained
metrics.json                error rates before and after
run.json                    the finished run, as the report reads it
not_private/                losses, clip rates, transcripts, names and figures of recordings: not for others
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from asr_finetune.config.schema import Config, ConfigError
from asr_finetune.config.yaml_io import changed_keys
from asr_finetune.data.corpus import Corpus, Problem
from asr_finetune.data.provenance import figures, fingerprint
from asr_finetune.training.checkpoint import write_json, write_text
from dpkernels.privacy import read_ledger

# They change where and how fast a run goes, and neither what is learnt in expectation nor what is spent.
MAY_CHANGE = frozenset(
    {
        "output",
        "model.device",
        "train.physical_batch_size",
        "train.fill_micro_batches",
        "train.checkpointing",
        "train.compile_frozen",
        "train.num_workers",
        "train.cache_features",
        "train.checkpoint_every",
        "evaluate.batch_size",
    }
)
# Keys of `data` whose values say who is in it: kept among what is not for others.
_NAMES_WHO = ("speakers", "exclude_speakers")
_WITHHELD = (
    "# data.speakers and data.exclude_speakers name who is in the data: see not_private/speakers.yaml\n"
)
_NOTICE = (
    "What is in this folder was computed from the private data without noise: losses, clip rates, "
    "transcripts, names and\nfigures of recordings, and the key to the data's fingerprint. No epsilon covers it. "
    "Do not pass it on.\n"
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

    @property
    def speakers(self) -> Path:
        """The values of data.speakers and data.exclude_speakers, where they were given: not for others."""
        return self.not_private / "speakers.yaml"

    @property
    def data(self) -> Path:
        """Figures and fingerprint of the training data: not for others."""
        return self.not_private / "data.json"

    @property
    def begun(self) -> bool:
        """Whether a step was taken here. A start that failed before the first leaves nothing that counts."""
        return self.checkpoint.exists() or (self.ledger.exists() and read_ledger(self.ledger).steps > 0)

    def check(self, config: Config, *, resume: bool) -> bool:
        """Whether `config` may use the folder; nothing is written.

        Returns:
            Whether a run took steps here before, which is then to be continued.

        Raises:
            RunFolderError: a run is here and `resume` is False; or files of a run without its configuration.
            ConfigError: the configuration changed; the message names the keys.
        """
        begun = self.begun
        if begun and self.config.is_file():
            if not resume:
                raise RunFolderError(
                    f"output={str(self.path)!r} holds a run, and resume is off: give another --output. "
                    "(Starting over in the same folder would forget the budget that its ledger counts.)"
                )
            self._check_unchanged(config)
            return True
        if begun:
            raise RunFolderError(
                f"output={str(self.path)!r} holds a ledger or a checkpoint, but no config.yaml: what they "
                "belong to is unknown. Put config.yaml back, or give another --output."
            )
        return False

    def prepare(self, config: Config, *, resume: bool) -> bool:
        """Make the folder for `config`, or find that a run in it may be continued.

        Returns, raises: as `check`.
        """
        if self.check(config, resume=resume):
            return True
        self.not_private.mkdir(parents=True, exist_ok=True)
        write_text(self.not_private / "README.txt", _NOTICE)
        self.trim_history(0)
        if not self.config.is_file() or self._changes(config):
            self.metrics.unlink(missing_ok=True)  # of a start with another configuration
        self._write_config(config)
        return False

    def _write_config(self, config: Config) -> None:
        named = {key: getattr(config.data, key) for key in _NAMES_WHO}
        if not any(names is not None for names in named.values()):
            self.speakers.unlink(missing_ok=True)
            write_text(self.config, config.to_yaml())
            return
        write_text(self.speakers, yaml.safe_dump(named, allow_unicode=True))
        nameless = config.with_values("data", **dict.fromkeys(_NAMES_WHO))
        write_text(self.config, _WITHHELD + nameless.to_yaml())

    def _changes(self, config: Config) -> dict[str, tuple[Any, Any]]:
        """The keys that a run may not change, and have changed; one that is not written has its default."""
        written = Config.from_dict(yaml.safe_load(self.config.read_text(encoding="utf-8")))
        if self.speakers.is_file():
            written = written.with_values("data", **yaml.safe_load(self.speakers.read_text(encoding="utf-8")))
        old = written.to_dict()
        changes = changed_keys(old, config.to_dict())
        return {key: values for key, values in changes.items() if key not in MAY_CHANGE}

    def _check_unchanged(self, config: Config) -> None:
        refused = self._changes(config)
        if refused:
            listed = "".join(f"\n  {key}: was {old!r}, is {new!r}" for key, (old, new) in refused.items())
            raise ConfigError(
                f"output={str(self.path)!r} holds a run with another configuration:{listed}\n"
                "Resume it with the values it had, or give another --output."
            )

    def note_test_data(self, shares_training: bool | None) -> None:
        """Keep whether test recordings are training ones (None: there are none) in not_private/test_data.json."""
        write_json(self.not_private / "test_data.json", {"shares_training": shares_training})

    def note_data(self, corpus: Corpus, *, resuming: bool) -> str:
        """Keep the figures of the training data, and their fingerprint under this run's own key.

        Returns:
            The fingerprint.

        Raises:
            RunFolderError: the run that is resumed began with other data.
        """
        found = fingerprint(corpus, self._fingerprint_key())
        began = (self.read_json(self.data) or {}).get("fingerprint", found)
        if resuming and began != found:
            raise RunFolderError(
                f"output={str(self.path)!r} holds a run that began with other training data: recordings, "
                "transcripts or speakers were added, removed or changed, and its epsilon is for the data as it "
                "was. Put the data back as it was, or give another --output."
            )
        write_json(self.data, {"fingerprint": found, **figures(corpus)})
        return found

    def _fingerprint_key(self) -> bytes:
        path = self.not_private / "fingerprint.key"
        if not path.is_file():
            write_text(path, secrets.token_hex(32) + "\n")
        return bytes.fromhex(path.read_text(encoding="utf-8"))

    def note_problems(self, name: str, problems: list[Problem]) -> None:
        """Write the names of recordings that were of no use to not_private/problems_<name>.tsv."""
        lines = "".join(f"{problem.name}\t{problem.reason}\n" for problem in problems)
        write_text(self.not_private / f"problems_{name}.tsv", lines)

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
