"""What TF32 convolutions, torch's default on a GPU, do to float32 gradients: the self-check of Wav2Vec2-BERT.

    python experiments/rounding/tf32.py            3 minutes, 16 GB; tf32.json beside it

The 580.5 M model with the LoRA recipe and random weights, three utterances of 3 to 5 s, on the CPU, in float32: once as
it is, once with what every conv1d reads, forward and backward, rounded to TF32's 11 bits (accumulated in float32, as
tensor cores do). The errors are the self-check's: a parameter's gradient in the batch against alone, of its norm.
"""

import json
import warnings
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from asr_finetune.config.schema import Config
from asr_finetune.config.yaml_io import load_yaml
from bench.asr.recipes import Noise, private_run, recogniser
from bench.harness.machine import about

SECONDS = (4.0, 5.0, 3.0, 4.5)
CHECKED = 3
SHOWN = 5
_DROPPED = 13  # bits of float32's 23 that TF32 has not


def tf32(x: Tensor) -> Tensor:
    """x rounded to the nearest TF32 value."""
    bits = x.detach().contiguous().view(torch.int32)
    half, kept = 1 << (_DROPPED - 1), ~((1 << _DROPPED) - 1)
    return ((bits + half) & kept).view(torch.float32)


class _Conv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.how, ctx.bias = how, bias
        return torch.conv1d(tf32(x), tf32(weight), bias, *how)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.how
        sizes = None if ctx.bias is None else [len(ctx.bias)]
        wanted = [*ctx.needs_input_grad[:2], ctx.bias is not None and ctx.needs_input_grad[2]]
        found = torch.ops.aten.convolution_backward(
            tf32(g), tf32(x), tf32(weight), sizes, stride, padding, dilation, False, [0], groups, wanted
        )
        return *found, None, None, None, None


def _forward(layer: nn.Conv1d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    assert layer.padding_mode == "zeros"
    assert not isinstance(layer.padding, str)
    y: Tensor = _Conv1d.apply(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    return y


def errors() -> list[dict[str, Any]]:
    """The largest errors of one self-check, a parameter each."""
    torch.manual_seed(0)
    config = Config.from_dict({**load_yaml("wav2vec2_bert_lora"), "output": "unused"})
    config = config.with_values("privacy", epsilon=None, noise_multiplier=0.7)
    made = recogniser(config, "cpu")
    data = Noise("wav2vec2-bert", np.array(SECONDS))
    engine, _, _ = private_run(config, made, data, len(SECONDS))
    with closing(engine):
        items = [data[place] for place in range(CHECKED)]
        singles = [made.collate([item]) for item in items]
        report = engine.self_check(made.loss_per_example, made.collate(items), singles=singles, tolerance=1.0)
    worst: dict[str, float] = {}
    for item in report.differences:
        worst.setdefault(item.parameter, float(f"{item.error:.2e}"))
    return [{"parameter": name, "error": error} for name, error in list(worst.items())[:SHOWN]]


def main() -> None:
    """Both, printed and saved."""
    warnings.filterwarnings("ignore", message="no self_check")
    found = {"float32": errors()}
    before = nn.Conv1d._conv_forward
    nn.Conv1d._conv_forward = _forward  # type: ignore[method-assign,assignment]
    try:
        found["float32, convolutions in TF32"] = errors()
    finally:
        nn.Conv1d._conv_forward = before  # type: ignore[method-assign]
    saved = {"about": about("cpu"), "seconds": SECONDS[:CHECKED], "errors": found}
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
