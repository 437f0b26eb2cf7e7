"""A norm is the sample's own: frames that add nothing change neither its form nor its bound.

One long example pads all others of its micro-batch. What that changes of their norms, and with them of their clip
factors, would be one example's effect on the contributions of others, which no sensitivity counts.
"""

from dataclasses import replace

import pytest
import torch

from dpkernels import ops
from tests.ops.cases import CONV, FAMILIES, Case, cancelling, make

INPUTS = ("x", "x_hat", "h")
"""Tensors of a layer's input; the others are of its output's gradient, or ids, which are never zero."""
MARGIN = 2 * CONV["stride"]
"""Frames of a convolution's input beside the padding, which windows of its own frames reach into."""
ROUNDING = 1e-6
"""Relative: what the order of float32 additions changes, which frames before others shift."""
CANCELLED = 0.1
"""The same where nothing but the bound and the rounding is left of a norm."""


def padded(case: Case, frames: int, at: int, zero: str, content: float | None = None) -> Case:
    """The case with `frames` more frames at frame `at`, of which the tensors of `zero` (inputs, gradients) are 0.

    content: of the other tensors' new frames; None: standard normal.
    """
    longer = {}
    for name, tensor in case.tensors.items():
        step = CONV["stride"] if case.family == "depthwise_conv1d" and name == "x" else 1
        time = 2 if case.family == "depthwise_conv1d" else 1
        before, after = tensor.split([at * step, tensor.shape[time] - at * step], time)
        shape = list(tensor.shape)
        shape[time] = frames * step
        block = torch.zeros(shape, dtype=tensor.dtype)
        if name == "ids":
            block = torch.randint(0, 6, shape)
        elif zero != "both" and (name in INPUTS) != (zero == "inputs"):
            block = torch.randn(shape) if content is None else torch.full(shape, content)
            if step > 1:  # what own frames' windows reach into stays 0
                block[..., :MARGIN] = 0
                block[..., -MARGIN:] = 0
        longer[name] = torch.cat([before, block.to(tensor.dtype), after], time)
    return replace(case, tensors=longer)


def end(case: Case) -> int:
    """The place after a case's last frame."""
    if case.family == "depthwise_conv1d":
        return case.tensors["x"].shape[2] // CONV["stride"]
    return case.tensors["g"].shape[1]


def with_gap(case: Case, at: int) -> Case:
    """A convolution whose own frames' windows do not reach over the place `at`; another case as it is."""
    if case.family == "depthwise_conv1d":
        case.tensors["x"][..., max(0, at * CONV["stride"] - MARGIN) : at * CONV["stride"]] = 0
    return case


def ways(family: str) -> list[str]:
    """Which tensors may be 0 in a frame that adds nothing."""
    return ["gradients"] if family in ("bias", "embedding") else ["gradients", "inputs", "both"]


def check(
    case: Case, frames: int, places: dict[str, int], backend: str, off: float, **options: object
) -> None:
    own = case.norms(**options)
    for place, at in places.items():
        # torch's composition leaves zero frames out before anything else; behind the last frame, no sum changes
        same = case.family != "depthwise_conv1d" and (
            backend == "torch" or (backend == "triton" and place == "after")
        )
        for zero in ways(case.family):
            for given, expected in zip(padded(case, frames, at, zero).norms(**options), own, strict=True):
                said = f"{frames} frames {place}, {zero}: {given.tolist()}, not {expected.tolist()}"
                torch.testing.assert_close(
                    given, expected, rtol=0.0 if same else off, atol=0.0, msg=lambda m, s=said: f"{s}: {m}"
                )


@pytest.mark.parametrize("family", FAMILIES)
def test_frames_that_add_nothing_do_not_change_a_norm(bounded_backend: str, family: str) -> None:
    """20 frames of 32 → 32 are in Gram form; with 30 more they would be in direct form, and have two tiles of them."""
    case = make(family, 1, 20, 32, 32)
    for place, at in {"before": 0, "between": end(case) // 2, "after": end(case)}.items():
        check(with_gap(case, at), 30, {place: at}, bounded_backend, ROUNDING)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "depthwise_conv1d"])
def test_nor_the_bound_that_is_all_that_is_left_of_it(bounded_backend: str, family: str) -> None:
    """Frames that cancel: a bound that grew with the padding would grow the norm with it."""
    case = cancelling(family, 1, 10, 24, 24, epsilon=2.0**-24)
    check(case, 70, {"before": 0, "between": 11, "after": 21}, bounded_backend, CANCELLED)


@pytest.mark.parametrize(
    ("family", "options"), [("linear", {"method": "direct"}), ("linear", {"method": "gram"}), ("lora", {})]
)
def test_nor_what_is_added_for_subnormal_factors(
    triton_backend: str, family: str, options: dict[str, object]
) -> None:
    """Tensor cores may align them by larger numbers: δ of every frame is most of this bound."""
    case = make(family, 1, 12, 24, 24, dtype=torch.float16).map(lambda t: t * 2.0**-20)
    check(case, 70, {"between": 6}, triton_backend, 1e-3, **options)


@pytest.mark.parametrize("family", [f for f in FAMILIES if len(ways(f)) > 1])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_zero_row_hides_no_number_that_is_not_finite(backend: str, family: str, bad: float) -> None:
    """0·NaN is NaN in the weighted sum: behind the sample's last frame too, where a kernel need not look."""
    case = make(family, 1, 6, 24, 24)
    for zero in ("inputs", "gradients"):
        assert not sum(padded(case, 70, end(case), zero, bad).norms()).isfinite().any(), zero


@pytest.mark.parametrize("frames", [1, 2])
def test_a_bias_of_one_frame_is_exact_with_any_padding(triton_backend: str, frames: int) -> None:
    """As a materialised gradient is, which shares a launch with others; a layer must not join that by its padding."""
    case = make("bias", 2, 1, p=24)
    joined = ops.total_norm_sq([case.layer()])
    given = ops.total_norm_sq([padded(case, frames - 1, 1, "gradients").layer()])
    exact = case.tensors["g"].double().square().sum((1, 2))
    assert torch.equal(joined, given)
    assert ((given.double() / exact - 1).abs() < 2.0**-22).all()
