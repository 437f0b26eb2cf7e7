"""The torch.library side: schemas, fakes, mutation, and what the public functions refuse."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from dpkernels import ops, reference
from dpkernels.backends import registry, torch_ops
from dpkernels.ops import layers
from tests.ops import transducer
from tests.ops.cases import FAMILIES, make

TENSOR_OPS = [op for op in registry.ops() if not op.startswith("chacha20")]
STATES = {"noise_adamw": 2, "noise_sgd": 1}
"""And how many states each keeps."""


def optimizer_arguments(op: str) -> tuple[Any, ...]:
    def each(dtype: torch.dtype) -> list[torch.Tensor]:
        return [torch.rand(3, dtype=dtype), torch.rand(2, 2, dtype=dtype)]

    lists = [each(torch.float32), each(torch.float64), *(each(torch.float32) for _ in range(STATES[op] + 1))]
    nonces = [torch.arange(24, dtype=torch.uint8), torch.arange(24, 48, dtype=torch.uint8)]
    noise = (torch.zeros(32, dtype=torch.uint8), *nonces, 1.0, 2.0**-10, 4.0, False)
    hyper = (0.1, 0.9, 0.99, 1e-8, 0.01, True) if op == "noise_adamw" else (0.1, 0.9, 0.0, 0.01, False)
    return (*lists, [1.0, 2.0], *noise, *hyper)


def grouped_layers(norms: bool) -> list[ops.GroupedLayer]:
    cases = [make(family, batch=2) for family in FAMILIES]
    return [case.layer([] if norms else zeros(case.out_shapes)) for case in cases]


def zeros(shapes: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    return [torch.zeros(shape, dtype=torch.float64) for shape in shapes]


def arguments(op: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if op == "clip_factors":
        return (torch.rand(4), 1.0), {}
    if op == "automatic_clip_factors":
        return (torch.rand(4), 1.0, 0.01), {}
    if op == "lora_gradients":
        return tuple(make("lora").tensors.values()), {}
    if op in STATES:
        return optimizer_arguments(op), {}
    if op == "noise_sums":
        key, nonces = torch.zeros(32, dtype=torch.uint8), torch.arange(24, dtype=torch.uint8)
        return (zeros(((3, 2), (4,))), key, nonces, 1.0, 2.0**-10, 4.0), {}
    if op == "weighted_sums":
        given = grouped_layers(norms=False)
        outs = [out for layer in given for out in layer.outs]
        return (*layers.pack(given, norms=False), torch.rand(2), outs), {}
    if op == "total_norm_sq":
        return layers.pack(grouped_layers(norms=True), norms=True), {}
    if op.startswith("transducer_"):
        return transducer.arguments(op)
    family, _, kind = op.rpartition("_norm_sq" if op.endswith("_norm_sq") else "_weighted_sum")
    del kind
    case = make(family)
    if op.endswith("_norm_sq"):
        return tuple(case.tensors.values()), case.norm_options
    outs = [torch.zeros(shape, dtype=torch.float64) for shape in case.out_shapes]
    return (*case.tensors.values(), torch.rand(3), *outs), case.sum_options


@pytest.mark.thinned(10)
@pytest.mark.parametrize("op", TENSOR_OPS)
def test_opcheck(op: str) -> None:
    args, kwargs = arguments(op)
    torch.library.opcheck(getattr(torch.ops.dpkernels, op).default, args, kwargs)


@pytest.mark.parametrize("op", TENSOR_OPS)
def test_declares_what_it_mutates(op: str) -> None:
    schema = getattr(torch.ops.dpkernels, op).default._schema
    written = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    outs = {a.name for a in schema.arguments if a.name.startswith("out")}
    if op in STATES:
        states = {"exp_avgs", "exp_avg_sqs"} if op == "noise_adamw" else {"momentum_buffers"}
        outs = {"params", "sums", "grads"} | states
    if op == "noise_sums":
        outs = {"sums"}
    assert written == outs
    assert bool(outs) == (op in (*STATES, "weighted_sums", "noise_sums") or op.endswith("_weighted_sum"))


def test_one_name_from_schema_to_backend() -> None:
    assert set(ops.__all__) - {"GroupedLayer", "clip_and_noise", "transducer_loss"} == set(registry.ops())
    assert reference.DEFINITIONS.keys() == set(registry.ops())
    for op in TENSOR_OPS:
        assert callable(getattr(reference, op))
        assert callable(getattr(torch_ops, op))
        assert getattr(ops, op).__doc__.count("Raises:") == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_public_functions_trace_under_fake_tensors(family: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        case = make(family)
        assert all(n.shape == (3,) and n.dtype == torch.float32 for n in case.norms())
        case.sums(torch.ones(3))


def test_an_input_that_requires_grad_is_no_obstacle() -> None:
    x, g = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 5)
    out = torch.zeros(5, 4, dtype=torch.float64)
    ops.linear_weighted_sum(x, g, ops.clip_factors(ops.linear_norm_sq(x, g).detach(), 1.0), out)
    assert not out.requires_grad


X, G, IDS = torch.randn(2, 3, 4), torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
ONES, OUT = torch.ones(2), torch.zeros(5, 4)
CONV_X = torch.randn(2, 4, 9)
REFUSED: list[tuple[str, tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ("linear_norm_sq", (X[0], G), {}, ValueError, "x: expected"),
    ("linear_norm_sq", (X, G[:, :2]), {}, ValueError, "g: expected"),
    ("linear_norm_sq", (X, G.half()), {}, TypeError, "g: expected"),
    ("linear_norm_sq", (X.long(), G), {}, TypeError, "x: expected"),
    ("linear_norm_sq", (X, G.to("meta")), {}, ValueError, "g: expected device"),
    ("linear_norm_sq", (X, G), {"method": "fast"}, ValueError, "method: given 'fast'"),
    (
        "linear_norm_sq",
        (X, G),
        {"lengths": torch.tensor([1, 4])},
        ValueError,
        "given 4 for sample 1, but T is 3",
    ),
    ("linear_norm_sq", (X, G), {"lengths": torch.tensor([-1, 0])}, ValueError, "given -1 for sample 0"),
    ("linear_norm_sq", (X, G), {"lengths": torch.ones(2)}, TypeError, "lengths: expected int64"),
    ("linear_norm_sq", (X, G), {"lengths": torch.tensor([1])}, ValueError, "lengths: expected"),
    ("linear_weighted_sum", (X, G, ONES[:1], OUT), {}, ValueError, "factors: expected"),
    ("linear_weighted_sum", (X, G, ONES.double(), OUT), {}, TypeError, "factors: expected float32"),
    ("linear_weighted_sum", (X, G, ONES, OUT.T), {}, ValueError, r"out: expected \[p, d\] = \[5, 4\]"),
    ("linear_weighted_sum", (X, G, ONES, OUT.bfloat16()), {}, TypeError, "out: expected float32 or float64"),
    ("linear_weighted_sum", (X, G, ONES, OUT.to("meta")), {}, ValueError, "out: expected device"),
    ("bias_norm_sq", (X[0],), {}, ValueError, "g: expected"),
    ("bias_weighted_sum", (G, ONES, torch.zeros(4)), {}, ValueError, "out: expected"),
    ("lora_norm_sq", (X, X, G, G), {}, ValueError, "dh: expected"),
    ("lora_norm_sq", (X, X, G, X), {"scaling": float("nan")}, ValueError, "scaling: expected"),
    ("lora_weighted_sum", (X, X, G, X, ONES, OUT, OUT), {}, ValueError, "out_a: expected"),
    ("embedding_norm_sq", (IDS.int(), G), {}, TypeError, "ids: expected int64"),
    ("embedding_norm_sq", (IDS[:, :2], G), {}, ValueError, "ids: expected"),
    (
        "embedding_weighted_sum",
        (IDS + 9, G, ONES, torch.zeros(9, 5)),
        {},
        ValueError,
        "from 9 to 9, but out has 9",
    ),
    ("embedding_weighted_sum", (IDS - 1, G, ONES, torch.zeros(9, 5)), {}, ValueError, "from -1 to -1"),
    ("embedding_norm_sq", (IDS - 1, G), {}, ValueError, "ids: given values from -1"),
    ("embedding_norm_sq", (IDS, G), {"padding_idx": -2}, ValueError, "padding_idx: given -2"),
    (
        "embedding_weighted_sum",
        (IDS, G, ONES, torch.zeros(9, 5)),
        {"padding_idx": 9},
        ValueError,
        "padding_idx: given 9; pass a row of 9 rows",
    ),
    ("embedding_weighted_sum", (IDS, G, ONES, torch.zeros(9, 4)), {}, ValueError, "out: expected"),
    ("layer_norm_norm_sq", (X, G), {}, ValueError, "g: expected"),
    ("layer_norm_weighted_sum", (X, X, ONES, torch.zeros(5)), {}, ValueError, "out: expected"),
    (
        "depthwise_conv1d_norm_sq",
        (CONV_X, CONV_X),
        {"kernel_size": 3},
        ValueError,
        r"g: expected .* \[2, 4, 7\]",
    ),
    ("depthwise_conv1d_norm_sq", (CONV_X, CONV_X), {"kernel_size": 0}, ValueError, "kernel_size: expected"),
    (
        "depthwise_conv1d_norm_sq",
        (CONV_X, CONV_X),
        {"kernel_size": 1, "stride": 0},
        ValueError,
        "stride: expected",
    ),
    (
        "depthwise_conv1d_weighted_sum",
        (CONV_X, CONV_X, ONES, torch.zeros(4, 3)),
        {},
        ValueError,
        "out: expected",
    ),
]


@pytest.mark.parametrize(("op", "args", "kwargs", "error", "message"), REFUSED)
def test_refuses(
    op: str, args: tuple[Any, ...], kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        getattr(ops, op)(*args, **kwargs)
    assert ";" in str(caught.value)  # what was given, and then the fix
