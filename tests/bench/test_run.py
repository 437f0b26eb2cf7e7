"""The commands as they are typed: `pytest --benchmark`, `python -m bench.…`, plain pytest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from bench.harness.memory import Job, Server

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        check=False,
    )


@pytest.mark.slow
def test_quick_benchmark_end_to_end(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = run(
        *(
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "--benchmark",
            "--benchmark-quick",
            "--benchmark-groups",
            "layers",
            "-k",
            "lora",
        ),
        *("--benchmark-device", "cpu", f"--benchmark-output={tmp_path}", f"--benchmark-json={report}"),
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (path,) = tmp_path.glob("*/layers.json")
    rows = json.loads(path.read_text())["rows"]
    assert len({row["contender"] for row in rows}) >= 6
    assert {row["status"] for row in rows} == {"ok"}
    assert "One LoRA Linear" in done.stdout
    # pytest-benchmark's own report has a row for every contender, with all of its samples.
    rows_there = json.loads(report.read_text())["benchmarks"]
    assert len(rows_there) == len(rows)
    assert all(len(row["stats"]["data"]) == 2 for row in rows_there)
    table = run("-m", "bench.reports.report", "--results", str(tmp_path), "--print")
    assert table.returncode == 0, table.stderr


def asked(*paths: str, **options: Any) -> Any:
    """What conftest.py reads of a `pytest` with these paths and options, without the start of another process."""
    values = {
        "benchmark": False,
        "benchmark_groups": "ops,step",
        "benchmark_fastdp": None,
        "numprocesses": None,
    }
    values |= options
    source = pytest.Config.ArgsSource
    return types.SimpleNamespace(
        args=[*map(str, paths)],
        args_source=source.ARGS if paths else source.TESTPATHS,
        option=types.SimpleNamespace(benchmark_columns=None),
        getoption=lambda name, default=None: values[name.lstrip("-").replace("-", "_")],
    )


@pytest.fixture
def rules(pytestconfig: pytest.Config) -> Any:
    """The conftest.py of the root, as this pytest has loaded it."""
    return pytestconfig.pluginmanager.get_plugin(str(ROOT / "conftest.py"))


@pytest.mark.parametrize(
    ("benchmarks", "collected"),
    [
        (False, {"tests", "tests/test_readme.py"}),
        (True, {"bench", "bench/test_ops.py", "bench/test_step.py"}),
    ],
)
def test_either_tests_or_chosen_benchmarks_are_collected(
    rules: Any, benchmarks: bool, collected: set[str]
) -> None:
    files = (
        "tests/test_readme.py",
        *(f"bench/test_{group}.py" for group in ("ops", "layers", "step", "model", "transducer", "opacus")),
    )
    config = asked(benchmark=benchmarks)
    found = {
        path for path in ("tests", "bench", *files) if not rules.pytest_ignore_collect(ROOT / path, config)
    }
    assert found - {"tests"} == collected - {"tests"}  # a folder of tests is entered either way
    rules.pytest_configure(config)
    assert config.args == ([str(ROOT / "bench")] if benchmarks else [])


@pytest.mark.parametrize(
    ("paths", "options", "message"),
    [
        (["bench"], {}, "add --benchmark"),
        (
            [],
            {"benchmark": True, "benchmark_groups": "speed"},
            "choose from ops, layers, step, model, transducer",
        ),
        ([], {"benchmark": True, "numprocesses": 2}, "leave out -n"),
        ([], {"benchmark": True, "benchmark_fastdp": ROOT}, "no package fastDP there"),
    ],
)
def test_usage_errors_are_raised(
    rules: Any, monkeypatch: pytest.MonkeyPatch, paths: list[str], options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(pytest.UsageError, match=message):
        rules.pytest_configure(asked(*paths, **options))


@pytest.mark.slow
def test_plain_pytest_collects_nothing_of_bench() -> None:
    elsewhere = [
        f"--ignore=tests/{name}" for name in ("asr", "interop", "nn", "ops", "privacy")
    ]  # takes long
    there = ("tests/bench/harness/test_timer.py", ".")
    done = run("-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "-q", *elsewhere, *there)
    assert done.returncode == 0, done.stderr
    assert "tests/bench/harness/test_timer.py::" in done.stdout
    assert not [line for line in done.stdout.splitlines() if line.startswith("bench/")]


@pytest.mark.slow
def test_the_benchmarks_collect_nothing_else() -> None:
    done = run("-m", "pytest", "-p", "no:cacheprovider", "--benchmark", "--collect-only", "-q")
    found = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert found == {
        f"bench/test_{group}.py" for group in ("ops", "layers", "step", "model", "transducer", "opacus")
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench"], "add --benchmark"),
        (["--benchmark", "--benchmark-groups", "speed"], "choose from ops, layers, step, model, transducer"),
    ],
)
def test_usage_errors_name_the_mend(arguments: list[str], message: str) -> None:
    done = run("-m", "pytest", "-p", "no:cacheprovider", *arguments)
    assert done.returncode == 4
    assert message in done.stderr


@pytest.mark.slow
def test_benchmarks_do_not_share_the_cores() -> None:
    pytest.importorskip("xdist")
    done = run("-m", "pytest", "-p", "no:cacheprovider", "--benchmark", "-n", "2")
    assert done.returncode == 4
    assert "leave out -n" in done.stderr


@pytest.mark.slow
def test_the_options_are_documented() -> None:
    text = run("-m", "pytest", "--help").stdout
    assert "--benchmark  " in text or "--benchmark\n" in text
    assert "--benchmark-quick" in text


@pytest.mark.slow
def test_memory_is_measured_in_fresh_processes() -> None:
    with Server() as server:
        small = server.peak(Job("tiny-lora", "non-private", 1, 16))
        large = server.peak(Job("tiny-lora", "non-private", 8, 128))
    assert small is not None
    assert large is not None
    assert small < large


@pytest.mark.slow
def test_gpu_script_refuses_without_a_gpu_and_prints_its_parts() -> None:
    dry = run("-m", "bench.gpu.run", "--dry-run", WHEELS="some-wheels", OUT="some-folder")
    assert dry.returncode == 0, dry.stderr
    lines = dry.stdout.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["wheels", "build"]
    assert "--find-links some-wheels" in lines[0]
    assert "--no-deps --no-build-isolation ." in lines[1]
    assert {"ops", "layers", "step", "model"} <= {line.split()[0] for line in lines}
    (ranks,) = [line for line in lines if line.startswith("ranks (")]
    assert ranks.endswith("torch.distributed.run --standalone --nproc-per-node 1 -m bench.gpu.ranks")
    assert any(line.startswith("ranks-shared") and "--nproc-per-node 2" in line for line in lines)
    assert all("--benchmark-output=some-folder" in line for line in lines if "--benchmark " in line)
    assert run("-m", "bench.gpu.run", "--dry-run", "no-such-part").returncode == 2
    refused = run("-m", "bench.gpu.run", CUDA_VISIBLE_DEVICES="")
    assert refused.returncode == 2
    assert "sees no CUDA device" in refused.stderr
