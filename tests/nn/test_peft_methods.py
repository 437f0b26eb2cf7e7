"""PEFT's methods, one after the other: right for every batch size against float64 one-by-one gradients, or refused."""

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
from dpkernels.nn import EXPANSION_LIMIT, Record, attach, detach, swap, uncovered
from tests.nn.per_sample import check_private, one_by_one, run_private
from tests.privacy.private_run import private_run

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM  # noqa: E402

VOCABULARY, LENGTH, VIRTUAL = 9, 5, 4


class Net(nn.Module):
    """Two sides of 6 and 8, so that some batch is as large as each; ids [B,5]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 6, padding_idx=3)
        self.places = nn.Embedding(LENGTH, 6)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6, bias=False)
        self.norm, self.conv = nn.LayerNorm(6), nn.Conv1d(6, 6, 3, padding=1)
        self.image, self.head = nn.Conv2d(1, 2, 3, padding=1), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids) + self.places(torch.arange(LENGTH))
        h = self.norm(self.second(torch.tanh(self.first(h))))
        h = self.conv(h.transpose(1, 2)).transpose(1, 2)
        return self.head(self.image(h.unsqueeze(1)).sum(1))


def squares(model: nn.Module, ids: Tensor) -> Tensor:
    return (model(ids) ** 2).flatten(1).sum(1)


def adapted(config: Any, model: nn.Module | None = None) -> Any:
    """The model with the method, its parameters moved away from where they start."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(Net() if model is None else model, config)
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p) * 0.2)
    return model.eval()


def ids_of(batch: int, most: int = VOCABULARY) -> Tensor:
    return torch.randint(0, most, (batch, LENGTH))


METHODS: dict[str, Callable[[], Any]] = {
    "LoRA on embeddings": lambda: peft.LoraConfig(target_modules=["embed", "places"], r=2),
    "LoRA on convolutions": lambda: peft.LoraConfig(target_modules=["conv", "image"], r=2),
    "rsLoRA": lambda: peft.LoraConfig(target_modules=["first", "embed"], r=2, use_rslora=True),
    "LoRA with biases": lambda: peft.LoraConfig(target_modules=["first"], r=2, lora_bias=True, bias="all"),
    "LoRA, modules_to_save": lambda: peft.LoraConfig(
        target_modules=["first"], r=2, modules_to_save=["embed", "norm"]
    ),
    "LoRA, trainable tokens": lambda: peft.LoraConfig(
        target_modules=["first"], r=2, trainable_token_indices={"embed": [1, 2]}
    ),
    "DoRA": lambda: peft.LoraConfig(target_modules=["first", "second"], r=2, use_dora=True),
    "DoRA on convolutions": lambda: peft.LoraConfig(target_modules=["conv", "image"], r=2, use_dora=True),
    "IA3": lambda: peft.IA3Config(target_modules=["first", "second"], feedforward_modules=["second"]),
    "IA3 on convolutions": lambda: peft.IA3Config(target_modules=["image"], feedforward_modules=[]),
    "IA3 on convolutions' inputs": lambda: peft.IA3Config(
        target_modules=["image"], feedforward_modules=["image"]
    ),
    "VeRA": lambda: peft.VeraConfig(target_modules=["first"], r=4),
    "RoAd": lambda: peft.RoadConfig(target_modules=["first", "second"], group_size=2),
    "RoAd 4": lambda: peft.RoadConfig(target_modules=["first"], variant="road_4", group_size=2),
    "OFT": lambda: peft.OFTConfig(target_modules=["first", "second"], oft_block_size=2),
    "LN tuning": lambda: peft.LNTuningConfig(target_modules=["norm"]),
    "trainable tokens": lambda: peft.TrainableTokensConfig(target_modules=["embed"], token_indices=[1, 3, 4]),
    "trainable tokens of positions": lambda: peft.TrainableTokensConfig(
        target_modules=["places"], token_indices=[0, 2]
    ),
}
if hasattr(peft, "BeftConfig"):
    METHODS["BEFT"] = lambda: peft.BeftConfig(target_modules=["first"])


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


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **tokens, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return (torch.tanh(logits) ** 2).flatten(1).sum(1)


def prompts(kind: str, **options: Any) -> Any:
    return getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, **options)


PROMPTS: dict[str, Callable[[], Any]] = {
    "prompt tuning": lambda: prompts("PromptTuningConfig"),
    "prefix tuning": lambda: prompts("PrefixTuningConfig"),
    "prefix tuning, projected": lambda: prompts(
        "PrefixTuningConfig", prefix_projection=True, encoder_hidden_size=7
    ),
    "P-tuning": lambda: prompts("PromptEncoderConfig", encoder_hidden_size=7),
}


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


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "AdaLoRA": (lambda: peft.AdaLoraConfig(target_modules=["first"], total_step=9), "SVDLinear.*gradients"),
    "LoHa": (lambda: peft.LoHaConfig(target_modules=["first"], r=2), "loha.*whole weight matrix"),
    "LoKr": (lambda: peft.LoKrConfig(target_modules=["first"], r=2), "lokr.*whole weight matrix"),
    "HRA": (lambda: peft.HRAConfig(target_modules=["first"], r=2), "hra.*whole weight matrix"),
    "BOFT": (
        lambda: peft.BOFTConfig(target_modules=["first"], boft_block_size=2),
        "boft.*whole weight matrix",
    ),
    "Poly": (lambda: peft.PolyConfig(target_modules=["first"], r=2, n_skills=2, n_tasks=2), "poly.*router"),
    "FourierFT": (
        lambda: peft.FourierFTConfig(target_modules=["first"], n_frequency=5),
        "fourierft.*no rule is written",
    ),
    "DoRA on an embedding": (
        lambda: peft.LoraConfig(target_modules=["embed"], r=2, use_dora=True),
        "DoraEmbeddingVariant",
    ),
    "DoRA with the base's bias": (
        lambda: peft.LoraConfig(target_modules=["first"], r=2, use_dora=True, bias="lora_only"),
        'DoRA reads the base layer.*bias="none"',
    ),
}


@pytest.mark.parametrize("method", REFUSED)
def test_what_has_no_rule_is_refused_with_the_reason(method: str) -> None:
    config, says = REFUSED[method]
    model = swap(adapted(config()))
    with pytest.raises(ValueError, match=rf"{says}"):
        attach(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {u.name for u in uncovered(model)} == trained
    model.requires_grad_(False)
    assert not uncovered(model)


def test_prompts_of_several_tasks_and_cpt_are_refused() -> None:
    config = prompts("MultitaskPromptTuningConfig", num_tasks=2)
    assert "for each example" in str(dpkernels.coverage(adapted(config, gpt2())))
    config = peft.CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[1, 2], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2]
    )
    assert "CPTEmbedding (cpt) has no norm rule" in str(dpkernels.coverage(adapted(config, gpt2())))


def test_adaption_prompts_are_refused() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_layers=1, adapter_len=3)
    model = adapted(config, LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)))
    assert "AdaptedAttention (adaption_prompt) has no norm rule: it reads" in str(dpkernels.coverage(model))


class OfFloats(Net):
    """Ids out of private_run's features [B,4,6]."""

    def forward(self, x: Tensor) -> Tensor:
        ids = (x[:, :, 0].abs() * 4).long().clamp(max=VOCABULARY - 1)
        return self.head(self.second(torch.tanh(self.first(self.embed(ids))))).mean(1)


@pytest.mark.parametrize("strategy", ["bookkeeping", "two_pass", "keep_small"])
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


def test_vectors_that_would_take_too_much_memory_are_refused() -> None:
    wide = nn.Sequential(nn.Linear(1, EXPANSION_LIMIT + 1), nn.Linear(4, EXPANSION_LIMIT))
    table = dpkernels.coverage(
        adapted(peft.IA3Config(target_modules=["0", "1"], feedforward_modules=[]), wide)
    )
    assert [row.refusal is None for row in table.rows] == [False, True]
    assert "65,537 elements are more than the 65,536" in str(table)


def test_a_forward_without_a_tensor_is_refused_by_name() -> None:
    model = swap(adapted(METHODS["IA3"]()))
    attach(model)
    with pytest.raises(RuntimeError, match=r"first\.ia3_l: the model's forward got no tensor"):
        model.base_model.model.first(torch.randn(3, 6))


def test_options_of_an_embedding_under_lora_are_refused() -> None:
    for option in ({"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}):
        base = nn.Sequential(nn.Embedding(5, 4, **option))  # type: ignore[arg-type]
        for config in (
            peft.LoraConfig(target_modules=["0"], r=2),
            peft.TrainableTokensConfig(target_modules=["0"], token_indices=[1]),
        ):
            model = swap(adapted(config, copy.deepcopy(base)))
            assert all(next(iter(option)) in u.reason for u in uncovered(model))
            assert len(uncovered(model)) == sum(p.requires_grad for p in model.parameters())


def test_tokens_of_a_tied_output_layer_are_refused() -> None:
    config = peft.LoraConfig(target_modules=["c_attn"], trainable_token_indices=[1, 2], task_type="CAUSAL_LM")
    refused = dpkernels.coverage(adapted(config, gpt2())).refused
    assert len(refused) == 1
    assert "untie the output layer" in str(refused[0])


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


def test_mixed_batches_of_adapters_are_refused() -> None:
    model = swap(adapted(METHODS["LoRA on embeddings"]()))
    attach(model)
    with pytest.raises(NotImplementedError, match="adapter_names"):
        model.base_model.model.embed(ids_of(2), adapter_names=["default", "default"])


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
