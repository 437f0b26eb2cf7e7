"""Writes docs/overview.md from the code: what one calls, and the layers of torch.nn: `python scripts/overview_page.py`.

Signatures, summaries and rules are read from the package itself; a test compares the page with what this script writes.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout, wherever the script is called

from dpkernels.nn import EXPANSION_LIMIT  # noqa: E402
from dpkernels.nn.convert.coverage import coverage  # noqa: E402

OUT = ROOT / "docs" / "overview.md"

# section -> what is called (module:name, or module:class.name), how a script writes it, and the page about it
CALLS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "Before training": (
        ("dpkernels:coverage", "dpkernels.coverage(model)", "opacus.md"),
        ("dpkernels:fix", "dpkernels.fix(model)", "opacus.md"),
        ("dpkernels.privacy:plan_noise", "dpkernels.privacy.plan_noise(...)", "privacy.md"),
        ("dpkernels.privacy:noise_multiplier", "dpkernels.privacy.noise_multiplier(...)", "privacy.md"),
        ("dpkernels.memory:MemoryEstimator", "dpkernels.memory.MemoryEstimator(model, ...)", "memory.md"),
        ("dpkernels.privacy:join_processes", "dpkernels.privacy.join_processes()", "distributed.md"),
        ("dpkernels.privacy:shard_frozen", "dpkernels.privacy.shard_frozen(model)", "sharding.md"),
    ),
    "A private run": (
        ("dpkernels:PrivacyEngine", "engine = dpkernels.PrivacyEngine(ledger=...)", "getting-started.md"),
        ("dpkernels:PrivacyEngine.make_private", "engine.make_private(...)", "getting-started.md"),
        (
            "dpkernels:PrivacyEngine.make_private_with_epsilon",
            "engine.make_private_with_epsilon(...)",
            "getting-started.md",
        ),
        ("dpkernels:PrivacyEngine.self_check", "engine.self_check(losses_of)", "privacy.md"),
        ("dpkernels.privacy:DPDataLoader.__iter__", "for logical_batch in loader", "getting-started.md"),
        ("dpkernels.privacy:DPDataLoader.flat", "for batch in loader.flat()", "getting-started.md"),
        ("dpkernels.privacy:DPOptimizer.backward", "optimizer.backward(losses)", "getting-started.md"),
        ("dpkernels.privacy:DPOptimizer.step", "optimizer.step()", "getting-started.md"),
        ("dpkernels.privacy:DPOptimizer.zero_grad", "optimizer.zero_grad()", "getting-started.md"),
        ("dpkernels.privacy:back_propagate", "dpkernels.privacy.back_propagate(...)", "memory.md"),
    ),
    "What was spent": (
        ("dpkernels:PrivacyEngine.get_epsilon", "engine.get_epsilon(delta)", "privacy.md"),
        ("dpkernels:PrivacyEngine.steps", "engine.steps", "checkpoints.md"),
        ("dpkernels:PrivacyEngine.history", "engine.history", "checkpoints.md"),
        ("dpkernels:PrivacyEngine.state_dict", "engine.state_dict()", "checkpoints.md"),
        ("dpkernels:PrivacyEngine.load_state_dict", "engine.load_state_dict(state)", "checkpoints.md"),
        ("dpkernels:PrivacyEngine.close", "engine.close()", "checkpoints.md"),
        ("dpkernels.privacy:read_ledger", "dpkernels.privacy.read_ledger(path)", "privacy.md"),
        ("dpkernels.privacy:audit_ledger", "dpkernels.privacy.audit_ledger(path)", "privacy.md"),
        ("dpkernels.privacy:epsilon", "dpkernels.privacy.epsilon(...)", "privacy.md"),
    ),
    "Losses, one for each example": (
        (
            "dpkernels.losses:cross_entropy_per_example",
            "dpkernels.losses.cross_entropy_per_example(...)",
            "examples.md",
        ),
        (
            "dpkernels.losses:ctc_loss_per_example",
            "dpkernels.losses.ctc_loss_per_example(...)",
            "examples.md",
        ),
        (
            "dpkernels.losses:transducer_loss_per_example",
            "dpkernels.losses.transducer_loss_per_example(...)",
            "recipes.md",
        ),
    ),
    "The model": (
        ("dpkernels:swap", "dpkernels.swap(model)", "getting-started.md"),
        ("dpkernels.nn:detach", "dpkernels.nn.detach(model, unswap=True)", "checkpoints.md"),
        ("dpkernels.nn:freeze_batch_norm", "dpkernels.nn.freeze_batch_norm(model)", "opacus.md"),
        (
            "dpkernels.nn:register_swap",
            "dpkernels.nn.register_swap(Mine, GhostMine)",
            "../CONTRIBUTING.md",
        ),
    ),
    "In other libraries": (
        ("dpkernels.interop.trainer:PrivateTrainer", "PrivateTrainer(..., privacy=...)", "trainer.md"),
        ("dpkernels.interop.trainer:PrivacyArguments", "PrivacyArguments(...)", "trainer.md"),
        ("dpkernels.opacus:register", "dpkernels.opacus.register()", "opacus.md"),
    ),
}

# the layers of torch.nn that have parameters; several of one row have the same rules
LAYERS: dict[str, tuple[Callable[[], nn.Module], ...]] = {
    "Linear": (lambda: nn.Linear(4, 3),),
    "Bilinear": (lambda: nn.Bilinear(3, 3, 2),),
    "Conv1d, Conv2d, Conv3d": (
        lambda: nn.Conv1d(4, 3, 2),
        lambda: nn.Conv2d(4, 3, 2),
        lambda: nn.Conv3d(4, 3, 2),
    ),
    "ConvTranspose1d, ConvTranspose2d, ConvTranspose3d": (
        lambda: nn.ConvTranspose1d(4, 3, 2),
        lambda: nn.ConvTranspose2d(4, 3, 2),
        lambda: nn.ConvTranspose3d(4, 3, 2),
    ),
    "Embedding": (lambda: nn.Embedding(5, 3),),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(5, 3),),
    "LayerNorm": (lambda: nn.LayerNorm(4),),
    "RMSNorm": (lambda: nn.RMSNorm(4),),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4),),
    "InstanceNorm1d, InstanceNorm2d, InstanceNorm3d": (
        lambda: nn.InstanceNorm1d(4, affine=True),
        lambda: nn.InstanceNorm2d(4, affine=True),
        lambda: nn.InstanceNorm3d(4, affine=True),
    ),
    "BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm": (
        lambda: nn.BatchNorm1d(4),
        lambda: nn.BatchNorm2d(4),
        lambda: nn.BatchNorm3d(4),
        lambda: nn.SyncBatchNorm(4),
    ),
    "PReLU": (lambda: nn.PReLU(4),),
    "LSTM, GRU, RNN": (
        lambda: nn.LSTM(4, 3, bidirectional=True),
        lambda: nn.GRU(4, 3, bidirectional=True),
        lambda: nn.RNN(4, 3, bidirectional=True),
    ),
    "LSTMCell, GRUCell, RNNCell": (
        lambda: nn.LSTMCell(4, 3),
        lambda: nn.GRUCell(4, 3),
        lambda: nn.RNNCell(4, 3),
    ),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(4, 2),),
    "TransformerEncoderLayer, TransformerDecoderLayer": (
        lambda: nn.TransformerEncoderLayer(4, 2, 4),
        lambda: nn.TransformerDecoderLayer(4, 2, 4),
    ),
    "TransformerEncoder, TransformerDecoder, Transformer": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 4), 1, enable_nested_tensor=False),
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 4), 1),
        lambda: nn.Transformer(4, 2, 1, 1, 4, batch_first=True),
    ),
    "AdaptiveLogSoftmaxWithLoss": (lambda: nn.AdaptiveLogSoftmaxWithLoss(16, 6, [2, 4]),),
}
_KINDS = ("ghost norm", "per-sample gradient", "per-sample expansion")


def table(header: str, rows: Iterator[tuple[str, ...]]) -> str:
    """A Markdown table."""
    titles = header.split(" | ")
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def found(path: str) -> tuple[Any, Any]:
    """The object of a path in CALLS, and the one whose docstring and annotation speak for it."""
    module, _, name = path.partition(":")
    value: Any = importlib.import_module(module)
    for part in name.split("."):
        value = inspect.getattr_static(value, part) if inspect.isclass(value) else getattr(value, part)
    return value, value.fget if isinstance(value, property) else value


def returned(value: Any) -> str:
    """The annotation of what a call returns, without the modules of its names."""
    if inspect.isclass(value):
        return f"`{value.__name__}`"
    annotation = inspect.signature(value).return_annotation
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    short = re.sub(r"[\w.]+[.](\w+)", r"\1", text)
    return "" if short == "None" else f"`{short}`"


def summary(value: Any) -> str:
    """The first sentence of a docstring."""
    paragraph = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.])\s|: `|:$", paragraph)[0].rstrip(".")


def calls() -> Iterator[str]:
    """The sections of the first table."""
    for section, entries in CALLS.items():
        rows = []
        for path, written, page in entries:
            value, speaker = found(path)
            rows.append(
                (f"`{written}`", returned(speaker), summary(value), f"[{Path(page).stem.lower()}]({page})")
            )
        yield f"### {section}\n\n{table('call | returns | what it does | guide', iter(rows))}\n"


def rules_of(make: Callable[[], nn.Module]) -> tuple[str, str, str, str]:
    """Of one layer: the parameters of each of `_KINDS`, and why others are refused."""
    covered = coverage(make())
    by_kind: dict[str, dict[str, None]] = {kind: {} for kind in _KINDS}
    for row in covered.rows:
        parts = re.sub(r"_l0(_reverse)?$", "", row.name).split(".")
        name = ".".join(parts if parts[-2:][0].isdigit() else parts[-2:])
        for kind in _KINDS:
            if row.rule is not None and f": {kind}" in row.rule:
                by_kind[kind][f"`{name}`"] = None
    refusals = list(dict.fromkeys(row.refusal for row in covered.refused if row.refusal is not None))
    if covered.mixing:
        refusals = [
            "refused in training mode, which mixes examples: `dpkernels.fix` freezes its statistics or replaces it"
        ]
    columns = [", ".join(by_kind[kind]) for kind in _KINDS]
    return columns[0], columns[1], columns[2], "; ".join(refusals)


def layers() -> str:
    """The table of layers. Layers of one row must have the same rules."""
    rows = []
    for names, makers in LAYERS.items():
        every = [rules_of(make) for make in makers]
        merged = tuple(
            ", ".join(dict.fromkeys(part for rules in every for part in rules[place].split(", ") if part))
            for place in range(3)
        )
        refusals = "; ".join(dict.fromkeys(rules[3] for rules in every if rules[3]))
        rows.append((", ".join(f"`{name}`" for name in names.split(", ")), *merged, refusals))
    return table("`torch.nn` | ghost norm | per-sample gradient | expanded | otherwise", iter(rows))


def page() -> str:
    """The whole page."""
    return f"""# Overview

`scripts/overview_page.py` writes this page from the code. The {{doc}}`reference <reference/index>` has every public
name with its arguments and errors.

## What one calls

{chr(10).join(calls())}
## Layers

How the norm of an example's gradient is found, for each parameter of a layer of `torch.nn`:

- **ghost norm**: from the layer's input and output gradient; no example's gradient is materialised.
- **per-sample gradient**: a vector, summed over time in the backward: B numbers for each entry.
- **expanded**: the layer has no rule of its own. Its gradients are materialised one example at a time, for parameters
  of at most {EXPANSION_LIMIT:,} entries; larger ones are refused by name.

A subclass that inherits its whole computation, or only changes the layer's input or output, has the rule of its class.
`print(dpkernels.coverage(model))` says it for a model, before any training. [PEFT's methods](peft.md) and the layers of
[transformers, torchvision and timm](models.md) have tables of their own;
[`custom_layer.py`](../examples/custom_layer.py) adds a rule.

{layers()}
"""


if __name__ == "__main__":
    OUT.write_text(page(), encoding="utf-8")
