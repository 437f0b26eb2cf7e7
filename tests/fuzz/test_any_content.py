"""Whatever a file holds, a reader gives what it says or an error for its user; hypothesis chooses the contents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from asr_finetune.config.schema import DataConfig
from asr_finetune.data.listings import read_listing
from asr_finetune.report.verify import read_chain
from asr_finetune.training.run_folder import RunFolder
from dpkernels.errors import UserError
from dpkernels.privacy import LedgerError
from dpkernels.privacy.accounting import ledger
from tests.fuzz.readers import SETTINGS

RUN = {"kind": "run", "format": 1, "run": "a", **SETTINGS}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
ENTRIES = st.one_of(
    st.just(RUN),
    st.just({"kind": "step", "run": "a", "step": 1}),
    st.tuples(
        st.sampled_from(["run", "carried", "step", "torn", "epsilon"]), st.sampled_from([*RUN, "steps"]), JSON
    ).map(lambda drawn: {**RUN, "steps": 1, "kind": drawn[0], drawn[1]: drawn[2]}),
    JSON,
)
some = settings(max_examples=60, deadline=None)


def chained(entries: list[Any]) -> bytes:
    """Lines of a ledger with their right hashes, of those entries that can be written."""
    previous, lines = "0" * 64, b""
    for entry in entries:
        try:
            line, previous = ledger._line(previous, entry)
        except ValueError:  # NaN, or half of a surrogate pair
            continue
        lines += line
    return lines


@settings(max_examples=25, deadline=None)
@given(st.lists(ENTRIES, max_size=5))
def test_entries_with_right_hashes(entries: list[Any]) -> None:
    data = chained(entries)
    chain = read_chain(data)
    assert chain.steps >= 0
    try:
        contents = ledger._read(data, "the ledger")
    except LedgerError as error:
        contents, said = None, str(error)
    if contents is None:
        assert said.startswith("ledger the ledger, line")
    else:
        assert contents.steps >= 0
        assert all(run.mechanism for run in contents.runs)


WHOLE = chained(
    [
        RUN,
        *({"kind": "step", "run": "a", "step": n} for n in (1, 2, 3)),
        {**RUN, "kind": "carried", "steps": 40},
    ]
)


@some
@given(st.integers(0, len(WHOLE)), st.integers(0, 3), st.binary(max_size=6))
@example(len(WHOLE) - 1, 1, b"")
@example(len(WHOLE) - 3, 3, b"x}\n")
@example(len(WHOLE) - 30, 0, b"[" * 5000)
def test_other_bytes_somewhere_in_a_ledger(place: int, removed: int, inserted: bytes) -> None:
    data = WHOLE[:place] + inserted + WHOLE[place + removed :]
    try:
        steps = ledger._read(data, "the ledger").steps
    except LedgerError:
        return
    earlier = WHOLE.startswith(data.rstrip(b"\0"))  # what a crash at an earlier moment leaves
    assert steps >= 43 or earlier, f"{steps} steps are read of 43"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@some
@given(
    st.lists(
        st.dictionaries(st.sampled_from(["audio", "text", "id", "speaker", "duration", "offset"]), JSON),
        max_size=4,
    )
)
@example([{"audio": "a" * 300, "text": "a"}])
@example([{"audio": "a\0b", "text": "a", "duration": 10**400}])
def test_any_rows_of_a_listing(folder: Path, rows: list[dict[str, Any]]) -> None:
    path = folder / "all.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for record in read_listing(path, None, DataConfig(train=str(path))):
        assert record.reason or (record.path is not None and record.text is not None)


@some
@given(st.binary(max_size=30))
@example(b"[" * 5000)
def test_any_bytes_for_a_record(folder: Path, content: bytes) -> None:
    run = RunFolder(folder)
    run.run.write_bytes(content)
    try:
        run.read_json(run.run)
        said = ""
    except UserError as error:
        said = str(error)
    assert not said or str(run.run) in said
