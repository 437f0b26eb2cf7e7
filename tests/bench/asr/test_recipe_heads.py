"""What the recipes' heads and docs/recipes.md say was measured is what the results hold."""

from __future__ import annotations

import json
from typing import Any

import pytest

from asr_finetune.config.yaml_io import RECIPES
from bench.asr.recipe_heads import DOCS, HEAD, in_a_line, table, with_section
from bench.harness.results import FOLDER

ROW = {
    "recipe": "parakeet_lora",
    "dtype": "float32",
    "rate": 101.4,
    "step_seconds": 0.0123,
    "hours": 22.441,
    "at_most": True,
    "examples": 256,
    "measured": 40 * 2**30,
    "predicted": 41 * 2**30,
    "flops": 10,
}
ABOUT = {"device": "a GPU", "versions": {"torch": "2"}, "commit": "abc", "date": "2026-11-26T00:00:00"}


def test_a_line_of_a_head() -> None:
    full = {
        "recipe": "parakeet_lora",
        "dtype": "bfloat16",
        "reason": "CUDA out of memory",
        "predicted": 2**37,
    }
    other = {**full, "recipe": "wav2vec2_bert_lora", "dtype": "float32", "flops": 40}
    rows = [ROW, full, other, {**other, "dtype": "bfloat16"}]
    assert in_a_line(rows, "parakeet_lora") == (
        "# measured on one H100: float32 at most 22 hours, 40.0 GiB; model.dtype=bfloat16 CUDA out of memory, 128.0 GiB"
    )
    # four times the FLOPs; there is no time in bfloat16 to go by
    assert in_a_line(rows, "wav2vec2_bert_lora") == (
        "# estimated on one H100: float32 some 90 hours, 128.0 GiB; model.dtype=bfloat16 CUDA out of memory, 128.0 GiB"
    )
    assert all(HEAD.fullmatch(in_a_line(rows, name)) for name in ("parakeet_lora", "wav2vec2_bert_lora"))


def test_the_section_takes_the_place_of_the_one_before() -> None:
    section = table({"about": ABOUT, "rows": [ROW]})
    assert "| `parakeet_lora` | float32 | at least 101 | 12 | at most 22 | 40.0 | 41.0 |" in section
    text = with_section(DOCS.read_text(encoding="utf-8"), section)
    assert section in text
    assert with_section(text, section) == text
    with pytest.raises(ValueError, match="put both where the table is to stand"):
        with_section("no marks", section)


def test_heads_and_docs_say_what_was_measured() -> None:
    (path,) = FOLDER.glob("*/recipes.json")
    saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    assert table(saved) in DOCS.read_text(encoding="utf-8")
    for name in {row["recipe"] for row in saved["rows"]}:
        line = in_a_line(saved["rows"], name)
        assert line in (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").split("\n")
