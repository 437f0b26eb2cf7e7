"""`asr-finetune audit`: canaries take the places of recordings, the mechanism is the run's, and secrets stay secret."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from asr_finetune import cli
from asr_finetune.config.schema import Config, ConfigError
from asr_finetune.models.recognizer import Recognizer
from asr_finetune.report import plots
from asr_finetune.report.report import write_report
from asr_finetune.training import start
from asr_finetune.training.audit import PUBLIC_WORDS, audit, audit_record, scores_of, sentence
from asr_finetune.training.run import Interrupted, train
from asr_finetune.training.run_folder import RunFolder, RunFolderError
from asr_finetune.training.setup import readable_part
from dpkernels.auditing import draw_coins, lower_bound, read_coins, write_coins
from dpkernels.privacy import read_ledger
from tests.asr_finetune import small_models, tones
from tests.asr_finetune.report.report_run import record, write_run
from tests.asr_finetune.report.test_report import visible


def invoke(*arguments: object) -> Any:
    return CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, [str(item) for item in arguments])


@pytest.fixture(autouse=True)
def checked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of self-checks, in place of them: they take most of the time of a run, and have tests."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(start, "self_check", lambda *arguments: calls.append(arguments))
    return calls


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_checks_before_training_read_no_absent_canary() -> None:
    coins = np.array([True, False, False, True])
    dataset: Any = [f"recording {index}" for index in range(6)]
    readable, lengths = readable_part(dataset, [10, 11, 12, 13, 14, 15], coins)
    assert [readable[index] for index in range(len(lengths))] == [dataset[index] for index in (0, 1, 2, 5)]
    assert lengths == [10, 11, 12, 15]
    assert readable_part(dataset, [1] * 6, None) == (dataset, [1] * 6)


def test_an_audit_of_a_finished_run(runs: Path, checked: list[tuple[Any, ...]]) -> None:
    result = invoke("audit", runs / "finished", "--output", runs / "audit")
    assert result.exit_code == 0, result.output
    folder, before = RunFolder(runs / "audit"), RunFolder(runs / "finished")
    values, stated = json.loads(folder.audit.read_text()), folder.record()["privacy"]
    # the mechanism is that of the run: no recording was added, and none is there twice
    for key in (
        "noise_multiplier",
        "sample_rate",
        "dataset_size",
        "max_grad_norm",
        "steps",
        "epsilon",
        "delta",
    ):
        assert stated[key] == before.record()["privacy"][key], key
    (line,) = read_ledger(folder.ledger).runs
    assert line.settings["canaries"] == values["canaries"] == 8
    # what says anything about one recording is in files that are not passed on
    coins, canaries = read_coins(folder.coins), json.loads(folder.canaries.read_text())
    size = stated["dataset_size"]
    absent = set(size - len(coins) + np.flatnonzero(~coins))
    assert checked[-1][2].indices == [index for index in range(size) if index not in absent]
    assert mode_of(folder.coins) == mode_of(folder.canaries) == 0o600
    assert len(coins) == len(canaries["texts"]) == len(canaries["start"]) == len(canaries["final"]) == 8
    assert {word for text in canaries["texts"] for word in text.split()} <= set(tones.WORDS)
    assert values["included"] == int(coins.sum()) == sum(values["scores"]["included"])
    assert len(values["scores"]["included"]) > 8  # bins, not canaries
    scores = scores_of(np.array(canaries["start"]), np.array(canaries["final"]))
    assert values["epsilon"] == lower_bound(scores, coins, delta=1e-3).epsilon
    assert "epsilon is at least 0.00 at 95% confidence (nothing was shown)" in result.output
    assert result.output.count("audit [not private]:") == 2
    assert "an audit measures no error rates" in result.output
    assert "data.test is not set" not in result.output
    assert f"delete {folder.not_private}" in result.output
    text = visible((runs / "audit" / "report.html").read_text())
    assert "This run was trained for an audit" in text
    assert "The attack does not contradict the claim" in text
    card = "This model was trained for an audit"
    assert card in (runs / "audit" / "adapter" / "README.md").read_text()
    assert card not in (runs / "finished" / "adapter" / "README.md").read_text()
    assert not before.audit.exists()


def settings(folder: Path, **changes: Any) -> Config:
    given = {"privacy__noise_multiplier": 3.0, "method__kind": "lora", "method__rank": 2} | changes
    return Config.from_dict(tones.settings(folder, **given))


@pytest.mark.slow
def test_a_stopped_audit_continues_with_its_coins(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(runs, output=str(runs / "audit"))
    with monkeypatch.context() as patch:
        tones.interrupt_after(patch, 3)
        with pytest.raises(Interrupted):
            audit(config, progress=False)
    folder = RunFolder(runs / "audit")
    coins, start = folder.coins.read_bytes(), json.loads(folder.canaries.read_text())["start"]
    with pytest.raises(RunFolderError, match="holds an audit"):
        train(config, progress=False)
    with pytest.raises(ConfigError, match=r"--canaries 5: the audit in .* began with 8"):
        audit(config, canaries=5, progress=False)
    values = audit(config, progress=False)
    assert folder.coins.read_bytes() == coins
    assert json.loads(folder.canaries.read_text())["start"] == start
    assert audit(config, progress=False) == values  # finished: nothing is trained again
    with pytest.raises(RunFolderError, match="holds an audit"):
        train(config, progress=False)


def test_an_audit_and_another_run_do_not_continue_each_other(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.check_audited(True, resuming=False)
    folder.check_audited(False, resuming=True)
    with pytest.raises(RunFolderError, match="a run without canaries"):
        folder.check_audited(True, resuming=True)
    folder.not_private.mkdir()
    write_coins(folder.coins, draw_coins(3))
    folder.check_audited(True, resuming=True)
    for resuming in (True, False):
        with pytest.raises(RunFolderError, match="holds an audit"):
            folder.check_audited(False, resuming=resuming)


def test_a_run_without_canaries_is_not_continued_as_an_audit(runs: Path) -> None:
    config = settings(runs, output=str(runs / "stopped"), data__test=None)
    (runs / "stopped" / "config.yaml").write_text(config.to_yaml())
    with pytest.raises(RunFolderError, match="a run without canaries"):
        audit(config, progress=False)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"privacy__enabled": False}, {}, "privacy.enabled=false: nothing is claimed"),
        (
            {"privacy__unit": "speaker", "privacy__max_examples_per_speaker": 2},
            {},
            "privacy.unit=speaker: a canary is one recording",
        ),
        ({"privacy__max_batch_size": 16}, {}, "privacy.max_batch_size=16"),
        ({}, {"confidence": 95}, "--confidence 95"),
    ],
)
def test_what_cannot_be_audited_is_refused(
    tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        audit(settings(tmp_path, **changes), progress=False, **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"canaries": 17}, "--canaries 17: expected from 1 to the 16"),
        ({"words": ("zebra",)}, "has none of the 1 words"),
    ],
)
def test_canaries_that_the_data_cannot_have_are_refused(
    runs: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        audit(settings(runs, output=str(runs / "audit")), progress=False, **options)
    assert not RunFolder(runs / "audit").coins.exists()


class Aligned:
    """A recogniser that can learn texts of so many words at most."""

    def __init__(self, words: int) -> None:
        self.words = words

    def text_problem(self, utterance: Any) -> str | None:
        return None if len(utterance.text.split()) <= self.words else "too many words"


def test_a_canarys_sentence_is_as_long_as_its_own_or_as_the_audio_allows() -> None:
    def of(words: int) -> str:
        recognizer: Recognizer = Aligned(words)  # type: ignore[assignment]
        utterance = small_models.recording(16000, "one two three four")
        return sentence(utterance, PUBLIC_WORDS, random.Random(0), recognizer)

    assert len(of(9).split()) == 4
    assert len(of(2).split()) == 2
    assert of(9) != "one two three four"
    with pytest.raises(ConfigError, match="no public word can be its transcript"):
        of(0)


def test_a_canarys_sentence_is_never_its_own() -> None:
    recognizer: Recognizer = Aligned(1)  # type: ignore[assignment]
    utterance = small_models.recording(16000, "one")
    drawn = {sentence(utterance, ("one", "two"), random.Random(seed), recognizer) for seed in range(10)}
    assert drawn == {"two"}
    with pytest.raises(ConfigError, match="no other transcript than its own"):
        sentence(utterance, ("one",), random.Random(0), recognizer)


def test_scores_are_how_much_the_loss_fell() -> None:
    start, final = np.array([3.0, 2.0, np.inf, 1.0, np.nan]), np.array([1.0, 2.5, 1.0, np.inf, 1.0])
    assert scores_of(start, final).tolist() == [2.0, -0.5, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("right", "said"), [(True, "is above the upper bound"), (False, "does not contradict")]
)
def test_the_report_says_whether_the_bounds_agree(tmp_path: Path, right: bool, said: str) -> None:
    coins = np.random.default_rng(0).random(400) < 0.5
    scores = coins + 0.0 if right else np.random.default_rng(1).normal(size=400)
    stated = record()["privacy"]["epsilon"]
    values = audit_record(lower_bound(scores, coins, delta=1e-5), scores, coins, stated)
    assert values["contradicts"] is right
    run = write_run(tmp_path / "run")
    (run / "audit.json").write_text(json.dumps(values))
    page = write_report(run, tmp_path / "r.html").read_text()
    text = visible(page)
    assert said in text
    assert "ε does not cover them" in text
    assert "It cannot show more than 4.19" in text
    assert (
        f"{sum(values['guessed_' + kind] for kind in ('included', 'excluded')) / 2:g} are expected by chance"
        in text
    )
    assert ("nothing was shown" in text) is (not right)
    assert page.count("<svg ") == 3


def test_the_report_of_an_audit_without_noise_speaks_of_no_claim(tmp_path: Path) -> None:
    coins = np.random.default_rng(0).random(400) < 0.5
    values = audit_record(lower_bound(coins + 0.0, coins, delta=1e-5), coins + 0.0, coins, None)
    nothing = dict.fromkeys(("epsilon", "epsilon_pld", "epsilon_rdp"))
    run = write_run(tmp_path / "run", record(noise_multiplier=0.0, **nothing), sigma=0.0)
    (run / "audit.json").write_text(json.dumps(values))
    text = visible(write_report(run, tmp_path / "r.html").read_text())
    assert "no claim that the attack could contradict" in text
    assert "does not contradict the claim" not in text
    assert re.search(r"shown by an attack\s*ε\s≥\s4\.19\s*with 95\s% confidence", text)


def test_a_report_without_an_audit_says_nothing_of_one(tmp_path: Path) -> None:
    text = visible(write_report(write_run(tmp_path / "run"), tmp_path / "r.html").read_text())
    assert "attack" not in text.replace("attacker", "")


def test_a_plot_of_no_canaries_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to plot"):
        plots.canary_scores([0.0, 1.0], [0], [0])


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    result = invoke("audit", tmp_path)
    assert isinstance(result.exception, RunFolderError)
    assert "has no config.yaml" in str(result.exception)
