"""Two blocks of the 608.8 M and the 580.5 M model at their real widths: every layer's rule, in float64.

The check is that of `experiments/full_size/run.py`, whose recorded results are of all 24 blocks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from dpkernels import PrivacyEngine
from experiments.full_size import run as full_size
from tests.asr_finetune import tones

BLOCKS = 2
DECODER = {
    "joint.head.weight": "JointRecord",
    "joint.head.bias": "JointRecord",
    "encoder_projector.weight": "LinearRecord",
    "decoder.embedding.weight": "EmbeddingRecord",
    "decoder.lstm.weight_hh_l1": "LinearRecord",
    "decoder.lstm.bias_ih_l0": "BiasRecord",
}
# What a batch sums and what one utterance after another gives differ by rounding of float64 only.
EXACT = 1e-8
RULES = {
    "parakeet": {
        "ctc_head.weight": "LinearRecord",
        "encoder.layers.*.conv.pointwise_conv1.weight": "LinearRecord",
        "encoder.layers.*.conv.depthwise_conv.weight": "DepthwiseConv1dRecord",
        "encoder.layers.*.conv.norm.weight": "NormRecord",  # a batch norm with frozen statistics
        "encoder.layers.*.self_attn.bias_u": "ExpandedRecord",
        "encoder.layers.*.self_attn.bias_v": "ExpandedRecord",
        "encoder.layers.*.self_attn.relative_k_proj.weight": "LinearRecord",
        "encoder.layers.*.norm_out.weight": "NormRecord",
    },
    "parakeet_tdt": DECODER,
    "parakeet_rnnt": DECODER,
    "wav2vec2-bert": {
        "lm_head.weight": "LinearRecord",
        "wav2vec2_bert.encoder.layers.*.conv_module.pointwise_conv2.weight": "LinearRecord",
        "wav2vec2_bert.encoder.layers.*.conv_module.depthwise_conv.weight": "DepthwiseConv1dRecord",
        "wav2vec2_bert.encoder.layers.*.self_attn.distance_embedding.weight": "LinearRecord",
        "wav2vec2_bert.encoder.layers.*.final_layer_norm.weight": "NormRecord",
    },
}


# Hidden widths of 1,024: what small widths show is in test_methods.py and test_precision.py.
real = pytest.mark.slow


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with tones.one_thread():
        yield


def assert_exact(found: dict[str, Any]) -> None:
    assert found["unrecorded"] == []
    assert found["recorded_twice"] == 0
    assert found["compared"] == found["parameters"]
    assert found["worst"]["batch"] < EXACT
    assert found["worst"]["padded"] < EXACT
    least, most = found["norm_over_exact"]
    assert 1 <= least <= most < 1.001
    assert found["padded_norm_over_norm"] == pytest.approx([1, 1, 1], abs=1e-6)
    assert min(found["factors"]) < 1
    assert len(set(found["factors"])) == 3


@real
@pytest.mark.parametrize("family", full_size.FRAMES)
def test_every_parameter(family: str) -> None:
    found = full_size.check(full_size.prepared(family, "full", BLOCKS), full_size.FRAMES[family])
    assert_exact(found)
    kinds = {name: row["rule"] for name, row in found["kinds"].items()}
    assert kinds.items() >= RULES[family].items()


@real
@pytest.mark.parametrize("family", full_size.FRAMES)
def test_lora_on_every_linear_layer_and_pointwise_convolution(family: str) -> None:
    recognizer = full_size.prepared(family, "lora", BLOCKS)
    adapted = {name for name, module in recognizer.base.named_modules() if hasattr(module, "lora_A")}
    plain = full_size.recognizer_of(family, BLOCKS).base.named_modules()
    expected = {
        name
        for name, module in plain
        if type(module) in (nn.Linear, nn.Conv1d) and getattr(module, "kernel_size", (1,)) == (1,)
    }
    assert adapted == expected - recognizer.read_layers
    assert_exact(full_size.check(recognizer, full_size.FRAMES[family]))


@real
@pytest.mark.parametrize("family", full_size.FRAMES)
def test_the_engine_in_float32(family: str) -> None:
    """As people run it: the self-check of a private run, in the arithmetic and with the kernels it has."""
    recognizer = full_size.prepared(family, "full", 1)
    model = recognizer.model.float()
    items = full_size.utterances(recognizer, full_size.FRAMES[family])
    loader: Any = DataLoader(items, batch_size=len(items), collate_fn=recognizer.collate)  # type: ignore[arg-type]
    with closing(PrivacyEngine()) as engine:
        engine.make_private(
            module=model,
            optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
            data_loader=loader,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )
        report = engine.self_check(
            recognizer.loss_per_example,
            recognizer.collate(items),
            singles=[recognizer.collate([item]) for item in items],
        )
    assert report.failures == []
    assert len({item.parameter for item in report.differences}) == sum(
        p.requires_grad for p in model.parameters()
    )
    assert report.norm_shortfall <= 1


@real
def test_padding_that_counts_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def unmasked(recognizer: Any, batch: dict[str, Any]) -> dict[str, Any]:
        more = padded(recognizer, batch)
        return {**more, "attention_mask": torch.ones_like(more["attention_mask"])}

    padded = full_size.padded
    monkeypatch.setattr(full_size, "padded", unmasked)
    recognizer = full_size.prepared("wav2vec2-bert", "bitfit", 1)
    found = full_size.check(recognizer, full_size.FRAMES["wav2vec2-bert"])
    assert found["worst"]["batch"] < EXACT
    assert found["worst"]["padded"] > 0.1


WHOLE = {"parakeet": 608.8e6, "parakeet_tdt": 625.9e6, "parakeet_rnnt": 625.9e6, "wav2vec2-bert": 580.5e6}


@pytest.mark.parametrize("model", WHOLE)
def test_the_recorded_results_are_of_the_whole_models(model: str) -> None:
    results = json.loads(Path(full_size.__file__).with_name("results.json").read_text())
    for method in ("full", "lora"):
        found = results[f"{model} {method}"]
        assert_exact(found)
        assert found["blocks"] == 24
        assert set(found["kinds"])
    assert results[f"{model} full"]["parameters"] == pytest.approx(WHOLE[model], rel=1e-3)
