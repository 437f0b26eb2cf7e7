"""What a start that failed leaves behind, and what comes before the first evaluation."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch

from asr_finetune.config.schema import Config, ConfigError
from asr_finetune.models.ctc import CTCRecognizer
from asr_finetune.training import run as training
from asr_finetune.training.evaluate import Evaluation, evaluate
from asr_finetune.training.run import Interrupted, train
from asr_finetune.training.run_folder import RunFolder
from dpkernels.privacy import SelfCheckError, read_ledger
from tests.asr_finetune import small_models, tones
from tests.slow import slow_unless


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    tones.write_manifest(tmp_path, 12)
    tones.write_manifest(tmp_path, 4, seed=1, name="test")
    with tones.one_thread():
        tones.write_model(tmp_path / "model")
        yield tmp_path


def small(folder: Path, **changes: Any) -> Config:
    values = {"method__kind": "head", "privacy__epsilon": None, "privacy__noise_multiplier": 4.0}
    values |= {"train__steps": 2, "train__batch_size": 4, "data__test": str(folder / "test.jsonl")}
    return Config.from_dict(tones.settings(folder, **{**values, **changes}))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"train__batch_size": 13}, r"train\.batch_size=13 .--batch-size. exceeds the 12 training utterances"),
    (
        {"privacy__unit": "speaker", "privacy__max_examples_per_speaker": 2, "train__batch_size": 9},
        "exceeds 8: 2 utterances in a step .* of each of 4 training speakers",
    ),
    ({"method__kind": "lora", "method__targets": ["no_such"]}, r"method\.targets=\['no_such'\]"),
    ({"method__layers": "decoder"}, "a CTC model has no decoder"),
    ({"data__valid": "none.jsonl", "train__eval_every": 1}, r"no manifest at 'none\.jsonl'"),
]


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    ("changes", "message"),
    slow_unless(lambda changes, _: {*changes} & {"train__batch_size", "data__valid"}, WRONG),
    ids=[next(iter(changes)) for changes, _ in WRONG],
)
def test_what_cannot_be_trained_is_found_before_the_first_evaluation(
    folder: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    evaluations: list[str] = []

    def noted(*arguments: Any, name: str, **options: Any) -> Evaluation:
        evaluations.append(name)
        return evaluate(*arguments, name=name, **options)

    monkeypatch.setattr(training, "evaluate", noted)
    with pytest.raises(ConfigError, match=message):
        train(small(folder, **changes), progress=False)
    assert evaluations == []
    # The fixed configuration starts in the same folder.
    assert train(small(folder), progress=False).steps == 2
    assert evaluations == ["before", "after"]


@pytest.mark.slow
def test_a_start_that_failed_its_self_check_leaves_no_noise_and_no_result(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ledger has a header and no step; its error rates before are of another configuration."""
    original = CTCRecognizer.loss_per_example

    def mean_reduction(self: CTCRecognizer, model: Any, batch: Any) -> torch.Tensor:
        return original(self, model, batch) / len(batch["labels"])

    (folder / "run").mkdir()
    (folder / "run" / "metrics.json").write_text('{"private": true, "before": {"wer": 123.0}}')
    with monkeypatch.context() as patch:
        patch.setattr(CTCRecognizer, "loss_per_example", mean_reduction)
        with pytest.raises(SelfCheckError):
            train(small(folder), progress=False)
    assert read_ledger(folder / "run" / "ledger.jsonl").steps == 0
    assert not RunFolder(folder / "run").begun
    assert not RunFolder(folder / "run").metrics.exists()  # nothing was evaluated before it
    result = train(small(folder, privacy__noise_multiplier=2.0), progress=False, resume=False)
    assert result.noise_multiplier == 2.0
    values = json.loads((folder / "run" / "run.json").read_text())
    assert values["privacy"]["noise_multiplier"] == 2.0
    assert values["evaluation"]["before"]["wer"] != 123.0


def test_a_plain_run_that_crashed_before_its_first_checkpoint_starts_over(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = {"privacy__enabled": False, "privacy__noise_multiplier": None, "train__checkpoint_every": 5}
    with monkeypatch.context() as patch:
        patch.setattr(training, "_finish", lambda *_: 1 / 0)
        patch.setattr("asr_finetune.training.loop.save", lambda run: None)
        with pytest.raises(ZeroDivisionError):
            train(small(folder, **plain), progress=False)
    result = train(small(folder, **plain, train__steps=3), progress=False)
    assert [entry["step"] for entry in result.history] == [1, 2, 3]


def test_models_that_take_equal_lengths_only_pass_the_self_check(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_models.wav2vec2_group(tmp_path / "group")
    for line in (folder / "tones.jsonl", folder / "test.jsonl"):
        line.write_text(line.read_text().replace('"high', '"low').replace(' high"', ' low"'))
    equal: dict[str, Any] = {"model__name": str(tmp_path / "group"), "train__physical_batch_size": 1}
    equal |= {"evaluate__batch_size": 1}
    with pytest.raises(ConfigError, match=r"train\.physical_batch_size=4: .*equal lengths only.*set it to 1"):
        train(small(folder, **{**equal, "train__physical_batch_size": 4}), progress=False)
    assert train(small(folder, **equal)).steps == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "the gradients of 2 utterances of one length (feat_extract_norm" in said


@pytest.mark.slow
def test_what_does_not_decode_is_not_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples, rate = soundfile.read(folder / "tones" / "5.wav")
    damaged = folder / "tones" / "5.flac"
    soundfile.write(damaged, samples, rate)
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])  # the header is whole
    manifest = folder / "tones.jsonl"
    manifest.write_text(manifest.read_text().replace("5.wav", "5.flac"))
    train(small(folder, output=str(folder / "checked")))
    said = capsys.readouterr().out
    assert "train: reading audio 12/12" in said
    assert "1 left out: 1 × unreadable audio" in said
    values = json.loads((folder / "checked" / "run.json").read_text())
    assert values["privacy"]["dataset_size"] == values["data"]["units"] == 11
    listed = (folder / "checked" / "not_private" / "problems_train.tsv").read_text()
    assert listed.startswith("u5 (tones.jsonl:6)\tunreadable audio: ")
    train(small(folder, data__check_audio=False, train__steps=4, train__batch_size=12))
    values = json.loads((folder / "run" / "run.json").read_text())
    assert values["privacy"]["dataset_size"] == 12
    assert "1 recordings could not be read during training" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_last_step_stops_before_the_evaluation(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    config = small(folder)
    original = RunFolder.note_history

    def note(self: RunFolder, entry: dict[str, Any]) -> None:
        original(self, entry)
        if entry["step"] == 2:
            os.kill(os.getpid(), number)
            assert "stopping after this step; repeat the signal to stop now" in capsys.readouterr().out

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "note_history", note)
        with pytest.raises(Interrupted, match="after step 2 of 2"):
            train(config)
    assert not (folder / "run" / "run.json").exists()
    assert train(config, progress=False).steps == 2
    assert read_ledger(folder / "run" / "ledger.jsonl").steps == 2


def test_a_signal_in_the_last_evaluation_is_not_swallowed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, name: str, **options: Any) -> Evaluation:
        if name == "after":
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(*arguments, name=name, **options)

    # Where the tests run in the background of a shell, SIGINT is ignored from the start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(training, "evaluate", interrupted)
            with pytest.raises(KeyboardInterrupt):
                train(small(folder), progress=False)
    finally:
        signal.signal(signal.SIGINT, before)
    assert train(small(folder), progress=False).steps == 2


@pytest.mark.slow
@pytest.mark.parametrize(("valid", "window", "starts"), [("test", None, True), ("public", None, False)])
def test_where_the_curve_starts(folder: Path, valid: str, window: float | None, starts: bool) -> None:
    tones.write_manifest(folder, 3, seed=2, name="public")
    curve = {"data__valid": str(folder / f"{valid}.jsonl"), "train__eval_every": 1}
    train(small(folder, **curve), progress=False)
    values = json.loads((folder / "run" / "run.json").read_text())
    assert values["curve_start"] == (values["evaluation"]["before"]["wer"] if starts else None)
    assert values["data"]["valid"] == f"{valid}.jsonl"
    assert values["scoring"] == {"normalize": "basic", "restrict_to": None}
    assert values["machine"]["device"].startswith("cpu")
    assert {"soundfile", "soxr"} <= set(values["versions"])


def test_nothing_outside_not_private_names_a_speaker(folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "tones.jsonl").read_text().splitlines()]
    named = [{**line, "speaker": f"Ada Lovelace {number % 3}"} for number, line in enumerate(lines)]
    (folder / "tones.jsonl").write_text("".join(json.dumps(line) + "\n" for line in named))
    names = ["Ada Lovelace 0", "Ada Lovelace 1"]
    changes = {"data__speakers": names, "data__exclude_speakers": ["Ada Lovelace 2"]}
    changes |= {"data__test": None, "train__batch_size": 2}
    config = small(folder, **changes)
    train(config, progress=False)
    output = Path(config.output)
    files = [path for path in output.rglob("*") if path.is_file() and "not_private" not in path.parts]
    assert output / "config.yaml" in files
    assert not [path for path in files if b"Lovelace" in path.read_bytes()]
    run = RunFolder(output)
    assert run.check(config, resume=True)  # what was left out of config.yaml is known still
    with pytest.raises(ConfigError, match=r"data\.speakers: was \['Ada Lovelace 0', 'Ada Lovelace 1'\]"):
        run.check(small(folder, **{**changes, "data__speakers": names[:1]}), resume=True)


def test_a_run_begun_under_a_strategys_old_name_is_resumed(tmp_path: Path) -> None:
    config = small(tmp_path, privacy__strategy="mixed")
    run = RunFolder(Path(config.output))
    run.prepare(config, resume=True)
    run.checkpoint.mkdir()
    written = run.config.read_text()
    assert "strategy: mixed" in written
    run.config.write_text(written.replace("strategy: mixed", "strategy: keep_small"))
    with pytest.warns(DeprecationWarning, match="mixed"):
        assert run.check(config, resume=True)
