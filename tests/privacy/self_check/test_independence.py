"""privacy.md 12 and 13: an example's gradient is its own; the self-check names the layer where it is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from dpkernels.nn import LinearRecord, RowError
from dpkernels.privacy import SelfCheckError
from dpkernels.privacy.sampling.rows import rows_of
from tests.privacy.private_run import Net, Run, private_run


def padded_batch() -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Three examples of 5, 3 and 2 frames: padded together, and each alone."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(n, 6, generator=generator) for n in (5, 3, 2)]
    x = torch.zeros(3, 5, 6)
    for i, row in enumerate(rows):
        x[i, : len(row)] = row
    lengths = torch.tensor([5, 3, 2])
    y = torch.tensor([0, 1, 2])
    singles = [
        {"x": row.unsqueeze(0), "lengths": lengths[i : i + 1], "y": y[i : i + 1]}
        for i, row in enumerate(rows)
    ]
    return {"x": x, "lengths": lengths, "y": y}, singles


class Masked(nn.Module):
    """Means over an utterance's own frames."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 8)
        self.middle = self.between()
        self.last = nn.Linear(8, 3)
        self.dropout = nn.Dropout(0.5)

    def between(self) -> nn.Module:
        return nn.Identity()

    def pool(self, h: Tensor, lengths: Tensor) -> Tensor:
        mask = (torch.arange(h.shape[1]) < lengths[:, None]).unsqueeze(-1)
        return (h * mask).sum(1) / lengths[:, None]

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        h = self.middle(torch.tanh(self.inner(x)))
        return self.last(self.dropout(self.pool(h, lengths)))


def masked_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch["x"], batch["lengths"]), batch["y"], reduction="none")


class PaddingLeak(Masked):
    def pool(self, h: Tensor, lengths: Tensor) -> Tensor:
        return h.mean(1)


class BatchMean(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h - h.mean(0, keepdim=True)


class MatesLeak(Masked):
    def between(self) -> nn.Module:
        return BatchMean()


class TrainOnlyLeak(Masked):
    """Batch statistics in training mode only, as BatchNorm, and without dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.0)

    def between(self) -> nn.Module:
        class Centre(nn.Module):
            def forward(self, h: Tensor) -> Tensor:
                return h - h.mean(0, keepdim=True) if self.training else h

        return Centre()


def self_checked(model: nn.Module, loss_fn: Callable = masked_losses, *, alone: bool = True) -> object:
    batch, singles = padded_batch()
    run = private_run(model=model)
    return run.engine.self_check(loss_fn, batch, singles=singles if alone else None)


def test_independent_examples_pass() -> None:
    for alone in (True, False):
        report = self_checked(Masked(), alone=alone)
        assert report.differences  # type: ignore[attr-defined]
        assert report.differences[0].error < 1e-4  # type: ignore[attr-defined]
        assert report.first_module is None  # type: ignore[attr-defined]
        assert 0.99 < report.norm_shortfall <= 1.0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("model", "alone", "named"),
    [
        (
            PaddingLeak,
            True,
            "dropout",
        ),  # what the padding leaks into is the first module's input that differs
        (MatesLeak, True, "middle"),
        (MatesLeak, False, "middle"),
        (TrainOnlyLeak, False, "middle"),
    ],
)
def test_leaks_are_found_and_the_layer_named(model: type[nn.Module], alone: bool, named: str) -> None:
    with pytest.raises(SelfCheckError, match="NOT PRIVATE") as caught:
        self_checked(model(), alone=alone)
    report = caught.value.report
    assert report.failures
    assert "inner.weight" in str(caught.value)
    assert report.first_module == named
    assert f": {named}." in str(caught.value)


def test_a_loss_that_mixes_examples_is_found() -> None:
    def mixing(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        losses = masked_losses(model, batch)
        return losses * losses.mean()

    with pytest.raises(SelfCheckError, match=r"last\.weight"):
        self_checked(Masked(), mixing)


def test_a_wrong_norm_rule_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = LinearRecord.norm_sq
    monkeypatch.setattr(LinearRecord, "share", lambda self: None)  # alone, not in the call for all
    monkeypatch.setattr(LinearRecord, "norm_sq", lambda self: original(self) * 0.5)
    with pytest.raises(SelfCheckError, match="too small"):
        self_checked(Masked())


def test_a_wrong_sum_rule_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = LinearRecord.add_weighted_sum

    def shifted(self: LinearRecord, factors: Tensor, sums: dict) -> None:
        original(self, factors.roll(1), sums)  # the batch axis taken wrongly

    monkeypatch.setattr(LinearRecord, "share", lambda self: None)  # alone, not in the call for all
    monkeypatch.setattr(LinearRecord, "add_weighted_sum", shifted)
    with pytest.raises(SelfCheckError, match=r"inner\.weight"):
        self_checked(Masked())


def test_a_reduced_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="reduction='none'"):
        self_checked(Masked(), lambda model, batch: masked_losses(model, batch).mean())


def test_the_check_leaves_no_trace() -> None:
    run = private_run(model=Masked())
    batch, singles = padded_batch()
    weights = {name: p.clone() for name, p in run.model.named_parameters()}
    hooks = [list(module._forward_hooks) for module in run.model.modules()]
    run.engine.self_check(masked_losses, batch, singles=singles)
    assert run.model.training
    assert run.model.dropout.training
    assert all(p.grad is None for p in run.model.parameters())
    assert all(p.equal(weights[name]) for name, p in run.model.named_parameters())
    assert [list(module._forward_hooks) for module in run.model.modules()] == hooks
    assert run.engine.steps == 0
    assert not run.optimizer.tape.is_open


def test_samples_are_taken_from_nested_batches() -> None:
    x = torch.arange(6.0).view(3, 2)
    batch = {"x": x, "pair": (x, "kept"), "texts": ["a", "b", "c"], "scale": torch.ones(())}
    taken = rows_of(batch, 3).taken(batch, [1])
    assert taken["x"].tolist() == [[2.0, 3.0]]
    assert taken["pair"][0].tolist() == [[2.0, 3.0]]
    assert taken["pair"][1] == "kept"
    assert taken["texts"] == ["b"]
    assert taken["scale"].shape == ()


# --- a private gradient does not depend on the rest of the batch or on padding


def released(run: Run, index: int, others: tuple[int, ...]) -> Tensor:
    """What `index` adds to the sum when it is processed along with others."""
    run.begin(len(others) + 1)
    run.optimizer.tape.open(len(others) + 1)
    run.loss_fn(run.model, run.data[[index, *others]]).sum().backward()
    factors = torch.zeros(len(others) + 1)
    factors[0] = 1
    sums = {p: torch.zeros(p.shape, dtype=torch.float64) for p in run.model.parameters()}
    for record in run.optimizer.tape.close():
        record.add_weighted_sum(factors, sums)
    return torch.cat([total.flatten() for total in sums.values()])


def test_the_rest_of_the_batch_does_not_change_what_an_example_adds() -> None:
    run = private_run()
    alone = released(run, 0, ())
    for others in ((1,), (2, 3, 4)):
        torch.testing.assert_close(released(run, 0, others), alone, rtol=1e-5, atol=1e-7)


# --- dropout: per-example draws; the same masks in every pass


class WithDropout(Net):
    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        self.shared = shared

    def drop(self, h: Tensor) -> Tensor:
        mask = (torch.rand(h[:1].shape if self.shared else h.shape) < 0.5).to(h.dtype)
        return h * mask * 2

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.norm(torch.tanh(self.first(x))))).mean(1)


def check_draws_are_per_example(model: nn.Module) -> None:
    """Two copies of one example in a batch get masks of their own, so gradients of their own."""
    run = private_run(model=model)
    run.data.tensors[0][1] = run.data.tensors[0][0]
    run.data.tensors[1][1] = run.data.tensors[1][0]
    run.optimizer.tape.open(2)
    run.loss_fn(run.model, run.data[[0, 1]]).sum().backward()
    norms = sum(record.norm_sq() for record in run.optimizer.tape.close())
    assert norms[0] != norms[1], "examples share one dropout draw"


def test_dropout_is_drawn_per_example() -> None:
    check_draws_are_per_example(WithDropout())


def test_planted_shared_dropout_is_caught() -> None:
    with pytest.raises(AssertionError):
        check_draws_are_per_example(WithDropout(shared=True))


class Checkpointed(WithDropout):
    """The inner part is recomputed in the backward."""

    def __init__(self, keep_masks: bool) -> None:
        super().__init__()
        self.keep_masks = keep_masks

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(
            lambda t: self.drop(self.norm(torch.tanh(self.first(t)))),
            x.requires_grad_(),
            use_reentrant=False,
            preserve_rng_state=self.keep_masks,
        )
        return self.last(h).mean(1)


def step_under_seed(model: nn.Module) -> Tensor:
    run = private_run(sigma=0, model=model)
    torch.manual_seed(5)
    total = run.release((0, 1, 2, 3), (4, 5))
    return torch.cat([part.flatten() for part in total.values()])


@pytest.fixture
def same_weights() -> Callable[[nn.Module], nn.Module]:
    torch.manual_seed(2)
    state = WithDropout().state_dict()

    def load(model: nn.Module) -> nn.Module:
        model.load_state_dict(state)
        return model

    return load


def test_recomputed_passes_see_the_same_masks(same_weights: Callable) -> None:
    plain = step_under_seed(same_weights(WithDropout()))
    again = step_under_seed(same_weights(Checkpointed(keep_masks=True)))
    torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-8)


def test_planted_fresh_masks_in_the_recomputation_are_caught(same_weights: Callable) -> None:
    plain = step_under_seed(same_weights(WithDropout()))
    with pytest.raises((AssertionError, RowError)):
        torch.testing.assert_close(
            step_under_seed(same_weights(Checkpointed(keep_masks=False))), plain, rtol=1e-5, atol=1e-8
        )


def test_a_check_of_no_example_is_refused() -> None:
    run = private_run(model=Masked())
    with pytest.raises(ValueError, match="batch holds no example"):
        run.engine.self_check(masked_losses, [part[:0] for part in run.data[:4]])


def test_what_is_no_batch_is_refused_with_the_mend() -> None:
    run = private_run()
    for given in (run.loader, run.data, DataLoader(run.data)):
        with pytest.raises(TypeError, match=f"{type(given).__name__}; give a function of model and batch"):
            run.engine.self_check(run.loss_fn, given)
    with pytest.raises(TypeError, match=r"got list and function"):
        run.engine.self_check([run.data[:2]], run.loss_fn)  # type: ignore[arg-type]


def test_a_logical_batch_taken_for_a_batch_says_how_it_is_read() -> None:
    run = private_run()
    logical = next(iter(run.loader))
    with pytest.raises(TypeError, match=r"logical_batch\[0\]: .*for batch in logical_batch"):
        logical[0]
    with pytest.raises(RuntimeError, match=r"Was step\(\) called after a micro-batch"):
        run.optimizer.step()


@pytest.mark.parametrize("steps", [0, 2.5])
def test_steps_are_a_whole_number(steps: float) -> None:
    with pytest.raises(ValueError, match=f"steps must be a whole number >= 1, got {steps}"):
        private_run(steps=steps)
