"""PEFT's methods, one after the other: right for every batch size against float64 one-by-one gradients."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dpkernels
from dpkernels.nn import Record, attach, detach, swap, uncovered
from tests.interop.peft_models import (
    LENGTH,
    METHODS,
    VIRTUAL,
    VOCABULARY,
    Net,
    adapted,
    gpt2,
    ids_of,
    logits_of,
    prompts,
    squares,
)
from tests.nn.per_sample import check_private, one_by_one, run_private
from tests.privacy.private_run import private_run

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")


@pytest.mark.thinned(5)
@pytest.mark.parametrize("method", METHODS)
def test_right_for_every_batch_size(method: str) -> None:
    """Also where the batch is as large as a side, the length, the rank or the vocabulary."""
    model = adapted(METHODS[method]()).double()
    assert not uncovered(swap(copy.deepcopy(model)))
    for batch in (1, 2, 3, 4, 5, 6, 8, 9):
        ids = ids_of(batch)
        private = check_private(model, squares, (ids,))
        torch.testing.assert_close(private.losses, squares(model, ids), rtol=1e-12, atol=1e-12)
        assert {n for n, s in private.sums.items() if bool(s.any())} or batch < 3


@pytest.mark.parametrize("method", METHODS)
def test_coverage_tells_the_rule_in_words(method: str) -> None:
    table = dpkernels.coverage(adapted(METHODS[method]()))
    assert table.complete
    assert "ParameterDict" not in str(table)


@pytest.mark.thinned(5)
@pytest.mark.parametrize("method", METHODS)
def test_a_private_model_is_saved_whole_and_its_adapter_loads_in_plain_peft(
    method: str, tmp_path: Path
) -> None:
    model = swap(adapted(METHODS[method]()))
    attach(model)
    ids = ids_of(3)
    want = model(ids).detach()
    torch.save(model, tmp_path / "model.pt")
    whole = torch.load(tmp_path / "model.pt", weights_only=False)
    assert not [m for m in whole.modules() if type(m).__module__.startswith("dpkernels")]
    torch.testing.assert_close(whole(ids), want)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path)
        plain = peft.PeftModel.from_pretrained(Net(), tmp_path).eval()
    torch.testing.assert_close(plain(ids), want)


PROMPTS: dict[str, Callable[[], Any]] = {
    "prompt tuning": lambda: prompts("PromptTuningConfig"),
    "prefix tuning": lambda: prompts("PrefixTuningConfig"),
    "prefix tuning, projected": lambda: prompts(
        "PrefixTuningConfig", prefix_projection=True, encoder_hidden_size=7
    ),
    "P-tuning": lambda: prompts("PromptEncoderConfig", encoder_hidden_size=7),
}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("method", PROMPTS)
def test_virtual_tokens_are_right_for_every_batch_size(method: str) -> None:
    """PEFT looks them up once, or for a batch of 1, and repeats them."""
    model = adapted(PROMPTS[method](), gpt2()).double()
    assert dpkernels.coverage(model).complete
    for batch in (1, 2, VIRTUAL, LENGTH, 7, LENGTH + VIRTUAL):
        ids = ids_of(batch, 50)
        private = check_private(model, logits_of, (ids,))
        torch.testing.assert_close(private.losses, logits_of(model, ids), rtol=1e-12, atol=1e-12)
        assert all(bool(s.any()) for s in private.sums.values())


class OfFloats(Net):
    """Ids out of private_run's features [B,4,6]."""

    def forward(self, x: Tensor) -> Tensor:
        ids = (x[:, :, 0].abs() * 4).long().clamp(max=VOCABULARY - 1)
        return self.head(self.second(torch.tanh(self.first(self.embed(ids))))).mean(1)


@pytest.mark.thinned(5)
@pytest.mark.parametrize("strategy", ["bookkeeping", "two_pass", "mixed"])
@pytest.mark.parametrize("method", ["LoRA on embeddings", "DoRA", "IA3", "VeRA", "OFT", "trainable tokens"])
def test_a_private_step_is_the_sum_of_clipped_gradients(method: str, strategy: str) -> None:
    model = adapted(METHODS[method](), OfFloats())
    run = private_run(model=model, sigma=0.0, clip=0.1, strategy=strategy, batch_size=8)
    examples = range(5)
    released = run.release(examples)
    for name, value in run.clipped_sum(examples).items():
        torch.testing.assert_close(released[name] * 8, value, rtol=2e-3, atol=1e-6)


class Scaled(nn.Embedding):
    """As Gemma's."""

    def __init__(self) -> None:
        super().__init__(VOCABULARY, 6)
        self.register_buffer("embed_scale", torch.tensor(3.0))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale


@pytest.mark.parametrize("method", ["LoRA on embeddings", "trainable tokens"])
def test_adapters_of_a_scaled_embedding(method: str) -> None:
    base = Net()
    base.embed = Scaled()
    model = adapted(METHODS[method](), base).double()
    ids = ids_of(4)
    private = check_private(model, squares, (ids,))
    torch.testing.assert_close(private.losses, squares(model, ids), rtol=1e-12, atol=1e-12)


@pytest.mark.thinned(5)
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_base_with_float32_adapters(method: str) -> None:
    """dtypes and values are PEFT's; so is the sum of gradients."""
    plain = adapted(METHODS[method](), Net().to(torch.bfloat16))
    model, ids = swap(copy.deepcopy(plain)), ids_of(4)
    want = plain(ids)
    (want.float() ** 2).sum().backward()
    private = run_private(model, lambda m, x: (m(x).float() ** 2).flatten(1).sum(1), (ids,))
    attach(model)
    got = model(ids)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=3e-2, atol=3e-2)
    for name, p in plain.named_parameters():
        if p.requires_grad:
            error = float((private.sums[name] - p.grad.double()).norm())
            assert error <= 0.05 * float(p.grad.double().norm()) + 1e-6, name


@pytest.mark.parametrize("method", ["LoRA on embeddings", "IA3", "DoRA", "VeRA"])
def test_several_disabled_and_merged_adapters(method: str) -> None:
    """Several add up their records, one that is off or merged has none."""
    model = adapted(METHODS[method]()).double()
    model.add_adapter("other", METHODS[method]())
    torch.manual_seed(2)
    for p in model.parameters():
        if p.is_floating_point():
            p.data.add_(torch.randn_like(p) * 0.1)
    model.base_model.set_adapter(["default", "other"])
    ids = ids_of(4)
    private = check_private(model, squares, (ids,))
    assert {name.split(".")[-2 if name.endswith("weight") else -1] for name in private.sums} >= {
        "default",
        "other",
    }
    attach(swap(model))
    with model.disable_adapter():
        assert not model(ids).requires_grad
    detach(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.base_model.merge_adapter()
    attach(model)
    assert not model(ids).requires_grad


def test_dropout_before_the_adapter_is_pefts() -> None:
    for config in (
        peft.LoraConfig(target_modules=["first", "second"], r=2, use_dora=True, lora_dropout=0.5),
        peft.VeraConfig(target_modules=["first"], r=4, vera_dropout=0.5),
    ):
        plain = adapted(config).double().train()
        torch.manual_seed(5)
        squares(plain, ids_of(4)).sum().backward()
        torch.manual_seed(5)
        private = run_private(swap(copy.deepcopy(plain)), squares, (ids_of(4),))
        for name, p in plain.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(private.sums[name], p.grad, rtol=1e-9, atol=1e-9)


def test_doras_norm_is_no_use_of_its_layers() -> None:
    """With one use each, two-pass and per-layer clipping need not keep their records."""
    model = swap(adapted(METHODS["DoRA"]()))
    tape = attach(model)
    streamed: list[Record] = []
    losses = squares(model, ids_of(3))
    tape.open(3, sink=streamed.append)
    losses.sum().backward()
    assert tape.close() == []
    assert len({p for record in streamed for p in record.parameters}) == 6


def test_a_table_that_is_held_the_other_way_round_merges_with_itself() -> None:
    """One embedding looked up twice, LoRA's A among what is looked up: cross terms count."""

    class Twice(Net):
        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.tanh(self.embed(ids) * self.embed(ids.flip(1))))

    model = adapted(peft.LoraConfig(target_modules=["embed"], r=2), Twice()).double()
    check_private(model, squares, (ids_of(4),))


def test_every_method_of_this_peft_is_in_the_table() -> None:
    page = Path(__file__).resolve().parents[2].joinpath("docs/peft.md").read_text("utf-8")
    tuners = Path(peft.__file__).with_name("tuners")
    packages = [p.name for p in tuners.iterdir() if p.joinpath("config.py").exists()]
    assert len(packages) > 20
    assert not [name for name in packages if f"`{name}`" not in page]


def test_gradients_of_ids_that_are_padding() -> None:
    """The column of padding_idx is looked up, and gets no gradient."""
    model = adapted(METHODS["LoRA on embeddings"]()).double()
    ids = torch.full((2, LENGTH), 3)
    exact = one_by_one(model, squares, (ids,))
    private = check_private(model, squares, (ids,))
    name = "base_model.model.embed.lora_embedding_A.default"
    assert not exact[name].any()
    assert not private.sums[name].any()
