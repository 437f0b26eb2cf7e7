"""Small attention models that train all, adapters, tied and reused weights, and what clipping them must give."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dpkernels.nn import Choice, GhostLoRALinear, LayerSizes
from tests.privacy.private_run import Net, Run, losses_of, private_run

WIDTH, WORDS = 12, 9
INDICES = (0, 1, 2, 3, 4, 5, 6)
BOUND = 0.5
KINDS = ("full", "lora", "tied", "reused")


class Attention(nn.Module):
    """A block with queries, keys and values of one input, a residual, and two linear layers after it."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.drop(self.out(mixed))
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Small(nn.Module):
    """Tokens made of a batch of `private_run` -> [B, 3] logits.

    Checkpointed, each block is recomputed in the backward as Hugging Face's `gradient_checkpointing_enable` does it.
    """

    def __init__(
        self, kind: str, *, checkpointed: bool = False, dropout: float = 0.0, keep_masks: bool = True
    ) -> None:
        super().__init__()
        self.checkpointed, self.keep_masks = checkpointed, keep_masks
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList([Attention(dropout) for _ in range(2)])
        if kind == "reused":
            self.blocks[1] = self.blocks[0]
        self.last = nn.Linear(WIDTH, WORDS, bias=False)
        if kind == "tied":
            self.last.weight = self.embed.weight
        if kind == "lora":
            self.requires_grad_(False)
            for block in self.blocks:
                for name in ("q", "v", "down"):
                    adapted = GhostLoRALinear.from_linear(getattr(block, name), r=2)
                    nn.init.normal_(adapted.lora_B)
                    setattr(block, name, adapted)

    def forward(self, x: Tensor) -> Tensor:
        ids = (x[..., 0].abs() * 4).long().clamp(max=WORDS - 1)
        h = self.embed(ids)
        for block in self.blocks:
            if self.checkpointed:
                h = checkpoint(block, h, use_reentrant=False, preserve_rng_state=self.keep_masks)
            else:
                h = block(h)
        return self.last(h).mean(1)[:, :3]


def small(kind: str, **options: Any) -> Small:
    """The same weights for every option."""
    torch.manual_seed(4)
    return Small(kind, **options)


def groups_of(model: nn.Module) -> list[list[str]]:
    """The trained parameters by name, those of one record together: LoRA's two factors, else one each."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    pairs = [[n, n[: -len("A")] + "B"] for n in names if n.endswith("lora_A")]
    return pairs + [[n] for n in names if ".lora_" not in n]


def gradients_one_by_one(
    model: nn.Module, losses_of: Callable[..., Tensor], batches: Iterable[Any]
) -> list[dict[str, Tensor]]:
    """The gradient of each one-example batch by plain autograd over torch's layers, in float64."""
    wide = copy.deepcopy(model).double()
    trained = {name: p for name, p in wide.named_parameters() if p.requires_grad}
    rows = []
    for batch in batches:
        found = torch.autograd.grad(
            losses_of(wide, batch).sum(), list(trained.values()), allow_unused=True, materialize_grads=True
        )
        rows.append(dict(zip(trained, found, strict=True)))
    return rows


def clip(rows: list[dict[str, Tensor]], groups: list[list[str]], norms: list[float]) -> dict[str, Tensor]:
    """Σ_i over examples, each group of parameters of each example scaled to norm at most its own."""
    total = {name: torch.zeros_like(part) for name, part in rows[0].items()}
    for row in rows:
        for group, bound in zip(groups, norms, strict=True):
            norm = math.sqrt(sum(float(row[name].square().sum()) for name in group))
            for name in group:
                total[name] += row[name] * (min(1.0, bound / norm) if norm else 1.0)
    return total


def expected_sum(
    rows: list[dict[str, Tensor]], model: nn.Module, strategy: str, bound: float
) -> dict[str, Tensor]:
    """The clipped sum: flat, or by layers with C/√P for each of P parameters."""
    if strategy != "per_layer":
        return clip(rows, [list(rows[0])], [bound])
    groups = groups_of(model)
    return clip(rows, groups, [bound * math.sqrt(len(group) / len(rows[0])) for group in groups])


def distance(given: dict[str, Tensor], expected: dict[str, Tensor], *, each: bool = True) -> float:
    """‖given − expected‖ / ‖expected‖ of all together; `each`: or the largest of any parameter's, if that is more.

    A parameter below 1 % of the whole is compared with that: what is left of it is rounding.
    """
    assert given.keys() == expected.keys()
    whole = math.sqrt(sum(float(t.square().sum()) for t in expected.values()))
    parts = {name: float((given[name] - t).norm()) for name, t in expected.items()}
    found = [math.sqrt(sum(part**2 for part in parts.values())) / whole]
    if each:
        found += [parts[name] / max(float(t.norm()), 1e-2 * whole) for name, t in expected.items()]
    return max(found)


def run_of(
    strategy: str, kind: str = "full", *, bound: Any = BOUND, half: bool = False, **options: Any
) -> Run:
    """`half`: what is frozen is bfloat16, what is trained float32."""
    run = private_run(sigma=0, clip=bound, model=small(kind, **options), strategy=strategy)
    for parameter in run.model.parameters():
        if half and not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    return run


def check_sum(run: Run, strategy: str, tolerance: float = 1e-4, *, each: bool = True) -> None:
    """What is released without noise is the clipped sum over the expected batch size."""
    rows = gradients_one_by_one(run.model, losses_of, [one(run, i) for i in INDICES])
    expected = expected_sum(rows, run.model, strategy, run.optimizer.max_grad_norm)
    released = run.release(INDICES[:3], INDICES[3:])
    assert distance({name: 8 * part for name, part in released.items()}, expected, each=each) < tolerance


def one(run: Run, index: int) -> tuple[Tensor, Tensor]:
    x, y = run.data[[index]]
    return x.double(), y


def excess(run: Run, indices: tuple[int, ...] = INDICES) -> float:
    """Largest ‖what one example adds to the float64 sums‖ / C, of the step at hand."""
    worst = 0.0
    for index in indices:
        run.begin(1)
        run.optimizer.backward(run.loss_fn(run.model, run.data[[index]]))
        worst = max(worst, added(run) / run.optimizer.clip_norm)
        run.optimizer.zero_grad()
    return worst


def added(run: Run) -> float:
    return float(torch.cat([total.flatten() for total in run.optimizer._batch.sums.values()]).norm())


def backward_alone(run: Run) -> None:
    run.begin(1)
    run.optimizer.backward(run.loss_fn(run.model, run.data[[0]]))


class Explodes(torch.autograd.Function):
    """The identity, whose gradient is infinite for example 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        g = g.clone()
        g[1] = math.inf
        return g


class Exploding(Net):
    on = True

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(torch.tanh(self.first(x)))
        return self.last(Explodes.apply(hidden) if self.on else hidden).mean(1)


def auto_materialises(monkeypatch: pytest.MonkeyPatch, least: int = 3) -> None:
    """From so many frames on "auto" materialises every layer, as the fitted costs make it do in wide layers only."""
    honest = Choice.least_frames

    def of_small_layers(self: Choice, layer: LayerSizes, device_type: str = "cpu") -> int | None:
        return least if self.by_time and layer.entries else honest(self, layer, device_type)

    monkeypatch.setattr(Choice, "least_frames", of_small_layers)
