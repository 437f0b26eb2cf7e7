"""How far one example moves the *others'* clipped gradients by changing the shape of their batch.

    python experiments/rounding/run.py

A longer example joins a padded batch of a small attention network; its own contribution is left out of both sums, so
that exact arithmetic would give 0. What is left is rounding of the others' forward and backward, which matrix products
of other shapes do in another order. The same for the count of adaptive clipping, at a C that is the median of the
norms, where most of them are near enough to count. `docs/privacy.md` quotes results.json.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpkernels import __version__, ops
from dpkernels.nn import attach, detach, swap
from dpkernels.privacy.step.adaptive import UNIT, votes_of
from dpkernels.privacy.step.clipping import rounding_slack, total_norm_sq

WIDTH, LAYERS, CLASSES = 64, 4, 10
FRAMES, LONGER = 40, 75
MAX_GRAD_NORM = 0.1


class Net(nn.Module):
    """Encoder layers over padded sequences, averaged over each one's own frames."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out, self.up, self.down = (
            nn.ModuleList(nn.Linear(*size) for _ in range(LAYERS))
            for size in [(WIDTH, WIDTH)] * 4 + [(WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)]
        )
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2 * LAYERS))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, T, d], mask [B, T] -> logits [B, classes]."""
        for layer in range(LAYERS):
            y = self.norms[2 * layer](x)
            q, k, v = (
                part[layer](y).unflatten(2, (4, -1)).transpose(1, 2)
                for part in (self.query, self.key, self.value)
            )
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
            x = x + self.out[layer](attended.transpose(1, 2).flatten(2))
            x = x + self.down[layer](F.gelu(self.up[layer](self.norms[2 * layer + 1](x))))
        return self.head((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def clipped_sum(
    model: Net, x: Tensor, mask: Tensor, labels: Tensor, others: int, bf16: bool
) -> tuple[Tensor, Tensor]:
    """The clipped sum of the first `others` examples of the batch, as one float64 vector, and their squared norms."""
    tape = attach(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(x, mask)
    losses = F.cross_entropy(logits.float(), labels, reduction="none")
    tape.open(len(x))
    losses.sum().backward()
    records = tape.close()
    detach(model)
    norm_sq = total_norm_sq(records, len(x), x.device)
    factors = ops.clip_factors(norm_sq, MAX_GRAD_NORM)
    factors[others:] = 0
    sums = {p: torch.zeros(p.shape, dtype=torch.float64) for p in model.parameters()}
    with torch.no_grad():
        for record in records:
            record.add_weighted_sum(factors, sums)
    return torch.cat([total.flatten() for total in sums.values()]), norm_sq[:others]


def moved(others: int, bf16: bool) -> tuple[float, float]:
    """‖change of the others' clipped sum‖ / C when one example of LONGER frames joins `others` of FRAMES, and the
    change of their count in adaptive clipping."""
    torch.manual_seed(1)
    model = Net()
    swap(model)
    x = torch.zeros(others + 1, LONGER, WIDTH)
    x[:others, :FRAMES] = torch.randn(others, FRAMES, WIDTH)
    x[others] = torch.randn(LONGER, WIDTH)
    mask = torch.zeros(others + 1, LONGER, dtype=torch.bool)
    mask[:others, :FRAMES] = True
    mask[others] = True
    labels = torch.randint(0, CLASSES, (others + 1,))
    without, norms_without = clipped_sum(
        model, x[:others, :FRAMES].contiguous(), mask[:others, :FRAMES], labels[:others], others, bf16
    )
    joined, norms_joined = clipped_sum(model, x, mask, labels, others, bf16)
    median = norms_without.sqrt().median().item()
    votes = [int(votes_of(norms, median, 0.5).sum()) for norms in (norms_joined, norms_without)]
    return float((joined - without).norm()) / MAX_GRAD_NORM, abs(votes[0] - votes[1]) / UNIT


def main() -> None:
    """Measure, print and write results.json."""
    rows = []
    for others in (16, 48, 200, 400):
        (full, count), (half, count_of_half) = moved(others, bf16=False), moved(others, bf16=True)
        row = {
            "others": others,
            "float32": full,
            "bfloat16_autocast": half,
            "counted_in_sensitivity": rounding_slack(others + 1),
            "count_float32": count,
            "count_bfloat16_autocast": count_of_half,
        }
        rows.append(row)
        print("  ".join(f"{key} {value:.3g}" for key, value in row.items()))
    result = {
        "unit": "C, of the counts 1",
        "rows": rows,
        "torch": torch.__version__,
        "dpkernels": __version__,
    }
    (Path(__file__).parent / "results.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
