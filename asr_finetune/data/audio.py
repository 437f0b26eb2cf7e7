"""Audio files: headers and samples, with soundfile; other sampling rates with soxr."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import soundfile
import soxr

from asr_finetune.data.repeats import digest
from asr_finetune.data.utterance import AudioError, Utterance

_UNKNOWN_FORMAT = (1, 4)  # libsndfile's errors: a container, or a coding within one, that it does not read
_UNKNOWN_SIZE = 0x7FFF0000  # such sizes are written to headers of streams, whose length is not known then
SILENT = 1e-3  # −60 dB: the largest sample of a recording in which nothing can be heard
CLIPPED = 1e-3  # share of samples at full scale; a peak that was scaled to 1 touches it in fewer
UNSCALED = 2.0  # decoders of MP3 and Ogg overshoot full scale, by less
CANCELLED = 0.1  # loudness of the channels' mean over theirs: 0.7 where they are unrelated
HEADER_TOLERANCE = 0.1  # seconds, since an MP3's header counts padding that the decoder drops


def duration(source: Path | bytes) -> float:
    """Seconds of audio, from the file's header; see `header`."""
    return header(source)[0]


def header(source: Path | bytes) -> tuple[float, str]:
    """(seconds of audio, what is in doubt about them or "") from the file's header; nothing is decoded.

    Raises:
        AudioError: the file does not exist, is empty, has no samples, or has a format that libsndfile cannot read.
    """
    if isinstance(source, Path):
        if not source.is_file():
            raise AudioError(f"no such file: {source}")
        size = source.stat().st_size
    else:
        size = len(source)
    if size == 0:
        raise AudioError("the file is empty (0 bytes)")
    try:
        info = soundfile.info(str(source) if isinstance(source, Path) else io.BytesIO(source), verbose=True)
    except soundfile.LibsndfileError as error:
        convert = ""
        if error.code in _UNKNOWN_FORMAT:
            name = source.name if isinstance(source, Path) else "FILE"
            convert = f" If it is sound (m4a, aac, wma, webm, ...), convert it: ffmpeg -i {name} {name}.flac"
        raise AudioError(_unreadable(error) + convert) from error
    doubt = _cut_short(info.extra_info)
    if info.format == "NIST":  # the log has no sizes, the header has text
        with source.open("rb") if isinstance(source, Path) else io.BytesIO(source) as file:
            stated = re.search(rb"sample_count -i (\d+)", file.read(1024))
        if stated is not None and info.frames < int(stated[1]):
            doubt = f"cut short: {info.frames} of the {int(stated[1])} samples that its header states"
    if info.frames <= 0 or info.samplerate <= 0:
        raise AudioError(f"no samples in the file{doubt and f' ({doubt})'}")
    return float(info.frames / info.samplerate), doubt


def stamp(path: Path) -> tuple[int, int]:
    """Size and time of change (ns) of a file. They are compared for equality only, so that no clock has to be right."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _check_unchanged(utterance: Utterance) -> None:
    """Raise AudioError if the file of an utterance was removed or replaced since it was listed."""
    if utterance.path is None or utterance.stamp is None:
        return
    try:
        changed = stamp(utterance.path) != utterance.stamp
    except FileNotFoundError as error:
        raise AudioError(f"removed since it was listed: {utterance.path}") from error
    except OSError as error:
        raise AudioError(f"unreadable audio: {error}") from error
    if changed:
        raise AudioError(f"changed since it was listed: {utterance.path} has another size or time of change")


def _cut_short(log: str) -> str:
    """What libsndfile's log of a header says about an end that is missing; "" if nothing is."""
    for stated, found in re.findall(r": (\d+) \(should be (\d+)\)", log):
        if int(found) + 1 < int(stated) < _UNKNOWN_SIZE:
            return f"cut short: {found} of the {stated} bytes that its header states"
    return "cut short: its last Ogg page is missing" if "lacks an end-of-stream bit" in log else ""


def _unreadable(error: soundfile.LibsndfileError) -> str:
    return f"unreadable audio: {error.error_string or f'libsndfile error {error.code}'}"


def read_audio(utterance: Utterance, rate: int) -> np.ndarray:
    """The samples of an utterance: one channel, at `rate` Hz.

    Channels are averaged; samples at another rate are resampled with soxr (high quality).

    Args:
        utterance: with samples (`array`, [n] or [n, channels]), or a file (`path`), or `encoded` bytes.
        rate: samples per second of the result.

    Returns:
        [n] float32, contiguous, full scale ±1.

    Raises:
        AudioError: see `decode`.
    """
    samples, original_rate = decode(utterance)
    if original_rate != rate:
        samples = soxr.resample(samples, original_rate, rate, quality="HQ")
    return np.ascontiguousarray(samples, dtype=np.float32)


def decode(utterance: Utterance) -> tuple[np.ndarray, int]:
    """The samples of an utterance, [n] float32, one channel, and their rate.

    What is doubtful in them is noted in `utterance.doubts`, if nothing is noted there yet.

    Raises:
        AudioError: the recording cannot be decoded, is empty or shorter than stated in its header, holds NaN or
            infinite samples, or was removed or replaced since it was listed.
    """
    if utterance.array is not None:
        if utterance.sampling_rate is None:
            raise AudioError("samples are given without a sampling_rate")
        samples, rate = np.asarray(utterance.array), utterance.sampling_rate
        if np.issubdtype(samples.dtype, np.integer):
            samples = samples / float(np.iinfo(samples.dtype).max + 1)
    else:
        if utterance.encoded is not None:
            try:
                content = utterance.encoded.read()
            except OSError as error:
                raise AudioError(f"unreadable audio: {error}") from error
            if utterance.digest is not None and digest(content) != utterance.digest:
                raise AudioError("changed since it was listed: its bytes are others")
            file: str | io.BytesIO = io.BytesIO(content)
        elif utterance.path is not None:
            _check_unchanged(utterance)
            file = str(utterance.path)
        else:
            raise AudioError("no audio: neither samples nor a file")
        try:
            frames: dict[str, int] = {}
            if utterance.piece is not None:
                rate = soundfile.info(file).samplerate
                frames = dict(
                    zip(("start", "stop"), (round(time * rate) for time in utterance.piece), strict=True)
                )
            samples, rate = soundfile.read(file, dtype="float32", **frames)
        except soundfile.LibsndfileError as error:
            raise AudioError(_unreadable(error)) from error
        if len(samples) / rate < utterance.seconds - HEADER_TOLERANCE:
            raise AudioError(
                f"cut short: {len(samples) / rate:.3f} s of the {utterance.seconds:.3f} s stated in its header"
            )
    samples = samples.astype(np.float32, copy=False)
    if samples.size == 0:
        raise AudioError("no samples in the file")
    if not np.isfinite(samples).all():
        raise AudioError("holds NaN or infinite samples")
    mono = samples.mean(axis=1) if samples.ndim == 2 else samples
    doubt = "" if utterance.doubts else _doubt(samples, mono)
    if doubt:
        utterance.doubts.append(doubt)
    return mono, int(rate)


def _doubt(samples: np.ndarray, mono: np.ndarray) -> str:
    """What is doubtful in samples [n] or [n, channels] with their mean over channels [n]; "" if nothing is."""
    peak = float(np.abs(samples).max())
    if peak < SILENT:
        return f"silent: its largest sample is {peak:.2g} of full scale"
    if peak > UNSCALED:
        return f"not scaled: its largest sample is {peak:.6g}, where full scale is 1"
    clipped = float((np.abs(samples) >= 0.999).mean())
    if clipped > CLIPPED:
        return f"clipped: {clipped:.1%} of its samples are at full scale"
    left = float(np.sqrt(np.mean(mono**2) / np.mean(samples**2)))
    if left < CANCELLED:
        return f"channels in antiphase: their mean, which is used, has {left:.1%} of their loudness"
    return ""
