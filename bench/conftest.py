"""The `bench` fixture, and the output at the end of a run: results files and the table of ratios."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

from bench.harness.results import FOLDER, Results
from bench.harness.session import Bench
from bench.harness.table import show

_KEY = pytest.StashKey[Bench]()


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """This run."""
    config = request.config
    device = config.getoption("--benchmark-device") or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        pytest.exit(f"--benchmark-device={device}: torch sees no CUDA device here", returncode=4)
    on_gpu = device.startswith("cuda")
    run = Bench(
        config,
        device,
        torch.bfloat16 if on_gpu else torch.float32,
        quick=config.getoption("--benchmark-quick"),
        rounds=2 if config.getoption("--benchmark-quick") else config.getoption("--benchmark-rounds"),
        seconds=config.getoption("--benchmark-seconds"),
        model=on_gpu or config.getoption("--benchmark-model"),
    )
    config.stash[_KEY] = run
    yield run
    run.close()


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Hide libraries' warnings about hooks and deprecations below the tables; in tests/ this package's are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def pytest_sessionfinish(session: pytest.Session) -> None:
    run = session.config.stash.get(_KEY, None)
    folder = session.config.getoption("--benchmark-output")
    if run is None or (run.quick and folder is None):
        return
    for results in run.results.values():
        results.save(folder or FOLDER)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    run = config.stash.get(_KEY, None)
    if run is None:
        return
    for results in run.results.values():
        terminalreporter.section(f"dpkernels benchmarks: {results.group}")
        terminalreporter.write(show(results))
    terminalreporter.write_line(_where(config, list(run.results.values())))
    count = sum(len(results.disturbed()) for results in run.results.values())
    if count and not run.quick:
        message = f"{count} of the tables are WORTH NOTHING, as each says: run them again on an idle machine"
        terminalreporter.write_line(message, red=True, bold=True)


def _where(config: pytest.Config, results: list[Results]) -> str:
    if config.getoption("--benchmark-quick") and config.getoption("--benchmark-output") is None:
        return "--benchmark-quick: figures mean nothing, and none were written"
    folder = config.getoption("--benchmark-output") or "bench/results"
    files = ", ".join(f"{r.about['slug']}/{r.group}.json" for r in results)
    return f"written to {folder}: {files}; python -m bench.reports.report writes the pages and the plots"
