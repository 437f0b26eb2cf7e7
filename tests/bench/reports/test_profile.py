"""Where the time goes: operators are sorted by what they are for, and nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.names import NON_PRIVATE, ours
from bench.reports import profile


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("aten::addmm", "matrix products"),
        ("dpkernels::lora_norm_sq", "per-sample norms"),
        ("dpkernels::weighted_sums", "weighted sums"),
        ("dpkernels::noise_adamw", "noise and optimizer"),
        ("aten::convolution_backward", "convolutions"),
        ("aten::silu", "other"),
    ],
)
def test_kinds(operator: str, kind: str) -> None:
    assert profile.kind_of(operator) == kind


@pytest.mark.slow
def test_the_command_writes_what_the_readme_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--cases", "tiny-lora", "--size", "2", "--frames", "32", "--steps", "2"]
    assert profile.main([*arguments, "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/profile.json")
    saved = json.loads(path.read_text())
    found = saved["cases"]["tiny-lora"]
    assert set(found) == set(profile.CONTENDERS)
    assert "per-sample norms" in found[ours()]
    assert "per-sample norms" not in found[NON_PRIVATE]
    assert all(ms > 0 for times in found.values() for ms in times.values())
    shown = capsys.readouterr().out
    text = profile.markdown(saved)
    for kind in found[ours()]:
        assert kind in shown
        assert f"| {kind} |" in text


def test_an_unknown_case_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        profile.main(["--cases", "nothing"])
    assert "no case nothing; the cases are parakeet-lora" in capsys.readouterr().err
