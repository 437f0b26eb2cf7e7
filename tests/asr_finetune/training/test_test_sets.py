"""Several test sets in one run: before, after, in the record, the report and the comparison."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from asr_finetune.config.schema import Config, ConfigError
from asr_finetune.report.report import write_report
from asr_finetune.training.record import _curve_start
from asr_finetune.training.run import train
from asr_finetune.training.run_folder import as_recorded, by_test_set
from tests.asr_finetune import tones
from tests.asr_finetune.report.test_report import visible


def config(**data: Any) -> Config:
    return Config.from_dict({"model": {"name": "m"}, "data": {"train": "d", **data}, "output": "o"})


@pytest.mark.parametrize(
    ("data", "sets"),
    [
        ({}, {}),
        ({"test": "a"}, {"test": ("a", None)}),
        ({"test": "a", "test_split": "s"}, {"test": ("a", "s")}),
        ({"test": {"clean": "a", "other": "b"}}, {"clean": ("a", None), "other": ("b", None)}),
        ({"test": {"x": "a", "y": "b"}, "test_split": "s"}, {"x": ("a", "s"), "y": ("b", "s")}),
        ({"test": "a", "test_split": {"x": "s", "y": None}}, {"x": ("a", "s"), "y": ("a", None)}),
        ({"test": {"x": "a"}, "test_split": {"x": 19}}, {"x": ("a", "19")}),
        ({"test_split": {"x": "s"}}, {}),
        ({"test": ["a", "b"]}, {"test": (["a", "b"], None)}),
        ({"test": ["a", "b"], "test_split": ["s", None]}, {"test": (["a", "b"], ["s", None])}),
        ({"test": {"x": ["a", "b"], "y": ["c"]}}, {"x": (["a", "b"], None), "y": ("c", None)}),
        (
            {"test": {"x": ["a", "b"], "y": "c"}, "test_split": {"x": ["s", "t"], "y": None}},
            {"x": (["a", "b"], ["s", "t"]), "y": ("c", None)},
        ),
    ],
)
def test_what_the_test_sets_are(data: dict[str, Any], sets: dict[str, Any]) -> None:
    made = config(**data)
    assert made.data.test_sets() == sets
    assert Config.from_dict(made.to_dict()) == made


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"test": {}}, "give each a name"),
        ({"test": {"../x": "a"}}, "give each a name"),
        ({"test": {"x": None}}, "expected a folder, a file or an id, or a list"),
        ({"test": {"x": {"y": "a"}}}, "expected a folder, a file or an id, or a list"),
        ({"test": ["a", 1.5]}, "expected a folder, a file or an id, or a list"),
        ({"test": []}, "expected a folder, a file or an id, or a list"),
        ({"test": {"x": "a"}, "test_split": {"y": "s"}}, "for the same test sets"),
        ({"test": 1.5}, "expected a folder, a file or an id, or a list"),
    ],
)
def test_what_cannot_be_test_sets(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        config(**data)
    assert "test" in str(caught.value)


def test_a_record_of_either_form_is_read() -> None:
    one = {"wer": 0.5, "words": 3}
    for results in ({"test": one}, {"clean": one, "other": one}, {"words": one, "wer": one}):
        assert by_test_set(as_recorded(results)) == results
    assert as_recorded({"test": one}) == one
    assert as_recorded({}) is None
    assert by_test_set(None) == {}


def test_a_run_measures_each(runs: Path) -> None:
    output = runs / "finished"
    record = json.loads((output / "run.json").read_text())
    for when in ("before", "after"):
        results = record["evaluation"][when]
        assert {name: result["utterances"] for name, result in results.items()} == {"clean": 4, "other": 4}
        assert results["other"]["left_out"] == {"no such file": 1}
        assert results["clean"]["left_out"] == {}
        for name in results:
            lines = (output / "not_private" / f"transcripts_{when}_{name}.tsv").read_text().splitlines()
            assert len(lines) == 4
    assert json.loads((output / "metrics.json").read_text())["after"] == record["evaluation"]["after"]
    assert record["data"]["test"] == {"clean": "clean.jsonl", "other": "other.jsonl"}
    assert record["data"]["filters"] == ["0.05 to 30 s"]
    assert "left_out" not in record["data"]  # of the private data it is an exact figure
    assert json.loads((output / "not_private" / "test_data.json").read_text()) == {"shares_training": False}


def test_the_report_shows_each(runs: Path) -> None:
    text = visible(write_report(runs / "finished", runs / "report.html").read_text())
    text = text.replace("\N{NARROW NO-BREAK SPACE}", " ")
    for part in (
        "word error rate, clean",
        "word error rate, other",
        "clean: clean.jsonl; other: other.jsonl; normalize",
    ):
        assert part in text, part
    assert "Left out of the test set other: 1 × no such file." in text
    assert "Left out of the test set clean" not in text
    assert len(re.findall(r"4 of 5", text)) == 3  # the headline, before and after


def test_training_data_among_any_of_them_is_noticed(runs: Path) -> None:
    tests = {
        "own": str(runs / "clean.jsonl"),
        "trained": str(runs / "tones.jsonl"),
        "last": [str(runs / "clean.jsonl"), str(runs / "other.jsonl")],
    }
    values = tones.settings(
        runs,
        data__test=tests,
        method__kind="head",
        train__steps=1,
        privacy__noise_multiplier=4.0,
        privacy__epsilon=None,
    )
    train(Config.from_dict(values), progress=False)
    assert json.loads((runs / "run" / "not_private" / "test_data.json").read_text()) == {
        "shares_training": True
    }
    record = json.loads((runs / "run" / "run.json").read_text())
    assert record["data"]["test"]["last"] == "clean.jsonl + other.jsonl"
    assert record["evaluation"]["after"]["last"]["utterances"] == 8
    text = visible(write_report(runs / "run", runs / "report.html").read_text())
    assert "last: clean.jsonl + other.jsonl" in text


@pytest.mark.slow
def test_a_comparison_needs_the_same_test_sets(runs: Path) -> None:
    plain = {"privacy__enabled": False, "method__kind": "head", "train__steps": 1}
    tests = {"clean": str(runs / "clean.jsonl"), "other": str(runs / "other.jsonl")}
    first = Config.from_dict(tones.settings(runs, **plain, data__test=tests, output=str(runs / "plain")))
    train(first, progress=False)
    record = json.loads((runs / "plain" / "run.json").read_text())
    assert record["data"]["left_out"] == {}

    changes = {
        "method__kind": "head",
        "train__steps": 1,
        "privacy__noise_multiplier": 4.0,
        "privacy__epsilon": None,
    }
    again = Config.from_dict(tones.settings(runs, **changes, data__test=tests, output=str(runs / "private")))
    train(again, progress=False, compare=first.output)
    compared = json.loads((runs / "private" / "run.json").read_text())["evaluation"]["non_private"]
    assert compared == record["evaluation"]["after"]
    text = visible(write_report(again.output, runs / "report.html").read_text())
    assert text.count("the same recipe without privacy") == 2

    other = Config.from_dict(
        tones.settings(runs, **changes, data__test=tests["clean"], output=str(runs / "third"))
    )
    with pytest.raises(ConfigError, match="has the test sets clean, other, this one test"):
        train(other, progress=False, compare=first.output)


def test_the_curve_starts_at_the_set_that_is_validated_on() -> None:
    before = {"clean": {"wer": 0.4, "words": 9}, "other": {"wer": 0.6, "words": 9}}
    made = config(test={"clean": "a", "other": "b"}, valid="b")
    assert _curve_start(made, {"before": before}) == 0.6
    assert _curve_start(config(test={"clean": "a", "other": "c"}, valid="b"), {"before": before}) is None
    assert _curve_start(made, {"before": None}) is None
