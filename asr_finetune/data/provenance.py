"""The recordings of a run: their keyed fingerprint, exact figures for the data's holder, shared recordings."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections import defaultdict
from typing import Any

from asr_finetune.data.corpus import Corpus
from asr_finetune.data.repeats import digest
from asr_finetune.data.utterance import AudioError, Utterance


def fingerprint(corpus: Corpus, key: bytes) -> str:
    """HMAC-SHA-256 (hex) of the utterances' ids, transcripts, speakers and durations, in order.

    The audio itself is not read. The fingerprint proves which corpus a run used to those who have the corpus and the
    key. Without the key nobody can test a guess about a record against it.
    """
    digest = hmac.new(key, digestmod=hashlib.sha256)
    for item in corpus.utterances:
        record = [item.id, item.text, item.speaker, round(item.seconds, 3)]
        digest.update(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def figures(corpus: Corpus) -> dict[str, Any]:
    """Exact statistics of a corpus: NOT PRIVATE if the corpus is private."""
    speakers = len(set(corpus.speakers) - {None})
    return {
        "utterances": len(corpus),
        "hours": corpus.hours,
        "speakers": speakers,
        "utterances_per_speaker": len(corpus) / speakers if speakers else None,
        "left_out": len(corpus.problems),
    }


def shared_recordings(first: Corpus, other: Corpus) -> list[str]:
    """Ids in `other` of the recordings that `first` holds too, or a piece of.

    Two recordings are the same if they are one file, have equal bytes, or have the same id, transcript and length (to
    10 ms), like a copy in another format. Of an utterance that is a piece of a file the whole file counts. Bytes are
    read only if their number is equal.
    """
    paths = {item.path.resolve() for item in first.utterances if item.path is not None}
    names = {_name(item) for item in first.utterances}
    sizes: dict[int | None, dict[Any, Utterance]] = defaultdict(dict)
    for item in first.utterances:
        sizes[_size(item)].setdefault(item.path or id(item), item)  # a file once, whatever pieces it has
    contents: dict[int, set[bytes | None]] = {}
    shared = []
    for item in other.utterances:
        same = (item.path is not None and item.path.resolve() in paths) or _name(item) in names
        size = None if same else _size(item)
        if size is not None and size in sizes:
            if size not in contents:
                contents[size] = {_content(of_same_size) for of_same_size in sizes[size].values()} - {None}
            same = _content(item) in contents[size]
        if same:
            shared.append(item.id)
    return shared


def of_speakers(first: Corpus, other: Corpus) -> list[str]:
    """Ids in `other` of the recordings of speakers of `first`, by the speakers' names."""
    speakers = set(first.speakers) - {None}
    return [item.id for item in other.utterances if item.speaker in speakers]


def _name(item: Utterance) -> tuple[str, str, float]:
    return item.id.removeprefix(item.origin), item.text, round(item.seconds, 2)


def _size(item: Utterance) -> int | None:
    """The number of bytes of an utterance's stored audio; None if it cannot be read."""
    if item.stamp is not None:
        return item.stamp[0]
    try:
        if item.path is not None:
            return item.path.stat().st_size
        content = _stored(item)
    except (AudioError, OSError):
        return None
    return None if content is None else len(content)


def _content(item: Utterance) -> bytes | None:
    """The digest of an utterance's stored audio; None if it cannot be read."""
    if item.digest is not None:
        return item.digest
    try:
        content = _stored(item)
    except (AudioError, OSError):
        return None
    return None if content is None else digest(content)


def _stored(item: Utterance) -> bytes | None:
    if item.path is not None:
        return item.path.read_bytes()
    if item.encoded is not None:
        return item.encoded.read()
    return None if item.array is None else item.array.tobytes()
