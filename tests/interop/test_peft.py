from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dpkernels
import dpkernels.nn
from dpkernels.nn import (
    GhostConv1d,
    GhostLinear,
    GhostLoRALinear,
    LinearRecord,
    LoRARecord,
    Tape,
    attach,
    detach,
    swap,
    uncovered,
)
from dpkernels.privacy.self_check.check import self_check
from tests.nn.per_sample import check_private, one_by_one, run_private

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

from dpkernels.interop.peft import GhostPeftLoRALinear  # noqa: E402


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6, bias=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def squares(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) ** 2).flatten(1).sum(1)


def adapted(model: nn.Module | None = None, **config: Any) -> Any:
    config = {"target_modules": ["first", "second"], "r": 2, "lora_alpha": 4} | config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(Net() if model is None else model, LoraConfig(**config))
    return randomise(model)


def randomise(model: Any) -> Any:
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            nn.init.normal_(p, std=0.3)
    return model


X = torch.linspace(-2, 2, 4 * 3 * 6).sin().view(4, 3, 6)


def test_fused_path_records_lora() -> None:
    private = check_private(adapted(), squares, (X,))
    assert [type(r) for r in private.records] == [LoRARecord, LoRARecord]
    assert private.records[1].layer.endswith("first")


@pytest.mark.parametrize("when", ["before", "after", "both"])
def test_swap_before_and_after_peft(when: str) -> None:
    plain = adapted()
    model = Net()
    if when != "after":
        swap(model)
        assert type(model.first) is GhostLinear
    model = adapted(model)
    if when != "before":
        swap(model)
    swap(model)  # make_private swaps what is not yet
    assert type(model.base_model.model.first) is GhostPeftLoRALinear
    assert list(model.state_dict()) == list(plain.state_dict())
    private = run_private(model, squares, (X,))
    exact = one_by_one(plain, squares, (X,))
    total = torch.stack([g.flatten(1).square().sum(1) for g in exact.values()]).sum(0)
    torch.testing.assert_close(private.norm_sq, total, rtol=1e-3, atol=0)
    for name, g in exact.items():
        torch.testing.assert_close(private.sums[name], g.sum(0), rtol=1e-4, atol=1e-5)


def test_pefts_layer_has_a_name_of_its_own() -> None:
    """Its attributes are PEFT's: nobody may take it for a GhostLoRALinear, whose are tensors and numbers."""
    layer = swap(adapted()).base_model.model.first
    assert isinstance(layer, peft.tuners.lora.Linear)
    assert not isinstance(layer, GhostLoRALinear)
    name = type(layer).__name__
    assert name not in dpkernels.nn.__all__
    assert f"PEFT's LoRA → `{name}`" in Path(__file__).resolve().parents[2].joinpath("README.md").read_text(
        "utf-8"
    )


def test_saved_adapter_is_not_empty_and_loads_in_plain_peft(tmp_path: Path) -> None:
    model = swap(adapted())
    attach(model)
    model.save_pretrained(tmp_path)
    detach(model)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size > 4 * (2 * 6 + 8 * 2)
    plain = PeftModel.from_pretrained(Net(), tmp_path)
    assert "Ghost" not in repr(plain)
    model.eval()
    assert torch.equal(plain.eval()(X), model(X))
    assert sum(p.abs().sum() for n, p in plain.named_parameters() if "lora_B" in n) > 0


def test_a_private_model_is_saved_whole_as_pefts(tmp_path: Path) -> None:
    model = swap(adapted(Mixed(), target_modules=["first", "conv"], fan_in_fan_out=True))
    attach(model)
    torch.save(model, tmp_path / "model.pt")
    for copied in (torch.load(tmp_path / "model.pt", weights_only=False), copy.deepcopy(model)):
        assert not [m for m in copied.modules() if type(m).__module__.startswith("dpkernels")]
        assert torch.equal(copied.eval()(X), model.eval()(X))
        assert torch.equal(copied.merge_and_unload()(X), copy.deepcopy(model).merge_and_unload()(X))


def test_disable_switch_and_merge_are_pefts() -> None:
    plain, model = adapted(), swap(adapted())
    for m in (plain, model):
        torch.manual_seed(2)
        m.add_adapter("other", LoraConfig(target_modules=["first"], r=3))
        randomise(m)
    attach(model)
    with model.disable_adapter(), plain.disable_adapter():
        assert torch.equal(model(X), plain(X))
        assert torch.equal(model(X), Net()(X))
    for name in ("other", "default"):
        plain.set_adapter(name)
        model.set_adapter(name)
        torch.testing.assert_close(model(X), plain(X))
    detach(model)
    merged, want = model.merge_and_unload(), plain.merge_and_unload()
    assert type(merged.first) is GhostLinear
    assert torch.equal(merged(X), want(X))


@pytest.mark.parametrize("merged", [False, True])
def test_disabled_or_merged_adapter_records_nothing(merged: bool) -> None:
    plain, model = adapted(), swap(adapted())
    tape = attach(model)
    x = X.clone().requires_grad_()
    if merged:
        model.merge_adapter()
        y = model(x)
        torch.testing.assert_close(y, plain(x))  # the adapter is in it once
    else:
        with model.disable_adapter():
            y = model(x)
    tape.open(4)
    y.sum().backward()
    assert tape.close() == []


def test_switched_adapter_is_the_one_recorded() -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(target_modules=["first"], r=3))
    randomise(model)
    model.set_adapter("other")
    private = check_private(model, squares, (X,))
    assert {n for n, s in private.sums.items() if bool(s.any())} == {
        "base_model.model.first.lora_A.other.weight",
        "base_model.model.first.lora_B.other.weight",
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "lora_bias": {"lora_bias": True, "target_modules": ["first"]},
    "bias": {"bias": "all"},
    "bias of adapted": {"bias": "lora_only"},
    "modules_to_save": {"modules_to_save": ["head"]},
    "rank_pattern": {"rank_pattern": {"second": 3}, "alpha_pattern": {"first": 7}},
}


@pytest.mark.parametrize("config", CONFIGS)
def test_configurations(config: str) -> None:
    model = adapted(**CONFIGS[config])
    private = check_private(model, squares, (X,))
    fused = any(isinstance(r, LoRARecord) for r in private.records)
    assert fused == (config != "lora_bias")


def test_only_b_trained() -> None:
    model = adapted()
    for name, p in model.named_parameters():
        if "lora_A" in name:
            p.requires_grad_(False)
    private = check_private(model, squares, (X,))
    assert {type(r) for r in private.records} == {LinearRecord}


def test_several_active_adapters_run_over_the_inner_layers() -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(target_modules=["first"], r=3))
    randomise(model)
    model.base_model.set_adapter(["default", "other"])
    private = check_private(model, squares, (X,))
    assert sum(isinstance(r, LinearRecord) for r in private.records) == 4
    assert sum(isinstance(r, LoRARecord) for r in private.records) == 1


def test_the_self_check_takes_the_fused_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training takes it; so must what is checked beforehand, and what checkpointing then computes again."""
    kinds: list[type] = []
    original = Tape.add
    monkeypatch.setattr(
        Tape, "add", lambda tape, record: (kinds.append(type(record)), original(tape, record))
    )
    model = swap(adapted())
    assert self_check(model, attach(model), squares, X).first_module is None
    assert set(kinds) == {LoRARecord}


def test_hooks_on_inner_layers_still_run() -> None:
    model = swap(adapted())
    seen: list[int] = []
    model.base_model.model.first.lora_A["default"].register_forward_hook(lambda *_: seen.append(1))
    private = run_private(model, squares, (X,))
    assert len(seen) == 9  # the first forward, and private and plain ones over 2 and 3 rows before it
    assert private.norm_sq.isfinite().all()


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16])
def test_half_precision_base_with_float32_adapters(base: torch.dtype) -> None:
    """PEFT keeps adapters in float32; x is cast to them, the result to the base's dtype."""
    plain = adapted(Net().to(base))
    model = swap(copy.deepcopy(plain))
    assert plain.base_model.model.first.lora_A["default"].weight.dtype is torch.float32
    x1, x2 = X.to(base).requires_grad_(), X.to(base).requires_grad_()
    y1 = plain(x1)
    tape = attach(model)
    y2 = model(x2)
    assert y1.dtype == y2.dtype == base
    torch.testing.assert_close(y1, y2, rtol=2e-2, atol=2e-2)
    tape.open(4)
    y1.float().sum().backward()
    y2.float().sum().backward()
    torch.testing.assert_close(x1.grad, x2.grad, rtol=5e-2, atol=5e-2)
    sums = {p: torch.zeros(p.shape, dtype=torch.float64) for p in model.parameters() if p.requires_grad}
    for record in tape.close():
        record.add_weighted_sum(torch.ones(4), sums)
    grads = {n: p.grad for n, p in plain.named_parameters() if p.requires_grad}
    for name, p in model.named_parameters():
        if p in sums:
            want = grads[name].double()
            assert float((sums[p] - want).norm()) < 0.03 * float(want.norm()), name


def test_dropout_matches_pefts() -> None:
    plain = adapted(lora_dropout=0.5).train()
    model = swap(copy.deepcopy(plain))
    torch.manual_seed(5)
    squares(plain, X).sum().backward()
    torch.manual_seed(5)
    private = run_private(model, squares, (X,))
    for name, p in plain.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(private.sums[name].float(), p.grad, rtol=1e-4, atol=1e-5)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.conv = Conv1D(8, 6), nn.Conv1d(8, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.tanh(self.first(x)).transpose(1, 2))


class Halving(nn.Dropout):
    """A dropout of another kind."""

    def forward(self, input: Tensor) -> Tensor:
        return 0.5 * input


@pytest.mark.parametrize("change", ["hook", "subclass", "mode"])
def test_what_is_done_to_dropout_later_is_done_in_the_fused_path(change: str) -> None:
    """Outputs are those of plain PEFT with the same change."""
    model = adapted(lora_dropout=0.5)
    plain = copy.deepcopy(model)
    tape = attach(swap(model))
    for one in (model, plain):
        one.eval()
        for module in one.modules():
            if hasattr(module, "lora_dropout"):
                dropouts = module.lora_dropout
                if change == "hook":
                    dropouts["default"].register_forward_hook(lambda module, given, output: 3.0 * output)
                elif change == "subclass":
                    dropouts["default"] = Halving()
                else:
                    dropouts.train()
    outputs = []
    for one in (model, plain):
        torch.manual_seed(0)
        outputs.append(one(torch.ones(2, 3, 6)))
    tape.discard()
    torch.testing.assert_close(*outputs)


def test_gpt2s_conv1d_and_convolutions_run_over_the_inner_layers() -> None:
    model = adapted(Mixed(), target_modules=["first", "conv"], fan_in_fan_out=True)
    check_private(model, squares, (X,))
    assert any(type(m) is GhostConv1d for m in swap(model).modules())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora of an embedding": ({"target_modules": ["embed"], "use_dora": True}, "DoraEmbeddingVariant"),
    "attention": ({"target_modules": ["attention"]}, "MultiheadAttention"),
}


@pytest.mark.parametrize("config", REFUSED)
def test_what_has_no_rule_is_named_with_the_fix(config: str) -> None:
    class WithEmbedding(Net):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 6)
            self.attention = nn.MultiheadAttention(6, 2)

    keywords, says = REFUSED[config]
    model = swap(adapted(WithEmbedding(), **keywords))
    with pytest.raises(ValueError, match=rf"lora_(embedding_)?A.*\n?.*{says}"):
        attach(model)
    assert {u.name for u in uncovered(model)} == {n for n, p in model.named_parameters() if p.requires_grad}


def test_coverage_names_lora_as_one_rule() -> None:
    rows = {row.name: str(row) for row in dpkernels.coverage(adapted(modules_to_save=["head"])).rows}
    first = "base_model.model.first."
    assert (
        rows[f"{first}lora_A.default.weight"] == rows[f"{first}lora_B.default.weight"] == "LoRA: ghost norm"
    )
    assert rows["base_model.model.head.modules_to_save.default.weight"] == "Linear: ghost norm"
    several = adapted(lora_bias=True, target_modules=["first"])
    assert {str(row).partition(" (")[0] for row in dpkernels.coverage(several).rows} == {
        "Linear: ghost norm",
        "Linear: per-sample gradient",
    }
