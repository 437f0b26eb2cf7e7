"""Speech from text with espeak-ng, in this process: the audio of the demo and the tests, without a download.

espeak-ng comes with the `espeakng-loader` wheel (GPL: an optional extra, never vendored) and is called
through ctypes. Its state is global to the process and survives its own re-initialisation (pitch flutter,
noise generators). Each call here therefore loads the library again, behind a lock, and unloads it, so that the samples
do not depend on earlier calls.
"""

from __future__ import annotations

import _ctypes
import ctypes
import difflib
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

from asr_finetune.config.values import ConfigError
from asr_finetune.files import MissingFile, write_text
from dpkernels.errors import UserError

SAMPLING_RATE = 16_000

# From espeak-ng's speak_lib.h.
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_INITIALIZE_DONT_EXIT = 0x8000
_CHARS_UTF8 = 1
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

_NOISE_SEED = 1
_SPOKEN_AT_ONCE = 100  # sentences whose samples are in memory together
_LOCK = threading.Lock()


class SynthesisError(UserError, RuntimeError):
    """espeak-ng is not installed, or a call of it failed."""


@dataclass(frozen=True)
class Voice:
    """A voice and its settings.

    Attributes:
        name: an espeak-ng voice, with a variant after a plus sign: "en-us", "en+f3", "en-029+whisper".
        rate: words a minute, 80 to 450.
        pitch: 0 to 100.
        range: pitch range, 0 (monotone) to 100.

    Raises:
        ValueError: a value outside its limits.
    """

    name: str
    rate: int = 175
    pitch: int = 50
    range: int = 50

    def __post_init__(self) -> None:
        for key, low, high in (("rate", 80, 450), ("pitch", 0, 100), ("range", 0, 100)):
            value = getattr(self, key)
            if not low <= value <= high:
                raise ValueError(f"Voice.{key}={value}: espeak-ng takes {low} to {high}")


# Ten ordinary voices, whose recordings are public.
PUBLIC_VOICES = tuple(
    Voice(name)
    for name in (
        "en-us",
        "en-us+f2",
        "en-us+f4",
        "en-us+m2",
        "en-us+m4",
        "en-us+m7",
        "en+f3",
        "en+m3",
        "en-029+f1",
        "en-gb-x-rp+m1",
    )
)


def synthesise(texts: Sequence[str], voice: Voice) -> list[np.ndarray]:
    """Speak some texts with one voice.

    The same voice and list of texts give the same samples. (One text's samples depend a little on those
    before it in the list, as a speaker's do.)

    Args:
        texts: English.
        voice: name, rate, pitch.

    Returns:
        One float32 [n] at 16 kHz for each text, within [-1, 1].

    Raises:
        SynthesisError: espeak-ng is missing, knows no such voice, or gave no sound.
        ValueError: an empty text.
    """
    for index, text in enumerate(texts):
        if not text.strip():
            raise ValueError(f"texts[{index}]={text!r}: nothing to say")
    with _LOCK, _library() as espeak:
        pieces: list[np.ndarray] = []

        def receive(samples: Any, count: int, _events: Any) -> int:
            if samples and count > 0:
                pieces.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
            return 0  # go on

        callback = _CALLBACK(receive)  # C keeps the pointer: it has to live as long as the library is used
        rate = _start(espeak, callback)
        _choose_voice(espeak, voice)
        spoken = []
        for text in texts:
            pieces.clear()
            _speak(espeak, text)
            if not pieces:
                raise SynthesisError(f"espeak-ng gave no sound for {text!r} with {voice}")
            spoken.append(_resampled(np.concatenate(pieces), rate))
    return spoken


def write_wav(path: Path, samples: np.ndarray) -> None:
    """Write float32 [n] at 16 kHz as 16-bit PCM."""
    soundfile.write(path, samples, SAMPLING_RATE, subtype="PCM_16")


def speak(texts: Path, folder: Path, voices: int) -> tuple[Path, int]:
    """Have `voices` of the public voices say the lines of a text file: WAV files and manifest.jsonl in `folder`.

    Returns the manifest's path, and the number of recordings. The manifest is written last: where it is, they all are.

    Raises:
        FileNotFoundError: no such text file.
        ValueError: nothing to say, more voices than there are, or a folder that holds a manifest already.
        SynthesisError: as `synthesise`.
    """
    manifest = folder / "manifest.jsonl"
    if not texts.is_file():
        raise MissingFile(f"--texts {texts}: no such file: give public sentences, one a line")
    lines = [" ".join(line.split()) for line in texts.read_text(encoding="utf-8").split("\n")]
    lines = [line for line in lines if line]
    if not lines:
        raise ConfigError(f"--texts {texts}: no sentence in it")
    if not 0 < voices <= len(PUBLIC_VOICES):
        raise ConfigError(f"--voices {voices}: there are {len(PUBLIC_VOICES)}")
    if manifest.exists():
        raise ConfigError(f"{manifest} is there already: give another --output")
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, voice in enumerate(PUBLIC_VOICES[:voices]):
        for start in range(0, len(lines), _SPOKEN_AT_ONCE):
            part = lines[start : start + _SPOKEN_AT_ONCE]
            for index, (text, samples) in enumerate(zip(part, synthesise(part, voice), strict=True), start):
                name = f"{number}-{index:06d}"
                write_wav(folder / f"{name}.wav", samples)
                entries.append({"utt_id": name, "audio": f"{name}.wav", "text": text, "speaker": voice.name})
    write_text(manifest, "".join(json.dumps(entry) + "\n" for entry in entries))
    return manifest, len(entries)


@contextmanager
def _library() -> Iterator[Any]:
    """espeak-ng, newly loaded."""
    espeak = ctypes.CDLL(_files()[0])
    try:
        yield espeak
    finally:
        espeak.espeak_Terminate()
        _ctypes.dlclose(espeak._handle)


def _files() -> tuple[str, str]:
    """The paths of espeak-ng's library and data."""
    try:
        import espeakng_loader
    except ImportError as error:
        raise SynthesisError(
            "espeakng-loader is not installed, so there is no speech synthesiser; "
            "fix: pip install 'dpkernels[demo]' (or: pip install espeakng-loader)"
        ) from error
    return espeakng_loader.get_library_path(), espeakng_loader.get_data_path()


def _start(espeak: Any, callback: Any) -> int:
    """Initialise; return the synthesiser's own sampling rate."""
    data = _files()[1]
    rate = espeak.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, data.encode(), _INITIALIZE_DONT_EXIT)
    if rate <= 0:
        raise SynthesisError(
            f"espeak-ng could not start with its data in {data}; "
            "fix: pip install --force-reinstall espeakng-loader"
        )
    espeak.espeak_SetSynthCallback(callback)
    espeak.espeak_ng_SetRandSeed(ctypes.c_long(_NOISE_SEED))  # whisper and klatt voices are made of noise
    return int(rate)


def _choose_voice(espeak: Any, voice: Voice) -> None:
    language, plus, variant = voice.name.partition("+")
    known = {path.name for path in Path(_files()[1], "voices", "!v").iterdir()}
    if plus and variant not in known:  # espeak-ng would speak without it
        near = difflib.get_close_matches(variant, known, n=3, cutoff=0.3) or sorted(known)[:5]
        raise SynthesisError(
            f"voice {voice.name!r}: espeak-ng has no variant {variant!r}; fix: {', '.join(near)}, ..."
        )
    if espeak.espeak_SetVoiceByName(voice.name.encode()) != 0:
        raise SynthesisError(
            f"voice {voice.name!r}: espeak-ng knows no language {language!r}; fix: 'en', 'en-us', ..."
        )
    values = {_RATE: voice.rate, _PITCH: voice.pitch, _RANGE: voice.range, _VOLUME: 100}
    for parameter, value in values.items():
        if espeak.espeak_SetParameter(parameter, value, 0) != 0:
            raise SynthesisError(f"espeak-ng refused parameter {parameter} = {value} of {voice}")


def _speak(espeak: Any, text: str) -> None:
    encoded = text.encode()
    size = ctypes.c_size_t(len(encoded) + 1)
    none = ctypes.c_uint(0)
    status = espeak.espeak_Synth(
        encoded, size, none, ctypes.c_int(1), none, ctypes.c_uint(_CHARS_UTF8), None, None
    )
    if status != 0:
        raise SynthesisError(f"espeak-ng could not speak {text!r} (status {status})")


def _resampled(samples: np.ndarray, rate: int) -> np.ndarray:
    floats = soxr.resample(samples.astype(np.float32) / 32768.0, rate, SAMPLING_RATE)
    return np.clip(floats, -1.0, 1.0).astype(np.float32)
