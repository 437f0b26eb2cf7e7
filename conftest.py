"""`pytest --benchmark`: the options of the benchmarks, and the wall between tests/ and bench/."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent
BENCH = ROOT / "bench"
GROUPS = ("ops", "layers", "step", "model", "transducer", "opacus")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Register the options; pytest-benchmark's own --benchmark-… keep their meaning."""
    group = parser.getgroup("dpkernels benchmarks")
    group.addoption(
        "--benchmark",
        action="store_true",
        default=False,
        help="run the benchmarks of bench/ (and nothing else): this package, Opacus and non-private training side "
        "by side; results go to bench/results",
    )
    group.addoption(
        "--benchmark-groups",
        metavar="NAMES",
        default=",".join(GROUPS),
        help="which of %(default)s to run; -k chooses within them (-k 'parakeet and lora')",
    )
    group.addoption(
        "--benchmark-quick",
        action="store_true",
        default=False,
        help="tiny sizes and few rounds: shows that everything works, says nothing about speed, writes no results "
        "unless --benchmark-output is given",
    )
    group.addoption(
        "--benchmark-model",
        action="store_true",
        default=False,
        help="run the 608.8 M model (group 'model') on a CPU too: one micro-batch, minutes, 10 GB; always on a GPU",
    )
    group.addoption(
        "--benchmark-device", default=None, help="cpu, cuda, cuda:1, …; default: cuda where torch sees one"
    )
    group.addoption(
        "--benchmark-fastdp",
        type=Path,
        default=None,
        metavar="FOLDER",
        help="a clone of github.com/awslabs/fast-differential-privacy, whose engine is then a contender of whole "
        "steps; write --benchmark-fastdp=FOLDER",
    )
    group.addoption(
        "--benchmark-rounds", type=int, default=11, metavar="N", help="rounds of a case; default %(default)s"
    )
    group.addoption(
        "--benchmark-seconds",
        type=float,
        default=30.0,
        metavar="S",
        help="no new round of a case after its steps took this long, if there were three; default %(default)s",
    )
    group.addoption(
        "--benchmark-output",
        type=Path,
        default=None,
        metavar="DIR",
        help="where results are written; default: bench/results. Write --benchmark-output=DIR: pytest takes a folder "
        "after a space for one of tests",
    )


def _wanted(config: pytest.Config) -> set[str]:
    given = {name.strip() for name in config.getoption("--benchmark-groups").split(",") if name.strip()}
    unknown = given - set(GROUPS)
    if unknown or not given:
        raise pytest.UsageError(
            f"--benchmark-groups={','.join(sorted(unknown or given))}: choose from {', '.join(GROUPS)}"
        )
    return given


def pytest_configure(config: pytest.Config) -> None:
    """Check the options, and point the run at bench/ where no path was given."""
    asked = [Path(str(name).partition("::")[0]).resolve() for name in config.args]
    if not config.getoption("--benchmark"):
        if config.args_source is pytest.Config.ArgsSource.ARGS and any(_in_bench(path) for path in asked):
            raise pytest.UsageError("bench/ holds benchmarks, not tests: add --benchmark")
        return
    _wanted(config)
    if config.getoption("numprocesses", None):
        raise pytest.UsageError(
            "--benchmark measures one step at a time: leave out -n, which shares the cores"
        )
    missing = [name for name in ("pytest_benchmark", "opacus") if importlib.util.find_spec(name) is None]
    if missing:
        raise pytest.UsageError(f"--benchmark needs {', '.join(missing)}: pip install '.[bench]'")
    fastdp = config.getoption("--benchmark-fastdp")
    if fastdp is not None:
        if not (fastdp / "fastDP" / "__init__.py").is_file():
            raise pytest.UsageError(
                f"--benchmark-fastdp={fastdp}: no package fastDP there; name a clone of its repository"
            )
        os.environ["DPKERNELS_FASTDP"] = str(
            fastdp.resolve()
        )  # the process that measures memory reads it, too
    if config.option.benchmark_columns is None:
        config.option.benchmark_columns = ["median", "iqr", "min", "rounds"]
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = [str(BENCH)]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Either bench/ or the rest is collected, never both."""
    benchmarks = bool(config.getoption("--benchmark"))
    if _in_bench(collection_path) != benchmarks and (collection_path.is_file() or _in_bench(collection_path)):
        return True
    if benchmarks and collection_path.suffix == ".py" and collection_path.name.startswith("test_"):
        return collection_path.stem.removeprefix("test_") not in _wanted(config) or None
    return None


def _in_bench(path: Path) -> bool:
    return path == BENCH or BENCH in path.parents
