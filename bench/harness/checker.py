"""Each contender's sum of gradients against float64 one-by-one gradients. A wrong contender is not timed."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.cases.models import Batch, Case, forward, trained, working_copy
from bench.contenders import CannotRun, Factory, Settings

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2, torch.float64: 1e-6}
"""Largest ‖sum − exact‖/‖exact‖. float32: the forward and backward of six layers stay below 1e-4; a forgotten
factor, example or bias is above 1e-2."""

OK, WRONG, CANNOT = "ok", "wrong", "cannot run"


@dataclass(frozen=True)
class Verdict:
    """status: OK, WRONG or CANNOT; error: relative to the exact sum (None where nothing ran); reason: why not."""

    status: str
    error: float | None = None
    reason: str = ""


def one_by_one(case: Case, model: nn.Module, batch: Batch) -> list[dict[str, Tensor]]:
    """Return one-by-one gradients by plain autograd in float64."""
    wide = copy.deepcopy(model).double()  # a full copy, because double() changes parameters in place
    parameters = trained(wide)
    rows = []
    for i in range(len(batch["labels"])):
        example = {
            n: (v[i : i + 1].double() if v.is_floating_point() else v[i : i + 1]) for n, v in batch.items()
        }
        loss = case.losses(forward(wide, example), example["labels"]).sum()
        rows.append(dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True)))
    return rows


def norm(gradient: Mapping[str, Tensor]) -> float:
    """‖g‖ over all parameters."""
    return math.sqrt(sum(float(part.double().square().sum()) for part in gradient.values()))


def total(gradients: list[dict[str, Tensor]], clip: float | None) -> dict[str, Tensor]:
    """Σ_i min(1, C/‖g_i‖)·g_i, or the plain sum for None."""
    factors = [1.0 if clip is None else min(1.0, clip / max(norm(g), 1e-300)) for g in gradients]
    return {name: sum(c * g[name] for c, g in zip(factors, gradients, strict=True)) for name in gradients[0]}  # type: ignore[misc]


def relative_error(given: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """‖given − exact‖ / ‖exact‖; infinite if names or shapes differ. NaN fails every comparison."""
    if {n: v.shape for n, v in given.items()} != {n: v.shape for n, v in exact.items()}:
        return math.inf
    difference = {name: given[name].double() - value for name, value in exact.items()}
    return norm(difference) / max(norm(exact), 1e-300)


def check(factories: Mapping[str, Factory], case: Case, model: nn.Module, batch: Batch) -> dict[str, Verdict]:
    """A verdict for each contender, from one step with σ = 0 on a copy of `model` over a small `batch`.

    C is the median of the exact norms: about half of the examples are clipped, the others must not be.
    """
    gradients = one_by_one(case, model, batch)
    clip = sorted(norm(g) for g in gradients)[len(gradients) // 2]
    exact = {True: total(gradients, clip), False: total(gradients, None)}
    limit = TOLERANCE[batch["input_features"].dtype]
    verdicts = {}
    for name, factory in factories.items():
        try:
            contender = factory(case, working_copy(model), batch, Settings(clip=clip, noise=0.0, lr=0.0))
            contender.prepare()
            contender.step()
            error = relative_error(contender.released(), exact[contender.private])
        except CannotRun as failure:
            verdicts[name] = Verdict(CANNOT, reason=str(failure))
            continue
        except (
            RuntimeError,
            ValueError,
            NotImplementedError,
            TypeError,
            AttributeError,
            IndexError,
        ) as failure:
            first = (str(failure).strip().splitlines() or [""])[0]
            verdicts[name] = Verdict(CANNOT, reason=f"{type(failure).__name__}: {first}")
            continue
        if error <= limit:
            verdicts[name] = Verdict(OK, error)
        else:
            reason = f"its sum has a relative error of {error:.1e} (limit {limit:.0e})"
            verdicts[name] = Verdict(WRONG, error, reason)
    return verdicts
