"""The output folder of a run: its files, and whether a run in it may be resumed.

config.yaml                 the configuration the run was started with, without the names of speakers
ledger.jsonl                the privacy ledger; each step is written before it is taken
checkpoint/state.pt         the last checkpoint; previous.pt is the one before
adapter/ or model/          the trained parameters
tensorboard/                what is public, for TensorBoard (`log.tensorboard`)
metrics.json                error rates before and after
run.json                    the record of the finished run, from which the report is made
stopped.json                the same of a run that was stopped and exported (`asr-finetune export`)
audit.json                  what an attack on the run showed (`asr-finetune audit`), computed without noise
not_private/                losses, clip rates, transcripts, names and figures of recordings: must not be passed on
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from asr_finetune.config.schema import ADAPTER_METHODS, Config, ConfigError, MethodConfig
from asr_finetune.config.yaml_io import changed_keys
from asr_finetune.data.corpus import Corpus
from asr_finetune.data.provenance import figures, fingerprint
from asr_finetune.data.utterance import Problem
from asr_finetune.files import MissingFile, write_json, write_text
from dpkernels.errors import UserError
from dpkernels.files import writing
from dpkernels.privacy import Ranks, read_ledger

# Keys that may change on resume: they affect the place and speed of a run, but neither its expected result nor ε.
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
        "log.tensorboard",
        "log.not_private",
    }
)
# Keys of `data` whose values name speakers: they are kept in the folder `not_private`.
_NAMING_KEYS = ("speakers", "exclude_speakers")
_WITHHELD = (
    "# data.speakers and data.exclude_speakers name people in the data: see not_private/speakers.yaml\n"
)
_NOTICE = (
    "The files in this folder were computed from the private data without noise: losses, clip rates, "
    "transcripts, names and\nfigures of recordings, and the key to the data's fingerprint. No epsilon covers them. "
    "Do not pass them on.\n"
)


class RunFolderError(UserError, ValueError):
    """The run cannot use this output folder: the message has the reason and the fix."""


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Within it text that is not what was written to a file is a RunFolderError, which names the file."""
    try:
        yield
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        if isinstance(error, UserError):
            raise
        raise RunFolderError(
            f"{path} is damaged ({str(error).splitlines()[0]}): restore it from a backup. (The ledger beside it, which "
            "counts what was spent, is a file of its own.)"
        ) from error


def read_json(path: Path) -> Any:
    """The content of a JSON file of a run.

    Raises:
        RunFolderError: the file is damaged.
    """
    with _readable(path):
        return json.loads(path.read_text(encoding="utf-8"))


def _check_of(key: bytes, fingerprint: str) -> str:
    """Binds a fingerprint to its key, so that a change of either is noticed."""
    return hmac.new(key, fingerprint.encode(), hashlib.sha256).hexdigest()


def _within(name: str, doc: str) -> Any:
    """A property of RunFolder: the path of a file or folder in it."""
    return property(lambda folder: folder.path / name, doc=doc)


@dataclass(frozen=True)
class RunFolder:
    """A run's output: its paths, and what is written there. Of several processes rank 0 alone reads and writes."""

    path: Path
    ranks: Ranks = field(default_factory=Ranks)

    config = _within("config.yaml", "The configuration.")
    ledger = _within("ledger.jsonl", "The privacy ledger.")
    checkpoint = _within("checkpoint", "Folder of the checkpoint.")
    metrics = _within("metrics.json", "Error rates before and after.")
    run = _within("run.json", "The record of the finished run.")
    stopped = _within("stopped.json", "The record of a run that was stopped and exported.")
    audit = _within("audit.json", "What an attack on the run showed.")
    not_private = _within("not_private", "Folder of files that must not be passed on.")
    speakers = _within("not_private/speakers.yaml", "data.speakers and data.exclude_speakers, if given.")
    data = _within("not_private/data.json", "Figures and fingerprint of the training data.")
    coins = _within("not_private/coins.json", "The secret coins of an audit; its mode is 0600.")
    canaries = _within(
        "not_private/canaries.json", "Canaries of an audit and their losses; its mode is 0600."
    )

    @property
    def finished(self) -> bool:
        """Whether the folder holds a finished run."""
        return self.ranks.first(self.run.is_file)

    @property
    def begun(self) -> bool:
        """Whether a step was taken here. A start that failed before the first step does not count."""
        return self.checkpoint.exists() or (self.ledger.exists() and read_ledger(self.ledger).steps > 0)

    def check(self, config: Config, *, resume: bool) -> bool:
        """Check that `config` may use the folder; nothing is written.

        Returns:
            True if a run took steps here before; this run continues it.

        Raises:
            RunFolderError: the folder holds a run and `resume` is False, or a run's files without its configuration.
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
                f"output={str(self.path)!r} holds a ledger or a checkpoint, but no config.yaml, so their "
                "configuration is unknown. Put config.yaml back. (Another --output starts a ledger that does not count "
                "the steps of this one.)"
            )
        return False

    def prepare(self, config: Config, *, resume: bool) -> bool:
        """Make the folder for `config`, unless a run in it is continued.

        Returns, raises: as `check`.
        """
        return self.ranks.first(lambda: self._prepare(config, resume=resume))

    def _prepare(self, config: Config, *, resume: bool) -> bool:
        if self.check(config, resume=resume):
            self.stopped.unlink(missing_ok=True)  # it says what was spent before
            return True
        with writing(f"output={str(self.path)!r}"):
            self.not_private.mkdir(parents=True, exist_ok=True)
        write_text(self.not_private / "README.txt", _NOTICE)
        self._trim_history(0)
        if not self.config.is_file() or self._changes(config):
            self.metrics.unlink(missing_ok=True)  # they belong to another configuration
        self._write_config(config)
        return False

    def _write_config(self, config: Config) -> None:
        named = {key: getattr(config.data, key) for key in _NAMING_KEYS}
        if not any(names is not None for names in named.values()):
            self.speakers.unlink(missing_ok=True)
            write_text(self.config, config.to_yaml())
            return
        write_text(self.speakers, yaml.safe_dump(named, allow_unicode=True))
        nameless = config.with_values("data", **dict.fromkeys(_NAMING_KEYS))
        write_text(self.config, _WITHHELD + nameless.to_yaml())

    def written_config(self) -> Config:
        """The configuration that the folder's run was started with, the names of speakers included.

        Raises:
            RunFolderError: the folder holds no run, or a file is damaged.
            ConfigError: it has values that no configuration has.
        """
        if not self.config.is_file():
            raise RunFolderError(
                f"run={str(self.path)!r} has no config.yaml, so no run is there: give its --output folder"
            )
        with _readable(self.config):
            values = dict(yaml.safe_load(self.config.read_text(encoding="utf-8")))
        written = Config.from_dict(values)
        if self.speakers.is_file():
            with _readable(self.speakers):
                named = dict(yaml.safe_load(self.speakers.read_text(encoding="utf-8")))
            written = written.with_values("data", **named)
        return written

    def _changes(self, config: Config) -> dict[str, tuple[Any, Any]]:
        """The changed keys that a run may not change; a key that config.yaml lacks has its default."""
        changes = changed_keys(self.written_config().to_dict(), config.to_dict())
        return {key: values for key, values in changes.items() if key not in MAY_CHANGE}

    def _check_unchanged(self, config: Config) -> None:
        refused = self._changes(config)
        if refused:
            listed = "".join(f"\n  {key}: was {old!r}, is {new!r}" for key, (old, new) in refused.items())
            raise ConfigError(
                f"output={str(self.path)!r} holds a run with another configuration:{listed}\n"
                "Resume it with the values it had, or give another --output."
            )

    def check_audited(self, audited: bool, *, resuming: bool) -> None:
        """Check that a run with canaries is continued as one, and no other run.

        Raises:
            RunFolderError: it is not so.
        """
        coins = self.ranks.first(self.coins.is_file)
        if coins and not audited:
            raise RunFolderError(
                f"output={str(self.path)!r} holds an audit, whose training data has canaries: continue it with "
                "asr-finetune audit, or give another --output"
            )
        if audited and resuming and not coins:
            raise RunFolderError(
                f"output={str(self.path)!r} holds a run without canaries: an audit trains a model of its own. Give "
                "another --output"
            )

    def note_test_data(self, shares_training: bool | None) -> None:
        """Write to not_private/test_data.json whether test data holds training recordings (None: no test data)."""
        if self.ranks.is_first:
            write_json(self.not_private / "test_data.json", {"shares_training": shares_training})

    def note_data(self, corpus: Corpus, *, resuming: bool) -> str:
        """Write the figures of the training data, and its fingerprint under this run's own key.

        Returns:
            The fingerprint.

        Raises:
            RunFolderError: the resumed run began with other data.
            RanksError: another process has other data.
        """
        current = fingerprint(corpus, self.ranks.first(self._fingerprint_key))
        self.ranks.check_same("make_private", {"fingerprint of data.train": current})
        self.ranks.first(lambda: self._note_data(corpus, current, resuming=resuming))
        return current

    def _note_data(self, corpus: Corpus, current: str, *, resuming: bool) -> None:
        original = (self._read_json(self.data) or {}).get("fingerprint", current)
        if resuming and original != current:
            raise RunFolderError(
                f"output={str(self.path)!r} holds a run that began with other training data: recordings, "
                "transcripts or speakers were added, removed or changed, and its epsilon is for the data as it "
                "was. Put the data back as it was, or give another --output."
            )
        check = _check_of(self._fingerprint_key(), current)
        write_json(self.data, {"fingerprint": current, "check": check, **figures(corpus)})

    def began_with(self, corpus: Corpus) -> bool | None:
        """Whether the run began with these recordings; None where they cannot be compared.

        That is so without its key or its fingerprint, and where one of them is not what was written: recordings that
        seem to be others would have an ε of their own.

        Raises:
            RunFolderError: a file is damaged so that it cannot be read.
        """
        noted, path = self.read_json(self.data), self.not_private / "fingerprint.key"
        if not noted or not path.is_file():
            return None
        key = self._fingerprint_key()
        written, check = str(noted.get("fingerprint")), noted.get("check")  # folders of before have no check
        if check is not None and check != _check_of(key, written):
            return None
        return fingerprint(corpus, key) == written

    def _fingerprint_key(self) -> bytes:
        path = self.not_private / "fingerprint.key"
        if not path.is_file():
            write_text(path, secrets.token_hex(32) + "\n")
        with _readable(path):
            return bytes.fromhex(path.read_text(encoding="utf-8"))

    def note_problems(self, name: str, problems: list[Problem], doubts: Sequence[Problem] = ()) -> None:
        """Write names of unusable recordings to `not_private/problems_<name>.tsv`, of doubtful ones to `doubts_…`"""
        for kind, listed in (("problems", problems), ("doubts", doubts)):
            lines = "".join(f"{problem.name}\t{problem.reason}\n" for problem in listed)
            self.write(self.not_private / f"{kind}_{name}.tsv", lines)

    def read_json(self, path: Path) -> Any:
        """The content of a JSON file, or None if the file does not exist. Every process gets what rank 0 reads."""
        return self.ranks.first(lambda: self._read_json(path))

    def _read_json(self, path: Path) -> Any:
        return read_json(path) if path.is_file() else None

    def record(self) -> Any:
        """The record of the finished run, else of the exported one, else None."""
        return self.read_json(self.run) or self.read_json(self.stopped)

    def note_metrics(self, **values: Any) -> None:
        """Add entries to metrics.json."""
        if self.ranks.is_first:
            write_json(self.metrics, {**(self._read_json(self.metrics) or {}), **values})

    def write(self, path: Path, text: str) -> None:
        """Write a file of the folder."""
        if self.ranks.is_first:
            write_text(path, text)

    def note_history(self, entry: dict[str, Any]) -> None:
        """Append a line to not_private/history.jsonl."""
        if not self.ranks.is_first:
            return
        path = self.not_private / "history.jsonl"
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def history(self) -> list[dict[str, Any]]:
        """The lines of not_private/history.jsonl, without one that a crash cut short."""
        return self.ranks.first(self._history)

    def _history(self) -> list[dict[str, Any]]:
        path = self.not_private / "history.jsonl"
        if not path.is_file():
            return []
        with _readable(path):
            return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]

    def trim_history(self, step: int) -> None:
        """Drop the lines after `step`, since those steps are taken again."""
        self.ranks.first(lambda: self._trim_history(step))

    def _trim_history(self, step: int) -> None:
        lines = "".join(json.dumps(entry) + "\n" for entry in self._history() if entry["step"] <= step)
        write_text(self.not_private / "history.jsonl", lines)


def weights_folder(run: Path, method: MethodConfig) -> Path:
    """The folder of a run's trained parameters."""
    return run / ("adapter" if method.kind in ADAPTER_METHODS else "model")


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A new folder; on leaving without an error its files take their places in `target`, so that none there is cut.

    Raises:
        WriteError: a file cannot be written; `target` is as it was.
    """
    made = target.with_name(f".{target.name}.incomplete")
    with writing(target):
        shutil.rmtree(made, ignore_errors=True)  # a killed process left it
        made.mkdir(parents=True)
        try:
            yield made
            if not target.exists():
                os.rename(made, target)
            for file in [path for path in made.rglob("*") if path.is_file()]:
                place = target / file.relative_to(made)
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, place)
        except SafetensorError as error:  # its message has the system's number of the error
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
        finally:
            shutil.rmtree(made, ignore_errors=True)


def saved_model(folder: Path) -> Path:
    """The adapter or model in a run's folder; any other folder is returned as it is.

    Raises:
        RunFolderError: the run was stopped before it wrote one.
    """
    for name in ("adapter", "model"):
        if (folder / name).is_dir():
            return folder / name
    if RunFolder(folder).checkpoint.is_dir():
        raise RunFolderError(
            f"{str(folder)!r} is a run that was stopped: `asr-finetune export {folder}` writes the adapter or model of "
            "its last checkpoint"
        )
    return folder


def by_test_set(evaluation: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """The results of an entry of "evaluation" in run.json by test set; a single test set is called "test"."""
    if evaluation is None:
        return {}
    return {"test": dict(evaluation)} if isinstance(evaluation.get("words"), int) else dict(evaluation)


def as_recorded(results: Mapping[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The entry of run.json for results by test set, which `by_test_set` reads; None without test sets."""
    if not results:
        return None
    return dict(results["test"]) if list(results) == ["test"] else dict(results)


def read_comparison(folder: str | Path | None, test_sets: Sequence[str]) -> dict[str, Any] | None:
    """The error rates after training of a finished run without privacy; None if no folder is given.

    Args:
        folder: the run's.
        test_sets: the names of the test sets to compare; none: any.

    Raises:
        FileNotFoundError: the folder holds no finished run.
        ConfigError: the run is private, has no evaluation, or has other test sets.
    """
    if folder is None:
        return None
    path = Path(folder) / "run.json"
    if not path.is_file():
        raise MissingFile(f"--compare {folder}: no run.json, so no finished run there")
    values = read_json(path)
    if values["privacy"]["enabled"]:
        raise ConfigError(f"--compare {folder}: that run is private; give one trained with --not-private")
    if values["evaluation"]["after"] is None:
        raise ConfigError(f"--compare {folder}: that run was not evaluated (data.test was not set)")
    results = by_test_set(values["evaluation"]["after"])
    if test_sets and set(test_sets) != set(results):
        raise ConfigError(
            f"--compare {folder}: that run has the test sets {', '.join(results)}, this one {', '.join(test_sets)}: "
            "give both the same data.test"
        )
    return as_recorded(results)
