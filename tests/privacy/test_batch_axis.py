"""17: the private forward is the plain model's at every batch size, and row i of every record is example i."""

from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dpkernels.nn import RowError, detach
from dpkernels.nn.batch import batch_axis
from dpkernels.nn.layers import leaf_calls
from dpkernels.nn.recording import row_check
from dpkernels.privacy import SelfCheckError
from tests.nn import zoo
from tests.privacy.private_run import Run, norm_of, private_run
from tests.slow import covering

# Each size of the models is the batch's in the first; the larger ones take longer than all of these.
BATCHES, LARGER = range(1, 9), range(9, 13)
CLIP = 0.1


def losses(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0]).flatten(1).square().sum(1)


def run_of(name: str, strategy: str = "bookkeeping", clip: float = CLIP) -> Run:
    torch.manual_seed(3)
    model = zoo.MODELS[name]()
    return private_run(
        model=model,
        loss_fn=losses,
        dtype=torch.float64,
        sigma=0,
        clip=clip,
        strategy=strategy,
        physical_batch_size=12,
    )


def clipped_by_layer(run: Run, indices: range) -> dict[str, Tensor]:
    gradients = run.gradients(indices)
    limit = CLIP / math.sqrt(len(gradients[0]))
    parts = {
        name: [g[name] * min(1.0, limit / max(norm_of({name: g[name]}), 1e-300)) for g in gradients]
        for name in gradients[0]
    }
    return {name: torch.stack(part).sum(0) for name, part in parts.items()}


def check(run: Run, batch: int, strategy: str) -> None:
    indices = range(batch)
    data = run.data[list(indices)]
    with run.optimizer.tape.paused(), torch.no_grad():
        plain = losses(run.model, data)
    private = losses(run.model, data)
    run.optimizer.tape.discard()
    torch.testing.assert_close(private.detach(), plain, rtol=1e-10, atol=1e-12)
    by_layer = strategy == "per_layer"
    expected = clipped_by_layer(run, indices) if by_layer else run.clipped_sum(indices)
    released = run.release(indices)
    scale = norm_of(expected)
    for name, total in expected.items():
        error = float((released[name].double() * 8 - total).norm())
        assert error <= 1e-5 * max(float(total.norm()), 1e-2 * scale), (
            name,
            batch,
            error,
            float(total.norm()),
        )


@pytest.mark.thinned(5)
@pytest.mark.parametrize("name", zoo.MODELS)
def test_shared_tensors_stay_shared_at_every_batch_size(name: str) -> None:
    """A fresh model each time: that the first batch is as large as T, or the number of heads, changes nothing."""
    for batch in BATCHES:
        check(run_of(name), batch, "bookkeeping")


@pytest.mark.thinned(5)
@pytest.mark.parametrize(
    ("name", "strategy"), covering(zoo.MODELS, ["mixed", "two_pass", "per_layer"], together=1)
)
def test_shared_tensors_stay_shared_in_every_strategy(name: str, strategy: str) -> None:
    run = run_of(name, strategy)
    for batch in (zoo.T, *BATCHES):
        check(run, batch, strategy)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["bookkeeping", "mixed", "two_pass", "per_layer"])
@pytest.mark.parametrize("name", zoo.MODELS)
def test_and_in_larger_batches(name: str, strategy: str) -> None:
    run = run_of(name, strategy)
    for batch in (zoo.T, *LARGER):
        check(run_of(name) if strategy == "bookkeeping" else run, batch, strategy)


# --- what has no right answer is refused by name, before anything is spent


class Refused(zoo.Zoo):
    how = staticmethod(lambda h: h)

    def middle(self, h: Tensor) -> Tensor:
        return self.how(h)


REFUSED: dict[str, Any] = {
    "rows sorted by length": lambda h: h[h.detach()[:, 0, 0].argsort()],
    "rows rolled": lambda h: h.roll(1, 0),
    "a mean over the batch": lambda h: h + 0.5 * h.mean(0),
    "softmax over the batch": lambda h: h.softmax(0),
    "the first example for all": lambda h: h + 0.1 * h[:1],
    "read as [T, B, D]": lambda h: h.reshape(zoo.T, len(h), zoo.D).transpose(0, 1),
}


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("name", "strategy"),
    covering(
        REFUSED, ["bookkeeping", "two_pass", "per_layer"], together=1, also=[("rows rolled", "bookkeeping")]
    ),
)
def test_rows_that_are_not_the_examples_are_refused(name: str, strategy: str) -> None:
    """Without the row check: see `test_planted_no_row_check_lets_permuted_rows_through`."""
    for batch in (5, 7):
        model = Refused()
        model.how = REFUSED[name]
        run = private_run(model=model, loss_fn=losses, strategy=strategy, physical_batch_size=12)
        with pytest.raises(RowError, match=r"'first': \d of the \d rows of its output gradient"):
            run.release(range(batch))
        assert run.engine.steps == 0
        with pytest.raises(SelfCheckError):
            run.engine.self_check(losses, run.data[list(range(batch))])


def test_rows_back_in_their_order_are_right_where_nothing_is_trained_between() -> None:
    class Unsorted(Refused):
        def middle(self, h: Tensor) -> Tensor:
            order = h.detach()[:, 0, 0].argsort()
            return torch.tanh(h[order])[order.argsort()]

    torch.manual_seed(0)
    run = private_run(model=Unsorted(), loss_fn=losses, dtype=torch.float64, sigma=0, clip=CLIP)
    check(run, 7, "bookkeeping")


def test_a_row_check_comes_with_a_parameter_that_was_not_seen() -> None:
    """A layer that joins in the sixth backward: neither its number nor that of the step before is a power of two."""

    class Late(zoo.Zoo):
        def __init__(self) -> None:
            super().__init__()
            self.late, self.calls = nn.Linear(zoo.D, zoo.D), 0

        def middle(self, h: Tensor) -> Tensor:
            self.calls += 1
            return h if self.calls < 8 + 6 else self.late(h.roll(1, 0)).roll(-1, 0)

    run = private_run(model=Late(), loss_fn=losses, sigma=0)
    for _ in range(5):
        run.release(range(5))
    with pytest.raises(RowError, match="late"):
        run.release(range(5))


def test_a_call_that_contradicts_what_was_learnt_raises() -> None:
    axes = batch_axis.BatchAxes()
    site = batch_axis.Site("encoder.table", "its ids", 0)
    assert axes.of(site, (4, 9), 4) == 0
    assert axes.assumed
    assert axes.of(site, (7, 9), 7) == 0
    axes.begin_forward()
    assert not axes.assumed
    assert axes.of(site, (9, 9), 9) == 0
    assert axes.assumed  # two axes of that size: the gradients are asked
    axes.confirm()
    axes.begin_forward()
    assert axes.of(site, (9, 9), 9) == 0
    assert not axes.assumed
    with pytest.raises(
        ValueError, match=r"'encoder\.table': .* its ids in a forward of 6 examples: the shape is \(1, 9\)"
    ):
        axes.of(site, (1, 9), 6)
    shared = batch_axis.Site("encoder.table", "its ids", 1)
    assert axes.of(shared, (9, 9), 4) is None
    assert axes.of(shared, (9, 9), 9) is None


def test_a_model_that_computes_with_one_batch_size_only_is_confirmed_by_its_gradients() -> None:
    class OneSize(zoo.MODELS["PositionTable"]):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            assert len(x) == 7
            return super().forward(x)

    torch.manual_seed(0)
    run = private_run(model=OneSize(), loss_fn=losses, sigma=0)
    run.release(range(7))
    assert run.optimizer.tape.axes.assumed is False  # between forwards
    model = OneSize()
    model.middle = lambda h: h * model.places(torch.arange(7) % 4).mean(1)[:4, None]  # type: ignore[method-assign]
    run = private_run(model=model, loss_fn=losses, sigma=0)
    with pytest.raises(
        RowError, match="places"
    ):  # 7 ids in a batch of 7: no other call tells that they are shared
        run.release(range(7))


# --- planted faults


def test_planted_an_axis_by_its_size_alone_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_size(axes: Any, site: Any, shape: tuple[int, ...], size: int) -> int | None:
        return next((axis for axis, length in enumerate(shape) if length == size), None)

    monkeypatch.setattr(batch_axis.BatchAxes, "of", by_size)
    with pytest.raises(RowError):
        check(run_of("PositionsAlone"), zoo.T, "bookkeeping")
    monkeypatch.setattr(row_check.RowCheck, "due", lambda *_: False)
    with pytest.raises((AssertionError, RuntimeError)):
        check(run_of("PositionsAlone"), zoo.T, "bookkeeping")


def test_planted_no_row_check_lets_permuted_rows_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_check.RowCheck, "due", lambda *_: False)
    model = Refused()
    model.how = REFUSED["rows rolled"]
    run = private_run(model=model, loss_fn=losses, dtype=torch.float64, sigma=0, clip=CLIP)
    with pytest.raises(AssertionError):
        check(run, 7, "bookkeeping")


def test_planted_rows_of_shared_tensors_that_are_sliced_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A leaf's positions [T] cut up like its input [B, T, D] where T = B."""
    monkeypatch.setattr(leaf_calls, "_adds_up", lambda *_: True)
    with pytest.raises(AssertionError):
        check(run_of("ZeroAtFirst"), zoo.T, "bookkeeping")


@pytest.mark.parametrize("batch", [4, 5])
def test_layers_that_hold_a_batch_of_their_own_layout(batch: int) -> None:
    """torch's attention, Transformer and recurrent layers in their default layout [T, B, D], through the row check."""

    class Layers(zoo.Zoo):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(zoo.D, 2)
            self.encoder = nn.TransformerEncoderLayer(zoo.D, 2, 8, dropout=0.0)
            self.recurrent = nn.LSTM(zoo.D, zoo.D)

        def middle(self, h: Tensor) -> Tensor:
            t = h.transpose(0, 1)
            return self.recurrent(self.encoder(t + self.attention(t, t, t.flip(0))[0]))[0].transpose(0, 1)

    torch.manual_seed(0)
    run = private_run(model=Layers(), loss_fn=losses, dtype=torch.float64, sigma=0, clip=CLIP)
    check(run, batch, "bookkeeping")


@pytest.mark.parametrize("before", [True, False], ids=["trained before it", "nothing trained before it"])
def test_a_reentrant_checkpoint_hides_rows_and_is_refused(before: bool) -> None:
    class Reentrant(zoo.Zoo):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(zoo.D, zoo.D)

        def block(self, h: Tensor) -> Tensor:
            h = self.inner(h)
            return h + 0.5 * h.mean(0, keepdim=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x) if before else x.detach().requires_grad_()
            y: Tensor = self.last(checkpoint(self.block, x, use_reentrant=True))
            return y

    run = private_run(model=Reentrant(), loss_fn=losses)
    with pytest.raises(RowError, match="use_reentrant=False"):
        run.release(range(5))
    assert run.engine.steps == 0
    with pytest.raises(
        RowError if before else SelfCheckError, match="use_reentrant=False" if before else "inner"
    ):
        run.engine.self_check(losses)


@pytest.mark.parametrize("leaf", [True, False])
def test_a_forward_that_asks_what_its_parameter_is_is_refused(leaf: bool) -> None:
    """What is read in place of a raw parameter is no tensor: a module that asks computes something else."""

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = zoo.weights(zoo.D)
            self.child = nn.Identity() if leaf else nn.Linear(zoo.D, zoo.D)

        def forward(self, x: Tensor) -> Tensor:
            return self.child(x) * (self.w if torch.is_tensor(self.w) else 3.0)

    run = private_run(model=nn.Sequential(nn.Linear(6, zoo.D), Asks()), loss_fn=losses)
    with pytest.raises(RuntimeError, match="another function than the plain"):
        run.release(range(5))


class BatchStatistic(zoo.ByHand):
    shape = (2, zoo.D)

    def middle(self, h: Tensor) -> Tensor:
        x = h.transpose(1, 2)
        return torch.nn.functional.batch_norm(x, None, None, self.w[0], self.w[1], True)


def test_a_function_that_mixes_examples_is_refused_in_every_micro_batch() -> None:
    run = private_run(model=BatchStatistic(), loss_fn=losses)
    for batch in (5, 5, 4, 6):
        with pytest.raises(NotImplementedError, match=r"'BatchStatistic\.w': .*batch_norm"):
            losses(run.model, run.data[list(range(batch))])
    zero = BatchStatistic()
    torch.nn.init.zeros_(zero.w)
    run = private_run(model=zero, loss_fn=losses)
    losses(run.model, run.data[:1])
    with pytest.raises(NotImplementedError, match=r"depends on the others|batch_norm"):
        losses(run.model, run.data[:5])


class ChannelNorm(zoo.Zoo):
    """A norm over channels of codes [K, C] with K = C: of [B, K, C] it would take K for them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.codes = nn.GroupNorm(1, zoo.D), zoo.weights(zoo.D, zoo.D)

    def middle(self, h: Tensor) -> Tensor:
        return h * self.norm(self.codes).prod(0)


def test_channels_of_what_examples_share_are_not_taken_for_others() -> None:
    run = private_run(model=ChannelNorm(), loss_fn=losses)
    with pytest.raises(
        NotImplementedError, match=r"'ChannelNorm\.codes': an input \(6, 6\) of 'norm', without the batch"
    ):
        run.release(range(5))


def test_two_of_eight_rows_that_change_places_are_found_every_time() -> None:
    model = Refused()
    model.how = lambda h: torch.cat([h[1:2], h[:1], h[2:]])
    for _ in range(20):
        run = private_run(model=model, loss_fn=losses)
        with pytest.raises(RowError):
            run.release(range(8))
        detach(run.model)


def test_a_very_confident_example_is_no_other_examples() -> None:
    """Gradients below float32's normal numbers."""

    class Sure(nn.Linear):
        pass

    model = nn.Sequential(nn.Flatten(), Sure(24, 3))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].weight[0, 0] = 1
    run = private_run(model=model, sigma=0)
    x = run.data.tensors[0]
    x[:, 0, 0] = torch.linspace(85, 100, len(x))
    labels = torch.zeros(len(x), dtype=torch.long)
    run.optimizer.begin_logical_batch(40)
    run.optimizer.backward(torch.nn.functional.cross_entropy(run.model(x), labels, reduction="none"))


def test_a_time_first_layer_behind_a_gate_that_is_zero() -> None:
    class Gated(zoo.Zoo):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.gate = nn.Linear(zoo.D, zoo.D), nn.Parameter(torch.zeros(()))

        def middle(self, h: Tensor) -> Tensor:
            return h + self.gate * self.inner(h.transpose(0, 1)).transpose(0, 1)

    run = private_run(
        model=Gated(), loss_fn=losses, dtype=torch.float64, sigma=0, clip=CLIP, physical_batch_size=12
    )
    check(run, zoo.T, "bookkeeping")
    with torch.no_grad():
        run.model.gate.fill_(0.5)
    for batch in (zoo.T, 5, zoo.T):
        check(run, batch, "bookkeeping")


class Remembering(nn.Module):
    """Notes, whenever it is called, how many of its earlier outputs still exist."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 7), nn.Linear(7, 2)
        self.outputs: list[weakref.ref[Tensor]] = []
        self.alive: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.alive.append(sum(earlier() is not None for earlier in self.outputs))
        hidden = self.inner(x).exp()  # autograd saves its result
        self.outputs.append(weakref.ref(hidden))
        return self.outer(hidden)


def test_asking_at_other_sizes_keeps_no_activations() -> None:
    run = private_run(model=Remembering(), loss_fn=losses, sigma=0, physical_batch_size=1)
    run.model(run.data[:1][0])
    assert len(run.model.alive) == 9  # four forwards at each of two sizes, and the private one
    assert not any(run.model.alive)


class TakesGradients(nn.Module):
    """A forward that needs what autograd saves: the output has the inner layer's derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        at = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.inner(at).tanh().sum(), at)
        return self.outer(slope)


def test_a_forward_that_takes_gradients_is_asked_with_them(caplog: pytest.LogCaptureFixture) -> None:
    model = TakesGradients()
    model.inner.requires_grad_(False)
    run = private_run(model=model, loss_fn=losses, sigma=0, physical_batch_size=4)
    with caplog.at_level("INFO", "dpkernels"):
        run.model(run.data[:4][0])
    assert "batch axes: the model's forward" not in caplog.text
