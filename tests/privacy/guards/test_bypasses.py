"""Ways around clipping, noise and the count that ordinary use can stumble into: each refused, by name.

For every refusal the fault is planted: without the check the same use goes through and harms the claim.
"""

from __future__ import annotations

import contextlib
import copy
import math
import multiprocessing
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from dpkernels.privacy import LedgerError, PrivacyEngine, plan_sampling, read_ledger
from dpkernels.privacy.accounting.ledger import Ledger
from dpkernels.privacy.guards import model as guard_module
from dpkernels.privacy.sampling.arrow_rows import chunks_repeat
from dpkernels.privacy.sampling.plan import speaker_ids
from dpkernels.privacy.step.sums import BatchSums
from tests.privacy.private_run import Net, Run, losses_of, private_run, train
from tests.warned import no_warnings

# --- parameters that the optimizer would step past clipping and noise


def half_frozen() -> Net:
    model = Net()
    model.first.requires_grad_(False)
    return model


def stepping_with_a_raw_gradient(run: Run) -> torch.Tensor:
    """A frozen parameter that the optimizer holds gets a gradient of private data; how far a step moves it."""
    weight = run.model.first.weight
    run.optimizer.param_groups[0]["params"].append(weight)
    run.optimizer._guard._held.add(id(weight))
    weight.grad = torch.ones_like(weight)
    before = weight.detach().clone()
    run.optimizer.step()
    return (weight - before).abs().max()


def test_a_frozen_parameter_with_a_gradient_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"not trained but have a \.grad"):
        stepping_with_a_raw_gradient(private_run(model=half_frozen(), lr=1.0))


def test_planted_unchecked_gradient_moves_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_module, "check_no_gradient", lambda parameters: None)
    assert stepping_with_a_raw_gradient(private_run(model=half_frozen(), lr=1.0, unfused=True)) == 1.0


def test_the_fused_step_would_not_step_a_raw_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_module, "check_no_gradient", lambda parameters: None)
    assert stepping_with_a_raw_gradient(private_run(model=half_frozen(), lr=1.0)) == 0.0


def test_make_private_refuses_gradients_left_over_on_frozen_parameters() -> None:
    model = half_frozen()
    model.first.weight.grad = torch.ones_like(model.first.weight)
    data = DataLoader(TensorDataset(torch.randn(20, 4, 6), torch.zeros(20).long()), batch_size=5)
    with pytest.raises(RuntimeError, match="zero_grad"):
        PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=data,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )


def test_a_parameter_added_to_the_optimizer_later_is_refused() -> None:
    run = private_run()
    run.optimizer.param_groups[0]["params"].append(nn.Parameter(torch.zeros(3)))
    with pytest.raises(RuntimeError, match="did not hold at make_private"):
        run.optimizer.step()


def test_hooks_that_see_gradients_before_clipping_are_refused() -> None:
    model = Net()
    model.first.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.raises(ValueError, match=r"first\.weight"):
        private_run(model=model)


# --- constants that the accounting rests on


@pytest.mark.parametrize("name", ["noise_multiplier", "max_grad_norm", "sensitivity", "expected_batch_size"])
def test_what_is_accounted_cannot_be_changed_afterwards(name: str) -> None:
    run = private_run()
    with pytest.raises(AttributeError, match=f"optimizer.{name} is fixed"):
        setattr(run.optimizer, name, 1e-6)


# --- logical batches processed in part


def zero_grad_between(run: Run) -> None:
    for part in ([0, 1], [2]):
        run.optimizer.zero_grad()
        run.optimizer.backward(run.loss_fn(run.model, run.data[part]))


def losses_added_up(run: Run) -> None:
    first, second = (run.loss_fn(run.model, run.data[part]) for part in ([0], [1]))
    run.optimizer.backward(first + second)


@pytest.mark.parametrize("use", [zero_grad_between, losses_added_up])
def test_a_batch_processed_in_part_is_refused_and_costs_nothing(use: Callable[[Run], None]) -> None:
    run = private_run()
    run.optimizer.begin_logical_batch(3)
    use(run)
    with pytest.raises(RuntimeError, match="fewer examples"):
        run.optimizer.step()
    assert run.engine.steps == 0


def test_an_interrupt_within_a_backward_invalidates_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    run = private_run()
    run.optimizer.begin_logical_batch(2)
    real = BatchSums.add

    def interrupted(self: object, *arguments: object) -> None:
        real(self, *arguments)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(BatchSums, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.optimizer.backward(run.loss_fn(run.model, run.data[[0, 1]]))
    with pytest.raises(RuntimeError, match="zero_grad"):
        run.optimizer.backward(run.loss_fn(run.model, run.data[[0, 1]]))


# --- data that reaches the saved model without noise


class Running(nn.Module):
    """A layer whose running mean is a statistic of what it sees."""

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.net = Net()
        self.register_buffer("seen", torch.zeros(6), persistent=persistent)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.seen.lerp_(x.mean((0, 1)), 0.1)
        return self.net(x)


def test_buffers_that_record_the_data_are_refused_by_name() -> None:
    run = private_run(model=Running(persistent=True))
    run.optimizer.begin_logical_batch(2)
    losses = run.loss_fn(run.model, run.data[[0, 1]])
    with pytest.raises(RuntimeError, match="seen"):
        run.optimizer.backward(losses)
    with pytest.raises(RuntimeError, match="seen"):
        run.optimizer.step()
    assert run.engine.steps == 0


def by_data(buffer: torch.Tensor, mean: torch.Tensor) -> None:
    buffer.data.mul_(0.9).add_(mean)


def by_other_data(buffer: torch.Tensor, mean: torch.Tensor) -> None:
    buffer.data = buffer.data.lerp(mean, 0.1)


def by_numpy(buffer: torch.Tensor, mean: torch.Tensor) -> None:
    buffer.numpy()[:] = mean.numpy()


@pytest.mark.parametrize("write", [by_data, by_other_data, by_numpy])
def test_buffers_written_past_autograd_are_refused_by_name(
    write: Callable[[torch.Tensor, torch.Tensor], None],
) -> None:
    """No version counter tells of it."""

    class Written(Running):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                write(self.seen, x.mean((0, 1)))
            return self.net(x)

    run = private_run(model=Written(persistent=True))
    with pytest.raises(RuntimeError, match="seen"):
        run.release((0, 1))
    assert run.engine.steps == 0


def test_a_replaced_buffer_does_not_hide_behind_the_first_ones_identity() -> None:
    """A module that is called twice in a forward: the second mean may come to lie where the first buffer was."""

    class Replaced(Running):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, mean = id(self.seen), x.mean((0, 1))
            self.seen = self.seen.lerp(mean, 0.1)
            kept = []
            while id(self.seen) != first and len(kept) < 1000:
                kept.append(self.seen)
                self.seen = self.seen.clone()
            return self.net(x)

    run = private_run(model=Replaced(persistent=True))
    run.optimizer.begin_logical_batch(2)
    with pytest.raises(RuntimeError, match="seen"):
        run.optimizer.backward(run.loss_fn(run.model, run.data[[0, 1]]))


@pytest.mark.parametrize("change", ["written", "added"])
def test_buffers_that_change_after_the_last_backward_are_refused_by_name(change: str) -> None:
    run = private_run(model=Running(persistent=True), loss_fn=lambda model, b: losses_of(model.net, b))
    for _ in range(2):  # the third step is one at which values are not compared
        run.release((0, 1))
    run.optimizer.begin_logical_batch(2)
    run.optimizer.backward(run.loss_fn(run.model, run.data[[0, 1]]))
    if change == "written":
        run.model.seen.add_(1)
    else:
        run.model.net.last.register_buffer("late", torch.ones(1))
    with pytest.raises(RuntimeError, match="seen" if change == "written" else r"net\.last\.late"):
        run.optimizer.step()
    assert run.engine.steps == 2


def test_buffers_that_stay_are_no_trouble_also_with_nan() -> None:
    model = Net()
    model.register_buffer("table", torch.tensor([1.0, math.nan, -math.inf]))
    model.register_buffer("count", torch.tensor(3))
    assert train(private_run(model=model), 5) == 5


def test_buffers_that_are_never_saved_must_not_carry_data_into_later_forwards() -> None:
    run = private_run(model=Running(persistent=False))
    with pytest.raises(RuntimeError, match="that are not saved changed: 'seen'"):
        train(run, 2)
    assert run.engine.steps == 0


def test_a_table_that_grows_is_no_trouble_until_it_is_rewritten() -> None:
    class Positions(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.zeros(1), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(self.table) < x.shape[1]:
                self.table = torch.arange(float(x.shape[1]))
            return super().forward(x)

    run = private_run(model=Positions())
    assert train(run, 4) == 4
    run.model.table.data.mul_(2)
    with pytest.raises(RuntimeError, match="that are not saved changed: 'table'"):
        run.engine.get_epsilon(1e-5)


def test_a_buffer_written_late_is_found_before_an_epsilon_is_told() -> None:
    """At a step whose values are not compared, and that no later one would see."""

    class Late(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))
            self.calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls == 8 + 5:  # after the forwards that ask for batch axes
                self.seen.data.copy_(x.detach().sum()[None])
            return super().forward(x)

    run = private_run(model=Late())
    for _ in range(5):
        run.release((0, 1))
    for told in (lambda: run.engine.get_epsilon(1e-5), run.engine.state_dict):
        with pytest.raises(RuntimeError, match=r"past autograd .*: 'seen'"):
            told()


def test_extra_state_that_records_the_data_is_refused_by_name() -> None:
    class Scaled(nn.Identity):
        def __init__(self) -> None:
            super().__init__()
            self.largest = torch.zeros(())

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            if self.training:
                self.largest = torch.maximum(self.largest, input.detach().abs().max())
            return input

        def get_extra_state(self) -> torch.Tensor:
            return self.largest

        def set_extra_state(self, state: torch.Tensor) -> None:
            self.largest = state

    run = private_run(model=nn.Sequential(Scaled(), Net()))
    with pytest.raises(RuntimeError, match="extra state of modules changed: '0'"):
        run.release((0, 1))


class Codes(Net):
    """Keeps the first batch in a parameter, one way or another."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.calls = how, 0
        self.book = nn.Embedding(4, 6, max_norm=1e-3 if how == "max_norm" else None)
        self.book.weight.requires_grad_(how == "trained")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.how == "max_norm":
            return super().forward(x + self.book(torch.tensor([1])).detach())
        if self.calls == 1 and self.how != "late":
            self.book.weight.data[:2] = x.detach()[:2, 0]
        if self.calls == 8 + 3 and self.how == "late":
            with torch.no_grad():
                self.book.weight[:2] = x.detach()[:2, 0]
        return super().forward(x + self.book(torch.tensor([[1]] * len(x))))


@pytest.mark.parametrize("how", ["trained", "frozen", "late", "max_norm"])
def test_parameters_that_a_forward_writes_are_refused_by_name(how: str) -> None:
    run = private_run(model=Codes(how))
    with pytest.raises(RuntimeError, match=r"written while the model computed: 'book\.weight'"):
        train(run, 3)
    assert (run.engine.steps > 0) == (how == "late")


def test_parameters_may_be_written_between_a_step_and_the_next_forward() -> None:
    run = private_run(model=Net())
    for _ in range(4):
        run.release((0, 1))
        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter.clamp_(-0.5, 0.5)
                parameter.data.mul_(0.99)
    assert run.engine.steps == 4


@pytest.mark.parametrize("how", ["replaced", "added"])
def test_frozen_parameters_that_a_forward_makes_are_refused_by_name(how: str) -> None:
    class Makes(Net):
        def __init__(self) -> None:
            super().__init__()
            if how == "replaced":
                self.code = nn.Parameter(torch.zeros(6), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.code = nn.Parameter(x.detach().mean((0, 1)), requires_grad=False)
            return super().forward(x)

    run = private_run(model=Makes())
    with pytest.raises(RuntimeError, match=r"frozen parameters were replaced, added or removed .*: 'code'"):
        run.release((0, 1))
    assert run.engine.steps == 0


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(1).expand(5),
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.eye(3).to_sparse_csr(),
        lambda: torch.ones(3, dtype=torch.complex64).conj(),
        lambda: torch.ones(3, dtype=torch.complex64).conj().imag,
        lambda: torch.ones(4, 6).t()[1:, ::2],
        lambda: torch.ones(0),
        lambda: torch.tensor(7, dtype=torch.int8),
    ],
    ids=["expanded", "sparse", "csr", "conjugate", "imaginary", "strided", "empty", "scalar"],
)
def test_frozen_parameters_may_have_any_layout(make: Callable[[], torch.Tensor]) -> None:
    model = Net()
    model.odd = nn.Parameter(make(), requires_grad=False)
    run = private_run(model=model)
    for _ in range(3):
        run.release((0, 1))
    assert run.engine.steps == 3


def test_frozen_parameters_of_inference_mode_have_no_versions_and_are_no_trouble() -> None:
    model = Net()
    with torch.inference_mode():
        model.odd = nn.Parameter(torch.ones(3), requires_grad=False)
    run = private_run(model=model)
    run.release((0, 1))
    assert run.engine.steps == 1


def test_writing_the_same_values_is_no_write() -> None:
    """What max_norm does where no row is too long: every forward, also those whose bits are not all read."""

    class Bounded(Net):
        def __init__(self) -> None:
            super().__init__()
            self.book = nn.Embedding(4, 6, max_norm=100.0)
            self.book.weight.requires_grad_(False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x + self.book(torch.tensor([[1]] * len(x))))

    run = private_run(model=Bounded())
    for _ in range(5):
        run.release((0, 1))
    run.model.book.max_norm = 1e-3
    with pytest.raises(RuntimeError, match=r"written while the model computed: 'book\.weight'"):
        run.release((0, 1))


def test_weights_may_be_loaded_after_an_evaluation_also_where_training_passes_the_forward_by() -> None:
    run = private_run(model=Net(), loss_fn=by_layers)
    for _ in range(2):
        run.release((0, 1))
        with torch.no_grad():
            run.model(run.data[[0]][0])
        run.model.load_state_dict({name: value / 2 for name, value in run.model.state_dict().items()})
    assert run.engine.steps == 2


def test_a_write_within_the_backward_is_seen() -> None:
    class Gradients(Net):
        def __init__(self) -> None:
            super().__init__()
            self.code = nn.Parameter(torch.zeros(8), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = torch.tanh(self.first(x))

            def write(gradient: torch.Tensor) -> None:
                self.code.data.copy_(gradient.mean((0, 1)))

            hidden.register_hook(write)
            return self.last(self.norm(hidden)).mean(1)

    run = private_run(model=Gradients())
    with pytest.raises(RuntimeError, match="written while the model computed: 'code'"):
        run.release((0, 1))
    assert run.engine.steps == 0


def test_a_write_before_the_other_hooks_is_seen() -> None:
    model = Net()
    model.code = nn.Parameter(torch.zeros(6), requires_grad=False)

    def write(module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        module.code.data.copy_(inputs[0].mean((0, 1)))

    model.register_forward_pre_hook(write)
    run = private_run(model=model)
    with pytest.raises(RuntimeError, match="written while the model computed: 'code'"):
        run.release((0, 1))


def test_an_attached_model_can_be_traced_exported_and_copied() -> None:
    run = private_run(model=Net())
    x = run.data[[0, 1]][0]
    expected = run.model.eval()(x)
    for other in (
        torch.jit.trace(run.model, (x,), check_trace=False),
        torch.export.export(run.model, (x,)).module(),
        copy.deepcopy(run.model),
    ):
        assert torch.allclose(other(x), expected)
    run.model.train()
    run.release((0, 1))


def by_layers(model: Net, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The losses, without a call of the model itself."""
    logits = model.last(model.norm(torch.tanh(model.first(batch[0])))).mean(1)
    return nn.functional.cross_entropy(logits, batch[1], reduction="none")


def test_a_step_is_no_write_of_the_model_where_losses_pass_its_forward_by() -> None:
    run = private_run(model=Net(), loss_fn=by_layers, lr=0.1)
    run.model(run.data[[0]][0])  # the only forward that the watch sees
    for _ in range(3):
        run.release((0, 1))
    assert run.engine.steps == 3


def test_instance_norm_with_running_statistics_is_refused() -> None:
    class Normed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.instance = nn.InstanceNorm1d(6, track_running_stats=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(self.instance(x.transpose(1, 2)).transpose(1, 2))

    run = private_run(model=Normed())
    run.optimizer.begin_logical_batch(2)
    with pytest.raises(RuntimeError, match=r"instance\.running_mean"):
        run.optimizer.backward(run.loss_fn(run.model, run.data[[0, 1]]))


# --- dropout under a seed that an attacker knows


def masks() -> torch.Tensor:
    torch.manual_seed(0)
    private_run()
    return torch.rand(4)


def test_generators_are_seeded_anew_by_make_private() -> None:
    assert not torch.equal(masks(), masks())


def test_planted_known_seed_repeats_the_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpkernels.privacy.engine.SecretSeeds", lambda: None)
    assert torch.equal(masks(), masks())


# --- units that are not what they seem


def loader_of(data: object) -> DataLoader:
    return DataLoader(data, batch_size=8)  # type: ignore[arg-type]


class Seeds(torch.utils.data.Dataset[torch.Tensor]):
    """What a worker's generators begin with."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(torch.initial_seed())


def test_workers_draw_from_secret_seeds_also_where_the_loader_has_a_generator() -> None:
    """torch's own advice for repeatable experiments: augmentations drawn by place in the batch would be known."""

    def seeds() -> set[int]:
        given = DataLoader(Seeds(), batch_size=8, num_workers=1, generator=torch.Generator().manual_seed(0))
        model = nn.Linear(1, 1)
        with contextlib.closing(PrivacyEngine()) as engine:
            _, _, loader = engine.make_private(
                module=model,
                optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
                data_loader=given,
                noise_multiplier=1.0,
                max_grad_norm=1.0,
            )
            return {int(seed) for logical in loader for batch in logical for seed in batch}

    assert not seeds() & seeds()


def test_speaker_ids_compare_by_value_whatever_they_come_in() -> None:
    data = loader_of(TensorDataset(torch.zeros(64, 1)))
    speakers = torch.arange(64) // 16
    for given in (speakers, speakers.numpy(), speakers.tolist()):
        plan = plan_sampling(data, unit="speaker", speakers=given, max_examples_per_speaker=2)
        assert (plan.units, plan.sample_rate) == (4, 1.0)
    with pytest.raises(TypeError, match="tensor"):
        speaker_ids(list(speakers))
    for nobody in (None, float("nan")):
        with pytest.raises(ValueError, match=r"speakers\[1\]"):
            speaker_ids(["anna", nobody])


def test_repeated_examples_are_refused() -> None:
    data = TensorDataset(torch.zeros(40, 1))
    whole = Subset(data, range(10, 30))
    plan_sampling(loader_of(ConcatDataset([whole, Subset(data, range(10))])))
    for repeated in (Subset(data, [0] * 20), ConcatDataset([whole, Subset(whole, [3])])):
        with pytest.raises(ValueError, match="repetitions"):
            plan_sampling(loader_of(repeated))


def test_rows_of_one_tensor_in_two_data_sets_are_repetitions() -> None:
    x, y = torch.zeros(40, 2), torch.zeros(40)
    first = TensorDataset(x[:25], y[:25])
    plan_sampling(loader_of(ConcatDataset([first, TensorDataset(x[25:], y[25:])])))
    plan_sampling(
        loader_of(ConcatDataset([first, TensorDataset(x.clone(), y)]))
    )  # as augmented ones would be
    for other in (TensorDataset(x[:25], y[:25]), TensorDataset(x[24:], y[24:]), TensorDataset(x, y)):
        with pytest.raises(ValueError, match="repetitions"):
            plan_sampling(loader_of(ConcatDataset([first, other])))


def test_rows_that_a_list_or_a_hub_data_set_repeats_are_repetitions() -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"x": torch.randn(2)} for _ in range(40)]
    stored = datasets.Dataset.from_dict({"x": [[float(i)] for i in range(40)]})
    for data in (
        rows,
        tuple(rows),
        ["same text"] * 40,
        stored,
        stored.shuffle(seed=1),
        stored.select([3, 1, 2, *range(4, 20)]),
    ):
        plan_sampling(loader_of(data))
    short = stored.select(range(10))
    interleaved = datasets.interleave_datasets([stored, short], stopping_strategy="all_exhausted")
    for data in (rows + rows[:1], [rows[0]] * 40, stored.select([*range(24)] * 2), interleaved):
        with pytest.raises(ValueError, match="repetitions"):
            plan_sampling(loader_of(data))


def test_rows_that_a_table_of_the_hub_holds_twice_are_repetitions() -> None:
    """Concatenation copies nothing: both halves are the same memory. Equal rows of two tables are two examples."""
    datasets = pytest.importorskip("datasets")

    def table(last: int = 40) -> Any:
        columns = {"text": [f"text {i}" for i in range(last)], "size": [*range(last)]}
        columns |= {
            "x": [[float(i)] for i in range(last)],
            "sound": [{"a": i, "b": "c"} for i in range(last)],
        }
        return datasets.Dataset.from_dict(columns)

    first, second = table(), table()
    both = datasets.concatenate_datasets([first, second])
    for data in (both, both.shuffle(seed=1), ConcatDataset([first, second]), first.add_column("y", [0] * 40)):
        plan_sampling(loader_of(data))
    for data in (
        datasets.concatenate_datasets([first, first]),
        datasets.concatenate_datasets([first, first.select(range(30, 40))]),
        datasets.concatenate_datasets([first, second, second.select([39, 0])]),
        datasets.concatenate_datasets([first, first]).shuffle(seed=1),
        ConcatDataset([first, first.select(range(5))]),
        ConcatDataset([both, second]),
    ):
        with pytest.raises(ValueError, match="repetitions"):
            plan_sampling(loader_of(data))


@pytest.mark.parametrize(("kind", "known"), [("StructArray", True), ("FixedSizeListArray", False)])
def test_values_that_begin_within_their_memory_are_told_apart(kind: str, known: bool) -> None:
    """Fields of a struct and lists of a fixed size may begin anywhere in a memory that the column itself does not
    tell; of the latter no repetition is seen."""
    pa = pytest.importorskip("pyarrow")
    numbers = pa.array(range(80), type=pa.int64())
    make = getattr(pa, kind).from_arrays
    first, second = (make([part], ["a"]) if known else make(part, 1) for part in (numbers[:40], numbers[40:]))
    for chunks, repeat in (([first, second], False), ([first, first], known)):
        assert chunks_repeat(SimpleNamespace(data=pa.table({"x": pa.chunked_array(chunks)}))) is repeat


# --- the count


def test_a_ledger_replaced_while_in_use_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    run = private_run(ledger=path)
    train(run, 1)
    text = path.read_bytes()
    path.unlink()
    with pytest.raises(LedgerError, match="deleted"):
        run.optimizer.step()
    path.write_bytes(text)  # an editor or a sync tool: the same lines in another file
    with pytest.raises(LedgerError, match="replaced"):
        run.optimizer.step()


def test_planted_unwatched_ledger_forgets_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ledger, "_check_in_place", lambda self: None)
    path = tmp_path / "ledger.jsonl"
    run = private_run(ledger=path)
    train(run, 1)
    text = path.read_bytes()
    path.unlink()
    path.write_bytes(text)
    train(run, 2)
    assert (run.engine.steps, read_ledger(path).steps) == (3, 1)


def test_steps_that_only_a_checkpoint_knew_of_reach_the_ledger(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    first = private_run()
    train(first, 3)
    second = private_run(ledger=path)
    second.engine.load_state_dict(first.engine.state_dict())
    second.engine.load_state_dict(first.engine.state_dict())  # twice is once
    train(second, 2)
    spent = second.engine.get_epsilon(1e-3)
    second.engine.close()
    assert read_ledger(path).steps == 5
    third = private_run(ledger=path)
    assert third.engine.steps == 5
    assert third.engine.get_epsilon(1e-3) == pytest.approx(spent)


def step_in_child(run: Run, answers: object) -> None:
    try:
        run.optimizer.step()
    except RuntimeError as error:
        answers.put(str(error))  # type: ignore[attr-defined]
    else:
        answers.put("stepped")  # type: ignore[attr-defined]


def test_a_forked_process_does_not_split_the_count() -> None:
    run = private_run()
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of forks where threads exist
        child = context.Process(target=step_in_child, args=(run, answers))
        child.start()
    assert "forked" in answers.get(timeout=60)
    child.join()
    assert run.engine.steps == 0
    assert run.engine._require_budget()._pid == os.getpid()


# --- the self-check


def test_training_without_a_self_check_warns_once() -> None:
    run = private_run()
    with pytest.warns(UserWarning, match="no self_check"):
        run.optimizer.step()
    with no_warnings():
        run.optimizer.step()
    checked = private_run()
    checked.engine.self_check(checked.loss_fn, checked.data[[0, 1, 2]])
    with no_warnings():
        checked.optimizer.step()


class MixesInTraining(Net):
    """Subtracts the batch's mean, in training mode only, beside dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dropout(x)
        return super().forward(x - x.mean(0) if self.training else x)


def test_mixing_in_training_mode_is_seen_through_dropout() -> None:
    run = private_run(model=MixesInTraining())
    with pytest.raises(RuntimeError, match="train mode"):
        run.engine.self_check(run.loss_fn, run.data[[0, 1, 2]])
