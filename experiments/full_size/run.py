"""Clipped sums of the whole 608.8 M and 580.5 M models against gradients taken one utterance at a time.

    python experiments/full_size/run.py [parakeet] [wav2vec2-bert] [--blocks 24] [--methods full lora]
    python experiments/full_size/run.py parakeet_tdt parakeet_rnnt --dtype float32

The real configurations with random weights, in float64, so that a fault in any one parameter shows, however small its
gradient is; float32 takes half the memory. Three utterances of unlike lengths go through one private backward in which
every parameter is trained, with the real CTC or transducer loss; what it would add to the sums is compared with
Σ_i min(1, C/‖g_i‖)·g_i of the utterances alone (no batch, no padding, torch's own layers), and so is the same batch
with half as much padding again. Gradients are compared a few hundred megabytes at a time: everything at once would not
fit into the 10 GB this takes.

results.json holds the largest errors by kind of parameter; README.md says what they show.
`tests/asr_finetune/models/test_real_widths.py` runs two blocks of it.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import resource
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from asr_finetune.config.schema import MethodConfig
from asr_finetune.models.loading import CTCRecognizer, Recognizer, TransducerRecognizer
from asr_finetune.models.methods import apply_method
from asr_finetune.models.recognizer import trained_parameters
from dpkernels import __version__, ops
from dpkernels.nn import Record, attach, detach, swap, unswap
from dpkernels.privacy.step.clipping import total_norm_sq

RATE = 16_000
FRAMES = {
    "parakeet": (96, 72, 49),
    "parakeet_tdt": (96, 72, 49),
    "parakeet_rnnt": (96, 72, 49),
    "wav2vec2-bert": (40, 31, 22),
}  # of features: about half a second to a second
LABELS = (4, 3, 2)
# LoRA on every linear layer and every pointwise convolution there is.
_PARAKEET = (
    "q_proj k_proj v_proj o_proj relative_k_proj linear1 linear2 linear pointwise_conv1 pointwise_conv2"
)
_TRANSDUCER = f"{_PARAKEET} encoder_projector decoder_projector"
TARGETS = {
    "parakeet": _PARAKEET,
    "parakeet_tdt": _TRANSDUCER,
    "parakeet_rnnt": _TRANSDUCER,
    "wav2vec2-bert": "linear_q linear_k linear_v linear_out intermediate_dense output_dense projection lm_head "
    "pointwise_conv1 pointwise_conv2",
}
CHUNK = 48_000_000  # parameters whose gradients are held at once
# A gradient that is exactly 0 in mathematics (attention's key bias: softmax does not see it) comes out as rounding; no
# error is taken relative to less than this share of the whole.
FLOOR = 1e-9


def recognizer_of(family: str, blocks: int = 24, dtype: torch.dtype = torch.float64) -> Recognizer:
    """The real configuration with `blocks` of its 24 blocks and random weights that all matter."""
    none = dict.fromkeys(("attention_dropout", "activation_dropout", "layerdrop"), 0.0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(0)
        if family.startswith("parakeet"):
            encoder = {"num_hidden_layers": blocks, "dropout": 0.0, "dropout_positions": 0.0, **none}
            kind = family.partition("_")[2].upper() or "CTC"
            config: Any = getattr(transformers, f"Parakeet{kind}Config")(encoder_config=encoder)
            config._attn_implementation = "sdpa"
            model: Any = getattr(transformers, f"ParakeetFor{kind}")(config)
        else:
            more = dict.fromkeys(
                ("hidden_dropout", "feat_proj_dropout", "conformer_conv_dropout", "final_dropout"), 0.0
            )
            config = transformers.Wav2Vec2BertConfig(
                vocab_size=32, num_hidden_layers=blocks, apply_spec_augment=False, **none, **more
            )
            config._attn_implementation = "sdpa"
            model = transformers.Wav2Vec2BertForCTC(config)
    finally:
        torch.set_default_dtype(default)
    randomise(model)
    # The recogniser's own path from features to losses; no audio or text is made, so it needs no processor.
    names = ["input_features", "attention_mask"]
    extractor = SimpleNamespace(sampling_rate=RATE, model_input_names=names)
    processor = SimpleNamespace(feature_extractor=extractor, tokenizer=None)
    recognizer = TransducerRecognizer if family in ("parakeet_tdt", "parakeet_rnnt") else CTCRecognizer
    return recognizer(model.train(), processor, name=family)


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Weights that keep a signal's size, biases and gains that matter, batch statistics that are not 0 and 1."""
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or "bias_" in name:
            parameter.normal_(mean=float("norm" in name and name.endswith("weight")), std=0.2)
        else:
            parameter.normal_(std=(parameter.numel() / len(parameter)) ** -0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
        elif name.endswith("running_mean"):
            buffer.normal_(std=0.2)


def utterances(recognizer: Recognizer, frames: Sequence[int]) -> list[dict[str, Any]]:
    """Features of noise with made-up transcripts."""
    generator = torch.Generator().manual_seed(0)
    config = recognizer.base.config
    mels = getattr(config, "feature_projection_input_dim", None) or config.encoder_config.num_mel_bins
    return [
        {
            recognizer.input_name: torch.randn(length, mels, generator=generator),
            "labels": torch.randint(1, 30, (labels,), generator=generator),
            "index": index,
        }
        for index, (length, labels) in enumerate(zip(frames, LABELS, strict=True))
    ]


def padded(recognizer: Recognizer, batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with half as many frames again, all of them padding."""
    more = batch["attention_mask"].shape[1] // 2
    features = nn.functional.pad(batch[recognizer.input_name], (0, 0, 0, more))
    return {
        **batch,
        recognizer.input_name: features,
        "attention_mask": nn.functional.pad(batch["attention_mask"], (0, more)),
    }


def private(recognizer: Recognizer, batch: dict[str, Any], *, mixed: bool = False) -> list[Record]:
    """The records of one private backward."""
    model = swap(recognizer.model)
    tape = attach(model, mixed=mixed)
    try:
        losses = recognizer.loss_per_example(model, batch)
        tape.open(len(losses))
        losses.sum().backward()
        return tape.close()
    finally:
        tape.discard()
        detach(model)
        unswap(model)


def chunks(records: Sequence[Record]) -> Iterator[list[int]]:
    """Places of the records, a part of at most CHUNK parameters at a time."""
    part: list[int] = []
    held = 0
    for place, record in enumerate(records):
        size = sum(parameter.numel() for parameter in record.parameters)
        if part and held + size > CHUNK:
            yield part
            part, held = [], 0
        part.append(place)
        held += size
    yield part


def kind(name: str) -> str:
    """`encoder.layers.*.conv.norm.weight` for that of any block."""
    return re.sub(r"\.\d+\.", ".*.", name.replace("base_model.model.", "").replace(".default", ""))


def check(recognizer: Recognizer, frames: Sequence[int]) -> dict[str, Any]:
    """What a private backward over everything that is trained says, against one utterance at a time.

    Returns norms (ours over exact) and, by kind of parameter, the largest ‖ours − exact‖ / ‖exact‖ of the clipped
    sums, batched and batched with more padding.
    """
    model, items = recognizer.model, utterances(recognizer, frames)
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    batch = recognizer.collate(items)
    runs = {"batch": private(recognizer, batch), "padded": private(recognizer, padded(recognizer, batch))}
    covered = [parameter for record in runs["batch"] for parameter in record.parameters]
    unrecorded = sorted(names[parameter] for parameter in names.keys() - set(covered))
    twice = len(covered) - len(set(covered))
    device = torch.device("cpu")
    with torch.no_grad():
        norms_sq = {run: total_norm_sq(records, len(items), device) for run, records in runs.items()}
    bound = 0.9 * float(norms_sq["batch"].sqrt().median())  # the middle one is clipped
    factors = ops.clip_factors(norms_sq["batch"], bound)
    exact_sq = torch.zeros(len(items), dtype=torch.float64)
    compared: list[tuple[str, str, int, float, dict[str, float]]] = []
    order = {record.layer + kind(names[record.parameters[0]]): record for record in runs["padded"]}
    for part in chunks(runs["batch"]):
        here = [runs["batch"][place] for place in part]
        parameters = [parameter for record in here for parameter in record.parameters]
        expected, own_sq = one_by_one(recognizer, items, parameters, factors.double(), exact_sq)
        again = [order[record.layer + kind(names[record.parameters[0]])] for record in here]
        errors: dict[str, dict[nn.Parameter, float]] = {}
        for run, records in (("batch", here), ("padded", again)):
            errors[run] = {}
            for record in records:
                sums = {p: torch.zeros(p.shape, dtype=torch.float64) for p in record.parameters}
                record.add_weighted_sum(factors, sums)
                for parameter, total in sums.items():
                    errors[run][parameter] = float((total - expected[parameter]).norm())
        for record in here:
            for parameter in record.parameters:
                found = {run: errors[run][parameter] for run in errors}
                size = own_sq[parameter] ** 0.5
                compared.append(
                    (kind(names[parameter]), type(record).__name__, parameter.numel(), size, found)
                )
    whole = float((factors.double().square() * exact_sq).sum().sqrt())
    table: dict[str, dict[str, Any]] = {}
    for name, rule, entries, size, found in compared:
        row = table.setdefault(
            name, {"rule": rule, "tensors": 0, "parameters": 0, "batch": 0.0, "padded": 0.0}
        )
        row["tensors"] += 1
        row["parameters"] += entries
        for run, error in found.items():
            row[run] = max(row[run], error / max(size, FLOOR * whole))
    ratio = (norms_sq["batch"].double() / exact_sq).sqrt()
    return {
        "parameters": trained_parameters(model),
        "compared": sum(row["parameters"] for row in table.values()),
        "unrecorded": unrecorded,
        "recorded_twice": twice,
        "max_grad_norm": bound,
        "factors": factors.tolist(),
        "norm_over_exact": [float(ratio.min()), float(ratio.max())],
        "padded_norm_over_norm": [float(x) for x in (norms_sq["padded"] / norms_sq["batch"]).sqrt()],
        "worst": {run: max(row[run] for row in table.values()) for run in ("batch", "padded")},
        "kinds": table,
    }


def one_by_one(
    recognizer: Recognizer,
    items: Sequence[dict[str, Any]],
    parameters: list[nn.Parameter],
    factors: Tensor,
    exact_sq: Tensor,
) -> tuple[dict[nn.Parameter, Tensor], dict[nn.Parameter, float]]:
    """Σ_i c_i g_i, and Σ_i c_i² ‖g_i‖², of these parameters; ‖g_i‖² is added to `exact_sq`."""
    expected = {p: torch.zeros_like(p) for p in parameters}
    own_sq = dict.fromkeys(parameters, 0.0)
    for index, item in enumerate(items):
        (loss,) = recognizer.loss_per_example(recognizer.model, recognizer.collate([item]))
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, grad in zip(parameters, grads, strict=True):
            if grad is not None:
                square = float(grad.square().sum())
                exact_sq[index] += square
                own_sq[parameter] += float(factors[index]) ** 2 * square
                expected[parameter].add_(grad, alpha=float(factors[index]))
    return expected, own_sq


def prepared(family: str, method: str, blocks: int, dtype: torch.dtype = torch.float64) -> Recognizer:
    """The model with a method applied; adapters' second factors are not at their 0."""
    recognizer = recognizer_of(family, blocks, dtype)
    targets = TARGETS[family].split() if method == "lora" else None
    apply_method(recognizer, MethodConfig(kind=method, rank=4, targets=targets))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in recognizer.model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    recognizer.model.train()
    return recognizer


def main() -> None:
    """Check what was asked for and write results.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", default=["parakeet", "wav2vec2-bert"])
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--dtype", default="float64", choices=("float64", "float32"))
    parser.add_argument("--methods", nargs="*", default=["full", "lora"])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.json"))
    asked = parser.parse_args()
    results: dict[str, Any] = json.loads(asked.out.read_text()) if asked.out.exists() else {}
    for family in asked.families:
        for method in asked.methods:
            began = time.monotonic()
            recognizer = prepared(family, method, asked.blocks, getattr(torch, asked.dtype))
            found = check(recognizer, FRAMES[family])
            total = sum(parameter.numel() for parameter in recognizer.base.parameters())
            results[f"{family} {method}"] = {
                "blocks": asked.blocks,
                "dtype": asked.dtype,
                "model_parameters": total,
                "frames": FRAMES[family],
                "seconds": round(time.monotonic() - began),
                "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1),
                "versions": {
                    "dpkernels": __version__,
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                },
                **found,
            }
            asked.out.write_text(json.dumps(results, indent=1) + "\n")
            print(
                family, method, found["worst"], found["norm_over_exact"], f"{total:,} parameters", flush=True
            )
            del recognizer
            gc.collect()  # a model holds itself in circles, and two do not fit


if __name__ == "__main__":
    main()
