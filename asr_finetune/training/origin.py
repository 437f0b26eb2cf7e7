"""Training on from the adapter or model of an earlier run: whose privacy budget is spent once more.

A second run on the same recordings adds to what the first one spent on them. Its ledger therefore begins as a copy of
the first run's, and every step of both is in ε. On other recordings each run has its own ε.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from asr_finetune.config.schema import Config, ConfigError
from asr_finetune.data.corpus import Corpus
from asr_finetune.training.run_folder import RunFolder
from asr_finetune.training.sampling import units
from dpkernels.files import write_atomically
from dpkernels.privacy import read_ledger


@dataclass(frozen=True)
class Origin:
    """The run that a run's starting model comes from.

    Attributes:
        folder: its folder.
        steps: the steps that its ledger counts; 0 without privacy.
        same_data: whether the run to start trains on its recordings, so that its budget is continued.
        compared: whether the recordings were compared; without the earlier run's key they cannot be.
    """

    folder: RunFolder
    steps: int
    same_data: bool
    compared: bool

    def __str__(self) -> str:
        name = self.folder.path.resolve().name
        if self.same_data:
            return f"run {name}, on the same recordings: its {self.steps} steps are part of this run's ε"
        if self.steps:
            return (
                f"run {name}, private, on other recordings: its own ε, not this run's, protects those; a recording "
                "that is in both is protected by the sum of the two only"
            )
        unknown = (
            "" if self.compared else "; whether they are also this run's is not known, as its key is missing"
        )
        return f"run {name}, without privacy: no ε protects the recordings that it was trained on{unknown}"

    def begins(self, ledger: Path) -> bool:
        """Whether a run's ledger is to begin with the earlier run's steps; one that counts steps has begun."""
        return self.same_data and not (ledger.exists() and read_ledger(ledger).steps)

    def continue_ledger(self, ledger: Path) -> None:
        """Begin a ledger as a copy of the earlier run's, as a whole or not at all, unless it has begun."""
        if self.begins(ledger):
            content = self.folder.ledger.read_bytes()
            write_atomically(ledger, lambda file: file.write(content))


def run_of(model: str) -> RunFolder | None:
    """The run whose adapter or model `model.name` is; None for any other folder or hub id."""
    path = Path(model)
    folder = RunFolder(path.parent if path.name in ("adapter", "model") else path)
    return folder if path.is_dir() and folder.config.is_file() else None


def origin_by_ledger(config: Config, ledger: Path) -> Origin | None:
    """The run that the starting model comes from, without the recordings: a continued ledger begins with that run's."""
    folder = run_of(config.model.name)
    if folder is None or not config.privacy.enabled:
        return None
    earlier = folder.ledger.read_bytes() if folder.ledger.is_file() else b""
    steps = read_ledger(folder.ledger).steps if earlier else 0
    return Origin(folder, steps, bool(steps) and ledger.read_bytes().startswith(earlier), compared=True)


def origin_of(config: Config, corpus: Corpus) -> Origin | None:
    """The run that the starting model comes from, and whether it had the same recordings.

    Without the earlier run's key to compare them, or with a damaged one, recordings of the same number and unit are
    taken for the same: that can only count too much.

    Raises:
        ConfigError: the earlier run had the same recordings and no privacy, or some of its steps cannot be counted
            together with this run's.
    """
    folder = run_of(config.model.name)
    if folder is None or not config.privacy.enabled:
        return None
    began, count = units(config, corpus), None
    steps = read_ledger(folder.ledger).steps if folder.ledger.is_file() else 0
    if steps:
        settings = read_ledger(folder.ledger).runs[0].settings
        count = settings["dataset_size"] if settings["unit"] == config.privacy.unit else None
    found = folder.began_with(corpus)
    same = count == began if found is None else found
    if same and not steps:
        raise ConfigError(
            f"model.name={config.model.name!r}: this run was trained on the same recordings without privacy, so "
            "nothing that starts from it can be private: start from its base model"
        )
    if same and count != began:
        raise ConfigError(
            f"model.name={config.model.name!r}: its run protected another unit than privacy.unit="
            f"{config.privacy.unit}, so their steps do not add up to one ε: use the same unit"
        )
    return Origin(folder, steps, same, found is not None)
