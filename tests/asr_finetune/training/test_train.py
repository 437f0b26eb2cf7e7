from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from asr_finetune.config.schema import Config, ConfigError, ModelConfig, TrainConfig
from asr_finetune.models.ctc import CTCRecognizer
from asr_finetune.models.loading import load_with_adapter
from asr_finetune.training import run_folder
from asr_finetune.training import setup as prepare
from asr_finetune.training.loop import learning_rate
from asr_finetune.training.run import Interrupted, TrainResult, train
from asr_finetune.training.run_folder import RunFolder, RunFolderError
from dpkernels import PrivacyEngine, checkpoint
from dpkernels.privacy import LedgerError, SelfCheckError, epsilon, read_ledger
from tests.asr_finetune import tones
from tests.slow import slow_cases

UTTERANCES, BATCH, DELTA, SIGMA = 24, 6, 1e-3, 4.0
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("train")
    tones.write_manifest(folder, UTTERANCES)
    tones.write_manifest(folder, 6, seed=1, name="test")
    with tones.one_thread():
        tones.write_model(folder / "model")
        yield folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """The task's data and model, with nothing in its output folder."""
    for name in ("tones", "test", "model", "tones.jsonl", "test.jsonl"):
        (tmp_path / name).symlink_to(made / name)
    return tmp_path


def small(folder: Path, **changes: Any) -> Config:
    values = {
        "method__kind": "head",
        "privacy__epsilon": None,
        "privacy__delta": DELTA,
        "privacy__noise_multiplier": SIGMA,
        "train__batch_size": BATCH,
        "train__steps": 8,
        "train__checkpoint_every": 4,
    }
    return Config.from_dict(tones.settings(folder, **{**values, **changes}))


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, do: Callable[[], None]) -> None:
    """Do something right after a step was applied and counted, before any checkpoint of it."""
    original = RunFolder.note_history

    def note(self: RunFolder, entry: dict[str, Any]) -> None:
        original(self, entry)
        if entry["step"] == step:
            do()

    monkeypatch.setattr(RunFolder, "note_history", note)


class Crash(BaseException):
    """The process ends here."""


def crash(*_: Any) -> None:
    raise Crash


def crash_at(folder: Path, step: int, **changes: Any) -> Config:
    """A run that ends after `step` steps as a killed one does."""
    config = small(folder, **changes)
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, step, crash)
        with pytest.raises(Crash):
            train(config, progress=False)
    return config


def trained(config: Config) -> dict[str, torch.Tensor]:
    saved = checkpoint.load(Path(config.output) / "checkpoint")
    assert saved is not None
    return saved.parameters


def run_json(config: Config) -> Any:
    return json.loads((Path(config.output) / "run.json").read_text())


def check_counts(config: Config, result: TrainResult) -> int:
    """ε is that of every step in the ledger. Returns their number."""
    spent = read_ledger(Path(config.output) / "ledger.jsonl").steps
    assert run_json(config)["privacy"]["steps"] == spent
    assert result.epsilon == pytest.approx(epsilon(SIGMA, BATCH / UTTERANCES, spent, DELTA), rel=1e-9)
    return spent


def test_a_whole_run(folder: Path) -> None:
    config = small(
        folder,
        data__test=str(folder / "test.jsonl"),
        data__valid=str(folder / "test.jsonl"),
        train__eval_every=4,
        method__kind="full",
    )
    result = train(config, progress=False)
    output = Path(config.output)
    assert check_counts(config, result) == result.steps == 8
    assert (output / "model" / "model.safetensors").is_file()
    assert Config.from_dict(tones.settings(folder)) != config
    values = run_json(config)
    assert values["privacy"]["sampling"] == "poisson"
    assert values["privacy"]["adjacency"] == "add or remove one example"
    assert values["privacy"]["epsilon_rdp"] > values["privacy"]["epsilon"] > 0
    assert values["privacy"]["sample_rate"] == BATCH / UTTERANCES
    assert values["data"]["units"] == UTTERANCES
    assert values["model"]["trained_parameters"] > 1000
    assert [point["step"] for point in values["curve"]] == [4, 8]
    assert values["curve"][0]["epsilon"] < values["curve"][1]["epsilon"] == result.epsilon
    assert set(json.loads((output / "metrics.json").read_text())) == {"private", "before", "after"}
    assert values["evaluation"]["before"]["utterances"] == 6
    assert [entry["step"] for entry in result.history] == list(range(1, 9))
    assert not list(output.rglob(".*")), "temporary files are left"


def keys_of(values: Any) -> set[str]:
    if isinstance(values, dict):
        return set(values).union(*map(keys_of, values.values()))
    return set().union(*map(keys_of, values)) if isinstance(values, list) else set()


def test_what_is_not_private_stays_in_its_folder(folder: Path) -> None:
    config = small(folder, train__steps=2, data__test=str(folder / "test.jsonl"))
    train(config, progress=False)
    output = Path(config.output)
    forbidden = {"loss", "clip_rate", "mean_norm", "non_finite", "examples", "hypotheses"}
    assert not keys_of(run_json(config)) & forbidden
    assert not keys_of(json.loads((output / "metrics.json").read_text())) & forbidden
    ledger = [json.loads(line) for line in (output / "ledger.jsonl").read_text().splitlines()]
    assert not keys_of(ledger) & forbidden
    history = [
        json.loads(line) for line in (output / "not_private" / "history.jsonl").read_text().splitlines()
    ]
    assert forbidden & keys_of(history) == {"loss", "clip_rate", "mean_norm", "non_finite", "examples"}
    assert "No epsilon covers them" in (output / "not_private" / "README.txt").read_text()


KILLED = """
import os, signal, sys, yaml
from asr_finetune.config.schema import Config
from asr_finetune.training.run_folder import RunFolder
from asr_finetune.training.run import train

original = RunFolder.note_history
def note(self, entry):
    original(self, entry)
    if entry["step"] == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
RunFolder.note_history = note
train(Config.from_dict(yaml.safe_load(open(sys.argv[1]))), progress=False)
"""


def kill_at(folder: Path, step: int, **changes: Any) -> Config:
    """As `crash_at`, by kill -9 in a process of its own."""
    config = small(folder, **changes)
    (folder / "killed.yaml").write_text(config.to_yaml())
    command = [sys.executable, "-c", KILLED, str(folder / "killed.yaml"), str(step)]
    ended = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert ended.returncode == -signal.SIGKILL
    return config


@pytest.mark.parametrize("end", [crash_at, *slow_cases(kill_at)])
def test_killed_and_resumed(
    folder: Path, capsys: pytest.CaptureFixture[str], end: Callable[..., Config]
) -> None:
    """Killed after step 6, checkpoint at 4: steps 5 and 6 count twice; the target ε ends the run early."""
    target = epsilon(SIGMA, BATCH / UTTERANCES, 9, DELTA)
    config = end(folder, 6, privacy__epsilon=target, data__test=str(folder / "test.jsonl"))
    capsys.readouterr()
    output = Path(config.output)
    assert read_ledger(output / "ledger.jsonl").steps == 6
    saved = checkpoint.load(output / "checkpoint")
    assert saved is not None
    assert saved.step == 4
    assert saved.random is None  # dropout's generator is secret
    before = (output / "metrics.json").read_text()

    result = train(config)
    said = capsys.readouterr().out
    assert "resuming from the checkpoint at step 4 of 8" in said
    assert "counts 6 steps, 2 of them after the checkpoint" in said
    for work in (
        "loading ",
        "train: reading the list of recordings",
        "self-check: comparing the gradients of",
    ):
        assert work in said  # what may take seconds is announced
    assert "stopped after 7 of 8 steps" in said
    # 6 steps before the kill and 3 after it are the 9 that the target allows; the model has taken 4 + 3.
    assert check_counts(config, result) == 9
    assert result.steps == 7
    assert result.epsilon is not None
    assert result.epsilon <= target
    assert [entry["step"] for entry in result.history] == [1, 2, 3, 4, 5, 6, 7]
    assert json.loads(before)["before"] == run_json(config)["evaluation"]["before"]


def test_without_a_target_the_replayed_steps_come_on_top(folder: Path) -> None:
    config = crash_at(folder, 6)
    result = train(config, progress=False)
    assert check_counts(config, result) == 10
    assert result.steps == 8


def test_a_crash_before_the_first_checkpoint_is_counted(folder: Path) -> None:
    config = crash_at(folder, 3)
    assert checkpoint.load(Path(config.output) / "checkpoint") is None
    result = train(config, progress=False)
    assert check_counts(config, result) == 11
    assert [entry["step"] for entry in result.history] == list(range(1, 9))


def test_the_count_check_sees_a_forgotten_ledger(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault planted: a resumed run that starts counting anew."""
    config = crash_at(folder, 3)
    ledger = Path(config.output) / "ledger.jsonl"
    original = prepare.PrivacyEngine
    monkeypatch.setattr(
        prepare, "PrivacyEngine", lambda accountant, ledger: original(accountant=accountant, ledger=None)
    )
    result = train(config, progress=False)
    with pytest.raises(AssertionError):
        check_counts(config, result)
    assert read_ledger(ledger).steps == 3


def test_a_lost_ledger_is_noticed(folder: Path) -> None:
    config = crash_at(folder, 6)
    (Path(config.output) / "ledger.jsonl").unlink()
    with pytest.raises(LedgerError, match="lacks the line"):
        train(config, progress=False)


@pytest.mark.parametrize("lost", [1, 2])
def test_damaged_checkpoints_lose_steps_and_never_budget(
    folder: Path, capsys: pytest.CaptureFixture[str], lost: int
) -> None:
    """kill -9 after step 7 of 8, checkpoints at 2, 4 and 6; the last `lost` of the two that are kept are damaged."""
    config = crash_at(folder, 7, train__checkpoint_every=2)
    for name in (checkpoint.FILE, checkpoint.PREVIOUS)[:lost]:
        path = Path(config.output) / "checkpoint" / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    result = train(config)
    said = " ".join(capsys.readouterr().out.split())
    again = {1: 4, 2: 0}[lost]
    assert check_counts(config, result) == 7 + 8 - again
    assert result.steps == 8
    assert [entry["step"] for entry in result.history] == list(range(1, 9))
    assert said.count("is damaged, or not a checkpoint") == lost
    assert ("resuming from the checkpoint at step 4" in said) == (lost == 1)
    assert ("no checkpoint yet, starting from step 0. 7 steps were spent" in said) == (lost == 2)
    assert "another --output" not in said


def resumed_twice(folder: Path, config: Config) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The parameters of two resumptions from the same checkpoint and ledger."""
    copies = []
    for name in ("first", "second"):
        copy = folder / name
        shutil.copytree(config.output, copy)
        again = Config.from_dict({**config.to_dict(), "output": str(copy)})
        train(again, progress=False)
        copies.append(trained(again))
    return copies[0], copies[1]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_resumed_runs_draw_fresh_noise(folder: Path) -> None:
    first, second = resumed_twice(folder, crash_at(folder, 6))
    assert not same(first, second)


@pytest.mark.filterwarnings("ignore:.*noise_key")
def test_the_noise_check_sees_a_fixed_key(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault planted: a resumed run that uses one key for ever."""
    config = crash_at(folder, 6)
    monkeypatch.setattr(
        prepare,
        "PrivacyEngine",
        lambda accountant, ledger: PrivacyEngine(accountant=accountant, ledger=ledger, noise_key=bytes(32)),
    )
    first, second = resumed_twice(folder, config)
    assert same(first, second)


def test_no_key_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[bytes] = []
    original = os.urandom

    def urandom(size: int) -> bytes:
        drawn.append(original(size))
        return drawn[-1]

    monkeypatch.setattr(os, "urandom", urandom)
    config = small(folder, train__steps=2)
    train(config, progress=False)
    keys = [value for value in drawn if len(value) >= 32]
    assert keys
    for path in Path(config.output).rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert not any(key in content or key.hex().encode() in content for key in keys)


@pytest.mark.parametrize("number", [signal.SIGTERM, *slow_cases(signal.SIGINT)])
def test_interrupted(folder: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    config = small(folder)
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: os.kill(os.getpid(), number))
        with pytest.raises(Interrupted, match=f"{number.name} after step 3 of 8"):
            train(config, progress=False)
    assert signal.getsignal(number) == handler
    result = train(config, progress=False)
    assert (
        check_counts(config, result) == result.steps == 8
    )  # the checkpoint was of step 3: nothing is replayed


def test_a_crash_while_a_checkpoint_is_written_leaves_the_one_before(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(folder)
    original, written = os.replace, []

    def replace(source: Path, target: Path) -> None:
        if Path(target).name == checkpoint.FILE:
            written.append(target)
            if len(written) == 2:
                raise Crash
        original(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(Crash):
            train(config, progress=False)
    saved = checkpoint.load(Path(config.output) / "checkpoint")
    assert saved is not None
    assert saved.step == 4
    result = train(config, progress=False)
    assert check_counts(config, result) == 12


def test_a_changed_configuration_is_refused(folder: Path) -> None:
    config = crash_at(folder, 2)
    changed = Config.from_dict(tones.settings(folder, **{"privacy__noise_multiplier": 1.0}))
    with pytest.raises(ConfigError) as caught:
        train(changed, progress=False)
    assert "privacy.noise_multiplier: was 4.0, is 1.0" in str(caught.value)
    assert "train.steps: was 8, is 4" in str(caught.value)
    with pytest.raises(RunFolderError, match="resume is off"):
        train(config, progress=False, resume=False)
    allowed = config.with_values("train", physical_batch_size=2, checkpoint_every=3)
    assert train(allowed, progress=False).steps == 8


def test_privacy_and_result_keys_may_not_change() -> None:
    assert not {key for key in run_folder.MAY_CHANGE if key.startswith(("privacy.", "data.", "method."))}
    assert "train.batch_size" not in run_folder.MAY_CHANGE


def test_a_finished_run_is_returned_as_it_is(folder: Path) -> None:
    config = small(folder, train__steps=1)
    result = train(config, progress=False)
    assert train(config, progress=False) == result
    (Path(config.output) / "config.yaml").unlink()
    with pytest.raises(RunFolderError, match=r"no config\.yaml"):
        train(config, progress=False)


def test_without_privacy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = {"privacy__enabled": False, "privacy__noise_multiplier": None, "method__kind": "full"}
    plain |= {"train__steps": 12, "data__test": str(folder / "test.jsonl"), "train__learning_rate": 3e-3}
    config = small(folder, **plain)
    result = train(config, progress=False)
    assert (result.epsilon, result.delta, result.noise_multiplier) == (None, None, None)
    assert not (Path(config.output) / "ledger.jsonl").exists()
    values = run_json(config)
    assert values["privacy"]["enabled"] is False
    assert json.loads((Path(config.output) / "metrics.json").read_text())["private"] is False
    assert result.history[-1]["loss"] < 0.8 * result.history[0]["loss"]

    crashed = crash_at(folder, 6, **plain, output=str(folder / "crashed"))
    train(crashed, progress=False)
    assert same(trained(crashed), trained(config))  # public randomness only: it resumes to the same bits

    private = small(
        folder, train__steps=1, data__test=str(folder / "test.jsonl"), output=str(folder / "private")
    )
    train(private, progress=False, compare=config.output)
    assert run_json(private)["evaluation"]["non_private"] == values["evaluation"]["after"]
    with pytest.raises(ConfigError, match="is private"):
        train(small(folder, output=str(folder / "third")), progress=False, compare=private.output)


@pytest.mark.filterwarnings("ignore:noise_multiplier=0")
def test_without_noise_nothing_is_claimed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = train(small(folder, privacy__noise_multiplier=0, train__steps=1))
    assert result.epsilon is None
    assert "NOT PRIVATE: it was trained without noise" in capsys.readouterr().out


def test_speakers_as_the_unit(folder: Path) -> None:
    config = small(
        folder,
        privacy__unit="speaker",
        privacy__max_examples_per_speaker=3,
        train__steps=2,
        train__batch_size=4,
    )
    train(config, progress=False)
    privacy = run_json(config)["privacy"]
    assert privacy["dataset_size"] == 4
    assert privacy["sample_rate"] == 4 / (3 * 4)
    assert privacy["adjacency"] == "add or remove one speaker"
    with pytest.raises(ConfigError, match="max_examples_per_speaker"):
        train(small(folder, privacy__unit="speaker", output=str(folder / "b")), progress=False)
    lines = [json.loads(line) for line in (folder / "tones.jsonl").read_text().splitlines()]
    lines[0].pop("speaker")
    (folder / "nameless.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    nameless = {"privacy__unit": "speaker", "privacy__max_examples_per_speaker": 3}
    with pytest.raises(ConfigError, match=r"1 have none, e\.g\. u0"):
        train(
            small(folder, data__train=str(folder / "nameless.jsonl"), output=str(folder / "c"), **nameless),
            progress=False,
        )


def test_the_self_check_compares_each_utterance_without_padding(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[Any, Any]] = []

    def noted(self: PrivacyEngine, loss_fn: Any, batch: Any, *, singles: Any = None, samples: int) -> Any:
        given.append((batch, singles))
        return original(self, loss_fn, batch, singles=singles, samples=samples)

    original = PrivacyEngine.self_check
    monkeypatch.setattr(PrivacyEngine, "self_check", noted)
    train(small(folder, train__steps=1), progress=False)
    ((batch, singles),) = given
    rows = [len(next(iter(single.values()))) for single in singles]
    assert rows == [1] * len(singles)
    together, alone = (batch["attention_mask"], [single["attention_mask"] for single in singles])
    assert len(singles) == len(together) > 1
    assert [mask.shape[1] for mask in alone] == together.sum(1).tolist()
    assert len({mask.shape[1] for mask in alone}) > 1


def test_the_self_check_runs_before_anything_is_spent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault planted: a loss divided by the size of its batch, as a mean reduction does."""
    original = CTCRecognizer.loss_per_example

    def reduced(self: CTCRecognizer, model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        losses = original(self, model, batch)
        return losses / len(losses)

    monkeypatch.setattr(CTCRecognizer, "loss_per_example", reduced)
    config = small(folder)
    with pytest.raises(SelfCheckError, match="is not its gradient alone"):
        train(config, progress=False)
    assert read_ledger(Path(config.output) / "ledger.jsonl").steps == 0


def test_adapters_load_back(folder: Path) -> None:
    config = small(folder, method__kind="lora", method__rank=2, train__steps=2)
    train(config, progress=False)
    adapter = Path(config.output) / "adapter"
    recognizer = load_with_adapter(ModelConfig(str(folder / "model"), device="cpu"), adapter)
    loaded = {name: value for name, value in recognizer.model.named_parameters() if "lora_" in name}
    saved = {name: value for name, value in trained(config).items() if "lora_" in name}
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name].detach(), saved[name]) for name in saved)
    assert any(value.abs().max() > 0 for name, value in saved.items() if "lora_B" in name)


@pytest.mark.slow
def test_a_checkpoint_of_another_method_is_refused(folder: Path) -> None:
    config = crash_at(folder, 6)
    other = small(folder, method__kind="full")
    (Path(config.output) / "config.yaml").write_text(other.to_yaml())
    with pytest.raises(checkpoint.CheckpointError, match="another model or method"):
        train(other, progress=False)


def test_batch_size_beyond_the_data(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.batch_size=25 .--batch-size. exceeds the 24"):
        train(small(folder, train__batch_size=25), progress=False)


def test_delta_above_one_over_n_warns(folder: Path) -> None:
    with pytest.warns(UserWarning, match=r"delta=0\.2 >= 1/N"):
        train(small(folder, train__steps=1, privacy__delta=0.2), progress=False)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]),
    ],
)
def test_learning_rates(schedule: Any, expected: list[float]) -> None:
    config = TrainConfig(steps=6, warmup_steps=2, learning_rate=1.0, lr_schedule=schedule)
    assert [learning_rate(config, step) for step in range(6)] == pytest.approx(expected)


def test_the_accountant_that_a_run_is_held_to(folder: Path) -> None:
    config = small(folder, train__steps=2, privacy__accountant="rdp")
    result = train(config, progress=False)
    privacy = run_json(config)["privacy"]
    assert privacy["epsilon"] == privacy["epsilon_rdp"] == result.epsilon
    assert privacy["epsilon_pld"] == pytest.approx(epsilon(SIGMA, BATCH / UTTERANCES, 2, DELTA))
    assert privacy["epsilon_pld"] < privacy["epsilon_rdp"]
