from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from asr_finetune import cli
from asr_finetune.config.schema import Config
from asr_finetune.planning import dry_run as module
from asr_finetune.planning.dry_run import Check, check_run
from asr_finetune.training import sampling, start
from asr_finetune.training.run import train
from dpkernels.privacy import SelfCheckError, SelfCheckReport, read_ledger
from dpkernels.privacy.rng.streams import SecretStream
from tests.asr_finetune import tones
from tests.asr_finetune.recordings import write
from tests.asr_finetune.training.test_train import crash_at
from tests.slow import slow_cases

UTTERANCES = 24


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with tones.one_thread():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dry")
    tones.write_manifest(folder, UTTERANCES)
    tones.write_manifest(folder, 6, seed=1, name="test")
    tones.write_model(folder / "model")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    for name in ("tones", "test", "model", "tones.jsonl", "test.jsonl"):
        (tmp_path / name).symlink_to(made / name)
    return tmp_path


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Noise by hand: calibration takes seconds. The output layer alone: it takes the least memory to estimate."""
    values = {
        "method__kind": "head",
        "data__test": str(folder / "test.jsonl"),
        "privacy__noise_multiplier": 4.0,
    }
    return tones.settings(folder, **{**values, **changes})


def checks(folder: Path, **changes: Any) -> dict[str, Check]:
    config = Config.from_dict(settings(folder, **changes))
    config.check_trainable()
    return {check.what: check for check in check_run(config, progress=False)}


def run_cli(*arguments: object) -> Any:
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(cli.app, list(map(str, arguments)))


def failed(found: dict[str, Check]) -> set[str]:
    return {what for what, check in found.items() if not check.passed}


@pytest.mark.parametrize("kind", ["lora", "head", *slow_cases("full", "bitfit", "dp_rp")])
def test_a_run_that_would_start(folder: Path, kind: str) -> None:
    found = checks(folder, method__kind=kind)
    assert failed(found) == set()
    assert "27,716 parameters" in found["model"].found
    assert "24 utterances" in found["training data"].found
    assert "6 utterances" in found["test data"].found
    assert "σ = 4.000:" in found["privacy"].found
    assert "target 8" in found["privacy"].found
    assert "predicted peak" in found["memory"].found
    assert "float64 sums" in found["memory"].found
    assert "micro-batch of 4" in found["memory"].found
    assert "norm rule" in found["gradients"].found


def test_it_writes_draws_and_spends_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(self: SecretStream) -> int:
        raise AssertionError("noise or a sample was drawn")

    monkeypatch.setattr(SecretStream, "next_draw", drawn)
    before = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    assert failed(checks(folder)) == set()
    assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == before


@pytest.mark.slow
def test_it_goes_the_way_of_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise and trained parameters are those that `train` then has; asked the same, σ is not calibrated twice."""
    monkeypatch.setattr(sampling, "noise_multiplier", functools.cache(sampling.noise_multiplier))
    changes = {"train__steps": 2, "method__kind": "lora", "privacy__noise_multiplier": None}
    changes["privacy__epsilon"] = 0.5  # the larger the noise, the less there is to calibrate
    found = checks(folder, **changes)
    config = Config.from_dict(settings(folder, **changes))
    result = train(config, progress=False)
    assert sampling.noise_multiplier.cache_info()[:2] == (1, 1)  # hits, misses
    assert f"σ = {result.noise_multiplier:g}:" in found["privacy"].found
    assert f"ε = {result.epsilon:.3f}" in found["privacy"].found
    values = json.loads((Path(config.output) / "run.json").read_text())
    assert f"{values['model']['trained_parameters']:,} parameters" in found["method"].found


@pytest.mark.slow
def test_a_run_that_is_continued(folder: Path) -> None:
    config = crash_at(folder, 3)
    ledger = Path(config.output) / "ledger.jsonl"
    written = ledger.read_bytes()
    found = {check.what: check for check in check_run(config, progress=False)}
    assert failed(found) == set()
    assert "its ledger counts 3 steps" in found["output"].found
    assert "σ = 4.000 (its ledger)" in found["privacy"].found
    assert ledger.read_bytes() == written
    assert read_ledger(ledger).steps == 3


def test_a_run_without_privacy(folder: Path) -> None:
    found = checks(folder, privacy__enabled=False)
    assert failed(found) == set()
    assert "NOT PRIVATE" in found["privacy"].found


@pytest.mark.slow
def test_a_run_that_protects_speakers(folder: Path) -> None:
    """Eight utterances of four speakers; `plan` states the same rate and ε for the same file."""
    speakers = {"privacy__unit": "speaker", "privacy__max_examples_per_speaker": 3, "train__batch_size": 8}
    values = settings(folder, **speakers)
    found = checks(folder, **speakers)
    assert failed(found) == set()
    stated = re.search(r"at rate (\S+) of 4 speakers; would spend ε = (\S+)", found["privacy"].found)
    assert stated is not None
    assert stated[1] == f"{8 / 12:.5f}"
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    planned = run_cli("plan", "--config", folder / "run.yaml")
    assert f"rate {stated[1]} (of 4 speakers" in planned.output
    assert f"spends {stated[2]} at" in planned.output


Break = Callable[[Path, pytest.MonkeyPatch], dict[str, Any]]


def lost_weights(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"model__name": str(folder / "nothing")}


def lost_audio(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    (folder / "lost.jsonl").write_text('{"audio": "lost.wav", "text": "low"}\n')
    return {"data__train": str(folder / "lost.jsonl")}


def too_large_a_batch(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"train__batch_size": 25}


def wrong_targets(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"method__kind": "lora", "method__targets": ["query"]}


def private_validation(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"data__valid": str(folder / "tones.jsonl"), "train__eval_every": 2}


def finished(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    train(Config.from_dict(settings(folder, method__kind="head", train__steps=1)), progress=False)
    return {"method__kind": "head", "train__steps": 1}


def small_device(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    patch.setattr(module, "_capacity", lambda device: 200_000)
    return {}


def mixed_examples(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    def differs(*_: object) -> None:
        raise SelfCheckError("layer 3 mixes examples", SelfCheckReport())

    patch.setattr(start, "self_check", differs)
    return {}


DATA = {"training data", "test data", "validation data", "privacy", "memory", "gradients"}
BROKEN: list[tuple[Break, str, str, set[str]]] = [
    (lost_weights, "model", "no such folder", {"model", "method", *DATA}),
    (lost_audio, "training data", "no such file", DATA),
    (too_large_a_batch, "training data", "train.batch_size=25 (--batch-size) exceeds the 24", DATA),
    (wrong_targets, "method", "there: ", {"method", "memory", "gradients"}),
    (private_validation, "validation data", "training recordings too", {"validation data"}),
    (finished, "output", "this run is finished", {"output", "privacy", "gradients"}),
    (small_device, "memory", "lower train.physical_batch_size", {"memory", "gradients"}),
    (mixed_examples, "gradients", "layer 3 mixes examples", {"gradients"}),
]


@pytest.mark.thinned(5)
@pytest.mark.parametrize(
    ("damage", "what", "message", "fail"), BROKEN, ids=lambda value: getattr(value, "__name__", "")
)
def test_what_would_stop_a_run_is_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch, damage: Break, what: str, message: str, fail: set[str]
) -> None:
    changes = damage(folder, monkeypatch)
    found = checks(folder, **changes)
    assert message in found[what].found
    assert failed(found) == fail
    for other in fail - {what}:
        assert found[other].found.startswith("not checked: needs ")


@pytest.mark.slow
def test_recordings_that_do_not_decode_are_counted(folder: Path) -> None:
    names = [write(folder / "flac" / f"{index}.flac", 1.0, seed=index).name for index in range(12)]
    broken = folder / "flac" / names[3]
    broken.write_bytes(broken.read_bytes()[:8000])
    lines = [json.dumps({"audio": f"flac/{name}", "text": "low", "utt_id": name}) for name in names]
    (folder / "more.jsonl").write_text("\n".join(lines))
    found = checks(folder, data__train=str(folder / "more.jsonl"))
    assert failed(found) == set()
    assert "12 decoded: 1 do not, and would be left out, e.g. 3.flac" in found["training data"].found


def test_what_is_left_out_is_named_as_in_a_run(folder: Path) -> None:
    manifest = folder / "tones.jsonl"
    lines = [json.dumps({"audio": f"tones/none{index}.wav", "text": "low"}) for index in range(4)]
    manifest.write_text("\n".join([manifest.read_text().rstrip("\n"), *lines]))
    found = checks(folder)["training data"].found
    assert "4 left out: 4 × no such file" in found
    assert found.count("tones.jsonl:") == 3
    assert "\n  ...\n" in found


@pytest.mark.slow
def test_warnings_stand_in_the_table(folder: Path) -> None:
    quick = {"privacy__accountant": "rdp"}  # the other takes seconds at such a delta
    found = checks(folder, data__test=str(folder / "tones.jsonl"), privacy__delta=0.2, **quick)
    assert failed(found) == set()
    assert "24 of them are training recordings too" in found["test data"].found
    assert "δ is not below 1 / 24" in found["privacy"].found
    near = checks(folder, privacy__delta=0.9 / 24, privacy__noise_multiplier=4.0)
    assert "δ is close to 1 / 24" in near["privacy"].found
    assert "WARNING" not in checks(folder, privacy__noise_multiplier=4.0)["privacy"].found
    early = checks(folder, privacy__noise_multiplier=1.0, privacy__epsilon=0.5)
    assert "it would stop early" in early["privacy"].found


def test_a_fault_is_not_a_check(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: object) -> None:
        raise KeyError("ours")

    monkeypatch.setattr(start, "recognizer_of", fault)
    with pytest.raises(KeyError):
        checks(folder)


@pytest.mark.parametrize(("batch", "code"), [(8, 0), (25, 1)])
def test_the_command_says_it_by_its_exit_code(folder: Path, batch: int, code: int) -> None:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings(folder)))
    result = run_cli("train", "--config", path, "--batch-size", batch, "--dry-run", "--quiet")
    assert result.exit_code == code, result.output
    assert "nothing was written or spent" in result.output
    assert ("FAILED" in result.output) == bool(code)
    assert not (folder / "run").exists()
    assert torch.get_num_threads() == 1
