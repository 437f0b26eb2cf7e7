"""What each LibriSpeech recipe takes on this GPU: seconds of a step, hours of the run, peak memory.

    python -m bench.asr.recipes                                     all of them; $OUT/<device>/recipes.json
    python -m bench.asr.recipes --predict-only --output predicted.json     on any machine, minutes; then, with a GPU,
    python -m bench.asr.recipes --predicted predicted.json --recipes parakeet_lora --dtypes bfloat16

The recipe's own model at full size (random weights), method, optimizer, strategy, micro-batches and private step,
through `asr_finetune.training.setup.make_private`. Utterances have LibriSpeech-like lengths (`bench.asr.data`), and
features and labels of noise that are in memory: reading audio is measured by `bench.asr.data`. Two logical steps of
`--batch` utterances are drawn from 281,241; the second is timed. Hours = steps · (batch / rate + what noise and update
take). Peak: a micro-batch of the recipe's size of the longest utterances, beside what `asr_finetune.planning.memory`
predicts. FLOPs are of the model's own products, convolutions and attention, forward and backward, for an utterance of
mean length.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

from asr_finetune.config.schema import Config
from asr_finetune.config.yaml_io import load_yaml
from asr_finetune.console import Reporter
from asr_finetune.models.alphabets import CHARACTERS, ctc_tokenizer
from asr_finetune.models.ctc import CTCRecognizer
from asr_finetune.models.methods import apply_method
from asr_finetune.models.recognizer import Recognizer, trained_parameters
from asr_finetune.models.transducer import TransducerRecognizer
from asr_finetune.planning.memory import losses_of
from asr_finetune.training.setup import make_optimizer, make_private, prepare_blocks
from bench.asr.data import LONGEST, MEAN_SECONDS, librispeech_like_seconds
from bench.harness.machine import about
from bench.harness.results import FOLDER
from dpkernels import PrivacyEngine
from dpkernels.memory import MemoryEstimator
from dpkernels.precision import DTYPES, no_tf32
from dpkernels.privacy import Ranks

RECIPES = [
    f"{model}_{kind}"
    for model in ("parakeet", "wav2vec2_bert")
    for kind in ("lora", "dp_rp", "bitfit", "full")
]
RECIPES += ["parakeet_tdt_lora", "parakeet_tdt_new_decoder", "omniasr_ctc_lora", "lasr_ctc_lora"]
UTTERANCES = 281_241
SEED = 20
# Frames of features, and labels, in a second of speech: Parakeet's 10 ms, word pieces; Wav2Vec2-BERT's 20 ms, letters;
# OmniASR's samples, letters; LASR's 10 ms, word pieces.
_FRAMES = {
    "parakeet_ctc": 100,
    "parakeet_tdt": 100,
    "wav2vec2-bert": 50,
    "omniasr_ctc": 16_000,
    "lasr_ctc": 100,
}
_LABELS = {"parakeet_ctc": 4, "parakeet_tdt": 4, "wav2vec2-bert": 15, "omniasr_ctc": 15, "lasr_ctc": 4}
_WIDTH = {
    "parakeet_ctc": (80,),
    "parakeet_tdt": (80,),
    "wav2vec2-bert": (160,),
    "omniasr_ctc": (),
    "lasr_ctc": (128,),
}

Entry = dict[str, Any]


class Noise(Dataset[dict[str, Tensor]]):
    """Utterances of given lengths: views of one stretch of noise, so that drawing a logical batch takes no time."""

    corpus = None  # asked for by `unit: speaker` only

    def __init__(self, kind: str, seconds: np.ndarray) -> None:
        generator = torch.Generator().manual_seed(SEED)
        longest = float(seconds.max())
        self._frames = np.maximum((seconds * _FRAMES[kind]).astype(int), 2)
        self._labels = np.maximum((seconds * _LABELS[kind]).astype(int), 1)
        self._features = torch.randn(int(longest * _FRAMES[kind]) + 2, *_WIDTH[kind], generator=generator)
        self._text = torch.randint(2, 30, (int(longest * _LABELS[kind]) + 2,), generator=generator)

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        features, labels = self._features[: self._frames[index]], self._text[: self._labels[index]]
        return {"input_features" if features.dim() == 2 else "input_values": features, "labels": labels}

    def lengths(self, recognizer: Recognizer) -> list[int]:
        """Encoder frames of each."""
        frames: list[int] = recognizer.frames(torch.from_numpy(self._frames)).tolist()
        return frames


def full_size(name: str) -> Any:
    """The model of a recipe's `model.name`, with its own configuration and random weights."""
    config: Any
    if "w2v-bert" in name:
        classes = len(ctc_tokenizer(CHARACTERS, "characters"))
        config, kind = (
            transformers.Wav2Vec2BertConfig(vocab_size=classes, pad_token_id=0),
            "Wav2Vec2BertForCTC",
        )
    elif "tdt" in name:
        config, kind = transformers.ParakeetTDTConfig(), "ParakeetForTDT"
    elif "omniasr" in name:
        config, kind = transformers.OmniASRCTCConfig(), "OmniASRForCTC"
    elif "medasr" in name:
        config, kind = transformers.LasrCTCConfig(), "LasrForCTC"
    else:
        config, kind = transformers.ParakeetCTCConfig(), "ParakeetForCTC"
    model_class = getattr(transformers, kind)
    config._attn_implementation = "sdpa" if model_class._supports_sdpa else "eager"
    return model_class(config)


def recogniser(config: Config, device: str) -> Recognizer:
    """The recipe's model, its method applied."""
    no_tf32()  # as a recogniser that is loaded
    with torch.device(device):
        torch.manual_seed(SEED)
        # `to`: torch.Tensor(n), in some constructors, is on the CPU whatever the context
        model = full_size(config.model.name).to(device)
        for module in model.modules():
            # transformers' N(0, 0.02) lets the signal vanish in the subsampling: the self-check compared rounding
            if isinstance(module, nn.Conv1d | nn.Conv2d):
                module.reset_parameters()
        names = ["input_features", "attention_mask"]
        extractor: Any = SimpleNamespace(sampling_rate=16_000, model_input_names=names)
        if "omniasr" in config.model.name:
            extractor = transformers.OmniASRFeatureExtractor()
        processor = SimpleNamespace(feature_extractor=extractor, tokenizer=None)
        kind = TransducerRecognizer if "tdt" in config.model.name else CTCRecognizer
        recognizer = kind(
            model,
            processor,
            name=config.model.name,
            new_head=config.model.new_head,
            dtype=DTYPES[config.model.dtype],
        )
        apply_method(recognizer, config.method)
    # What the inputs learn from the extractor they learn now: a prediction's tensors have no values.
    recognizer.inputs.arguments(
        recognizer.collate([Noise(model.config.model_type, np.array([1.0]))[0]]), torch.float32
    )
    recognizer.model.train()
    return recognizer


def predict(config: Config, recognizer: Recognizer, target: Any) -> Entry:
    """The planner's peak of a micro-batch of the longest utterances; the model's own FLOPs for one of mean length."""
    longest, typical = Noise(recognizer.base.config.model_type, np.array([LONGEST, MEAN_SECONDS]))
    with MemoryEstimator(
        recognizer.model,
        strategy=config.privacy.strategy,
        optimizer=config.train.optimizer,
        target=target,
        checkpointing=config.train.checkpointing,
    ) as stage:
        peak = stage.peak(losses_of(recognizer, longest), config.train.physical_batch_size)
        with FlopCounterMode(display=False) as counter:
            stage.peak(losses_of(recognizer, typical), 1)
    return {
        "trained": trained_parameters(recognizer.model),
        "predicted": peak.total,
        "flops": counter.get_total_flops(),
    }


def private_run(
    config: Config, recognizer: Recognizer, data: Noise, batch: int
) -> tuple[PrivacyEngine, Any, Any]:
    """A private run of two logical steps of `batch` expected utterances, as `train` prepares it."""
    drawn = replace(config, train=replace(config.train, batch_size=batch, num_workers=0))
    prepare_blocks(config.train, recognizer, Reporter(False))
    plain = make_optimizer(config.train, recognizer.model)
    lengths = data.lengths(recognizer)
    return make_private(drawn, recognizer, plain, data, lengths, Reporter(False), None, 2, Ranks())  # type: ignore[arg-type]


def measure_peak(config: Config, device: str) -> Entry:
    """Allocated and reserved bytes at the highest point of the second of two steps, weights included."""
    size = config.train.physical_batch_size
    _clear(device)
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    recognizer = recogniser(config, device)
    data = Noise(recognizer.base.config.model_type, np.full(size, LONGEST))
    engine, optimizer, loader = private_run(
        config.with_values("train", fill_micro_batches=False), recognizer, data, size
    )
    with closing(engine):
        for parts in loader:
            _clear(device)
            _backward(recognizer, optimizer, list(parts))
            optimizer.step()
            optimizer.zero_grad()
    if device != "cuda":
        return {}
    peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {"measured": peaks[0] - before, "reserved": peaks[1] - before}


def measure_time(config: Config, device: str, batch: int) -> Entry:
    """Rate of forward and private backward, seconds of noise and update, of a step of a private run."""
    _clear(device)
    recognizer = recogniser(config, device)
    data = Noise(recognizer.base.config.model_type, librispeech_like_seconds(UTTERANCES))
    engine, optimizer, loader = private_run(config, recognizer, data, batch)
    figures: Entry = {}
    with closing(engine):
        figures |= _self_check(engine, recognizer, data)
        for parts in loader:  # two: the last one's times stay
            batches = list(parts)
            spent = _seconds(lambda batches=batches: _backward(recognizer, optimizer, batches), device)
            update = _seconds(optimizer.step, device)
            optimizer.zero_grad()
        stats = optimizer.last_step
    micro = [tuple(part["labels"].shape) for part in batches]
    examples = sum(size for size, _ in micro)
    assert stats.non_finite == 0
    return figures | {
        "examples": examples,
        "micro_batches": len(micro),
        "largest": max(size for size, _ in micro),
        "rate": round(examples / spent, 1),
        "step_seconds": round(update, 4),
        "hours": round(config.train.steps * (config.train.batch_size * spent / examples + update) / 3600, 2),
    }


def _backward(recognizer: Recognizer, optimizer: Any, batches: Sequence[dict[str, Tensor]]) -> None:
    for batch in batches:
        optimizer.backward(recognizer.loss_per_example(recognizer.model, batch))


def _self_check(engine: PrivacyEngine, recognizer: Recognizer, data: Noise) -> Entry:
    places = (0, 1, 2)
    singles = [recognizer.collate([data[place]]) for place in places]
    began = time.perf_counter()
    with recognizer.in_float32():
        report = engine.self_check(
            recognizer.loss_per_example,
            recognizer.collate([data[place] for place in places]),
            singles=singles,
        )
    return {
        "self_check_error": report.differences[0].error,
        "self_check_seconds": round(time.perf_counter() - began, 1),
    }


def _seconds(function: Callable[[], object], device: str) -> float:
    if device == "cuda":  # and the allocator keeps what it has: asking CUDA for it again would be timed
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _clear(device: str) -> None:
    """Nothing under way, nothing left of the one before, and the peak begins here."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def of(name: str, dtype: str, options: argparse.Namespace, known: Entry) -> Entry:
    """One recipe in one type; `known`: what `predict` found before."""
    config = Config.from_dict({**load_yaml(name), "output": "unused"})
    config = config.with_values("model", dtype=dtype)
    # Calibration takes seconds and changes no time; the recipe's head has the accountant's.
    config = config.with_values("privacy", epsilon=None, noise_multiplier=0.7)
    train = config.train
    row: Entry = {
        "recipe": name,
        "dtype": dtype,
        "strategy": config.privacy.strategy,
        "checkpointing": train.checkpointing,
        "physical_batch_size": train.physical_batch_size,
        "batch_size": train.batch_size,
        "steps": train.steps,
    }
    row |= known or predict(config, recogniser(config, "meta"), "cuda")
    if not options.predict_only:
        row |= _or_reason(lambda: measure_peak(config, options.device))
        if "measured" in row:
            row["error"] = round(row["predicted"] / row["measured"] - 1, 4)
        row |= _or_reason(lambda: measure_time(config, options.device, options.batch))
    return row


def _or_reason(measure: Callable[[], Entry]) -> Entry:
    try:
        return measure()
    except torch.OutOfMemoryError as error:
        return {"reason": str(error).splitlines()[0]}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.asr.recipes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--recipes", nargs="+", default=RECIPES, choices=RECIPES, metavar="RECIPE")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=sorted(DTYPES))
    parser.add_argument("--batch", type=int, default=512, help="utterances in a timed step")
    parser.add_argument("--predict-only", action="store_true", help="memory only, for CUDA, with no device")
    parser.add_argument("--predicted", type=Path, help="rows of an earlier --predict-only")
    parser.add_argument("--output", type=Path, help="JSON file; default: recipes.json of the device in $OUT")
    options = parser.parse_args(arguments)
    facts = about("cpu" if options.predict_only else options.device)
    path: Path = options.output or Path(os.environ.get("OUT", str(FOLDER))) / facts["slug"] / "recipes.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(options.predicted.read_text())["rows"] if options.predicted else []
    known = {
        (row["recipe"], row["dtype"]): {key: row[key] for key in ("trained", "predicted", "flops")}
        for row in before
    }
    rows = []
    for name in options.recipes:
        for dtype in options.dtypes:
            rows.append(of(name, dtype, options, known.get((name, dtype), {})))
            print(json.dumps(rows[-1]), flush=True)
            # one by one: what was measured stays when the next one fails
            path.write_text(json.dumps({"about": facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
