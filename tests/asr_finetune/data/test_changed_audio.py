"""Recordings that are removed, cut or replaced after they were listed: never taken for what they were."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from asr_finetune.config.schema import EvaluateConfig
from asr_finetune.data.audio import decode
from asr_finetune.data.corpus import Corpus
from asr_finetune.data.utterance import AudioError, Utterance
from asr_finetune.models.recognizer import Recognizer
from asr_finetune.training.dataset import SpeechDataset
from asr_finetune.training.evaluate import evaluate
from tests.asr_finetune import small_models, tones
from tests.asr_finetune.recordings import encoded, manifest, read, utterance, write


def remove(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def replace_by_another(path: Path) -> None:
    """Of the same length: its header is no proof. The clock was set back meanwhile."""
    write(path, seed=99)
    os.utime(path, ns=(10**18, 10**18))


def replace_by_another_length(path: Path) -> None:
    """Whose time of change is the old one, as copies have it."""
    before = path.stat().st_mtime_ns
    write(path, seconds=0.7)
    os.utime(path, ns=(before, before))


CHANGES: dict[Callable[[Path], None], str] = {
    remove: "removed since it was listed",
    cut: "changed since it was listed",
    replace_by_another: "changed since it was listed",
    replace_by_another_length: "changed since it was listed",
}


@pytest.fixture
def listed(tmp_path: Path) -> Corpus:
    """Two recordings, and the first again in two pieces."""
    for name in ("a", "b"):
        write(tmp_path / f"{name}.wav")
    lines = [{"audio": f"{name}.wav", "text": "low", "id": name} for name in ("a", "b")]
    lines.append({"audio": "a.wav", "text": "low", "id": "piece", "offset": 0.1, "duration": 0.2})  # type: ignore[dict-item]
    return read(manifest(tmp_path, lines))


def by_id(corpus: Corpus) -> dict[str, Utterance]:
    return {item.id: item for item in corpus.utterances}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["a", "piece"])
def test_a_changed_file_is_not_read(
    tmp_path: Path, listed: Corpus, change: Callable[[Path], None], name: str
) -> None:
    items = by_id(listed)
    decode(items[name])
    change(tmp_path / "a.wav")
    with pytest.raises(AudioError, match=f"^{CHANGES[change]}: ") as caught:
        decode(items[name])
    assert "a.wav" in str(caught.value)
    decode(items["b"])  # the others are what they were


def test_other_bytes_in_a_table_are_not_read() -> None:
    class Row:
        content = encoded(seed=1)

        def read(self) -> bytes:
            return self.content

    from asr_finetune.data.repeats import digest

    row = Row()
    item = replace(utterance("row"), array=None, sampling_rate=None, encoded=row, digest=digest(row.content))
    decode(item)
    row.content = encoded(seed=2)
    with pytest.raises(AudioError, match=r"^changed since it was listed: "):
        decode(item)


@pytest.fixture(scope="module")
def parakeet(folders: dict[str, Path]) -> Recognizer:
    return small_models.load(folders["parakeet"])


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_recording_adds_nothing_unless_its_features_are_kept(
    tmp_path: Path, listed: Corpus, parakeet: Recognizer, change: Callable[[Path], None]
) -> None:
    kept, read_again = (SpeechDataset(listed, parakeet, cache=cache) for cache in (True, False))
    before = kept[0]
    change(tmp_path / "a.wav")
    assert all(kept[0][key] is before[key] for key in before if key != "index")
    assert not kept.problems
    batch = parakeet.collate([read_again[0], read_again[1]])
    losses = parakeet.loss_per_example(parakeet.model, batch)
    assert losses[0] == 0 < losses[1]
    assert [problem.kind for problem in read_again.problems] == [CHANGES[change]]


@pytest.mark.parametrize("change", CHANGES)
def test_an_error_rate_leaves_out_what_cannot_be_read_and_says_so(
    tmp_path: Path, parakeet: Recognizer, change: Callable[[Path], None]
) -> None:
    """Silence in a recording's place would be scored as if it were the recording."""
    corpus = read(tones.write_manifest(tmp_path, 4))
    config = EvaluateConfig(bootstrap=0, batch_size=3)
    whole = evaluate(parakeet, corpus, config)
    change(tmp_path / "tones" / "1.wav")
    rest = evaluate(parakeet, corpus, config)
    assert rest.hypotheses == [entry for entry in whole.hypotheses if entry[0] != "u1"]
    assert rest.left_out == {CHANGES[change]: 1}
    assert "on 3 of 4 utterances" in str(rest)
