"""privacy.md 20: the self-check makes its own batches: padded by others, in another order, of another size, random."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dpkernels import PrivacyEngine
from dpkernels.privacy import SelfCheckError
from dpkernels.privacy.sampling.own_batch import own_batch
from tests.warned import no_warnings

WIDTH, CLASSES = 6, 3
Batch = tuple[Tensor, Tensor, Tensor]


class Sentences(torch.utils.data.Dataset):
    """Examples of 2 to 7 frames, or all of one length."""

    def __init__(self, lengths: Sequence[int] = (4, 2, 7, 3, 5, 6)) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows = [torch.randn(length, WIDTH, generator=generator) for length in lengths]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.rows[index], index % CLASSES


def collate(items: list[tuple[Tensor, int]]) -> Batch:
    x = nn.utils.rnn.pad_sequence([row for row, _ in items], batch_first=True)
    return x, torch.tensor([len(row) for row, _ in items]), torch.tensor([label for _, label in items])


class Classifier(nn.Module):
    """A mean over an example's own frames, or over the padding, too."""

    def __init__(self, *, masked: bool = True) -> None:
        super().__init__()
        self.first, self.last, self.masked = nn.Linear(WIDTH, 8), nn.Linear(8, CLASSES), masked

    def mixed(self, h: Tensor, mask: Tensor) -> Tensor:
        return h

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        mask = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        if not self.masked:
            mask = torch.ones_like(mask)
        h = self.mixed(torch.tanh(self.first(x)), mask)
        pooled: Tensor = self.last((h * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True))
        return pooled


class Attends(Classifier):
    """Attention among the frames, with a mask of the keys or without."""

    def __init__(self, *, keys: bool) -> None:
        super().__init__()
        self.keys = keys

    def mixed(self, h: Tensor, mask: Tensor) -> Tensor:
        seen = mask[:, None, :] if self.keys else None
        return nn.functional.scaled_dot_product_attention(h, h, h, attn_mask=seen)


def losses(model: nn.Module, batch: Batch) -> Tensor:
    x, lengths, labels = batch
    return nn.functional.cross_entropy(model(x, lengths), labels, reduction="none")


def private(
    engine: PrivacyEngine, model: nn.Module, data: Any = None, collate_fn: Any = collate, **arguments: Any
) -> nn.Module:
    torch.manual_seed(0)
    return engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(Sentences() if data is None else data, batch_size=3, collate_fn=collate_fn),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        **arguments,
    )[0]


def given_batch() -> Batch:
    data = Sentences()
    return collate([data[index] for index in range(4)])


@pytest.mark.parametrize("batch", [None, given_batch()], ids=["its own", "a padded batch"])
@pytest.mark.parametrize("leaks", [lambda: Classifier(masked=False), lambda: Attends(keys=False)])
def test_what_depends_on_padding_is_found_by_default(leaks: Callable[[], nn.Module], batch: Any) -> None:
    with closing(PrivacyEngine()) as engine:
        private(engine, leaks())
        with pytest.raises(SelfCheckError, match="padding that is not masked") as caught:
            engine.self_check(losses, batch)
    assert caught.value.report.padded


@pytest.mark.parametrize("batch", [None, given_batch()], ids=["its own", "a padded batch"])
@pytest.mark.parametrize("model", [Classifier, lambda: Attends(keys=True)])
def test_what_masks_its_padding_passes(model: Callable[[], nn.Module], batch: Any) -> None:
    with closing(PrivacyEngine()) as engine, no_warnings():
        private(engine, model())
        report = engine.self_check(losses, batch)
    assert report.padded
    assert not report.unchecked
    assert report.modes == {"eval", "train"}


def test_where_lengths_are_known_the_longest_and_the_shortest_are_taken() -> None:
    """One in a hundred is longer: among evenly spaced examples it need not be."""
    lengths = [3] * 100
    lengths[40] = 9
    with closing(PrivacyEngine()) as engine:
        private(engine, Classifier(masked=False), Sentences(lengths), lengths=lengths)
        with pytest.raises(SelfCheckError):
            engine.self_check(losses)


def test_where_nothing_is_padded_the_report_says_so() -> None:
    with closing(PrivacyEngine()) as engine:
        private(engine, Classifier(masked=False), Sentences([5] * 6))
        assert not engine.self_check(losses).padded  # always the same frames: each example is its own


def test_a_batch_of_another_form_than_the_loaders_says_what_was_not_asked() -> None:
    with closing(PrivacyEngine()) as engine:
        private(engine, Classifier(masked=False))
        x, lengths, labels = given_batch()
        with pytest.warns(
            UserWarning, match="could not check: .*the effect of padding: .* have another form"
        ):
            report = engine.self_check(
                lambda model, batch: losses(model, (batch["x"], batch["lengths"], batch["labels"])),
                {"x": x, "lengths": lengths, "labels": labels},
            )
    assert not report.padded
    assert report.unchecked


def test_a_random_collate_fn_says_what_was_not_asked() -> None:
    def noisy(items: list[tuple[Tensor, int]]) -> Batch:
        x, lengths, labels = collate(items)
        return x + torch.randn_like(x), lengths, labels

    with closing(PrivacyEngine()) as engine:
        private(engine, Classifier(), collate_fn=noisy)
        with pytest.warns(UserWarning, match="collate_fn return different batches for the same examples"):
            engine.self_check(losses, given_batch())
        with pytest.raises(ValueError, match=r"two calls of collate_fn.*; give a batch"):
            engine.self_check(losses)


def test_the_runs_generators_stay_where_they_were() -> None:
    with closing(PrivacyEngine()) as engine:
        private(engine, Classifier())
        before = torch.get_rng_state()
        engine.self_check(losses)
        assert torch.equal(torch.get_rng_state(), before)


# --- the order of rows


class Sorts(Classifier):
    """Sorts the rows by their lengths, as packing does; puts the outputs back, and not the records of its layers."""

    def __init__(self, *, descending: bool) -> None:
        super().__init__()
        self.descending = descending

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        order = torch.argsort(lengths, descending=self.descending, stable=True)
        found: Tensor = super().forward(x[order], lengths[order])[torch.argsort(order)]
        return found


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("rows", [[1, 3, 0], [0, 3, 1]], ids=["shortest first", "longest first"])
def test_rows_that_the_model_sorts_are_found(descending: bool, rows: list[int]) -> None:
    """Also where the batch given is in that very order."""
    data = Sentences()
    batch = collate([data[index] for index in rows])
    with closing(PrivacyEngine()) as engine:
        private(engine, Sorts(descending=descending))
        with pytest.raises(SelfCheckError, match="rows that the model sorts"):
            engine.self_check(losses, batch, singles=[collate([data[index]]) for index in rows])


# --- the size of the batch


@pytest.mark.parametrize("rows", [2, 4])
def test_a_loss_divided_by_the_batchs_size_is_found_and_named(rows: int) -> None:
    data = Sentences()
    batch = collate([data[index] for index in range(rows)])
    with closing(PrivacyEngine()) as engine:
        private(engine, Classifier())
        with pytest.raises(SelfCheckError, match=rf"in a batch of {rows} .* divided by {rows}"):
            engine.self_check(lambda model, batch: losses(model, batch) / len(batch[0]), batch)


def test_other_failures_do_not_name_the_batchs_size() -> None:
    with closing(PrivacyEngine()) as engine:
        private(engine, Classifier(masked=False))
        with pytest.raises(SelfCheckError) as caught:
            engine.self_check(losses)
    assert "it is the loss alone" not in str(caught.value)


# --- models that draw at random, in evaluation too


class Variational(Classifier):
    """Noise in every mode, of the frames and of the example, drawn with the batch or of its own accord."""

    def __init__(self, *, masked: bool = True, share: float = 0.0) -> None:
        super().__init__(masked=masked)
        self.share = share

    def mixed(self, h: Tensor, mask: Tensor) -> Tensor:
        steps = torch.randint(1, 9, (len(h),))  # as a diffusion model's times
        noised = (
            h * torch.randn(()) + torch.randn_like(h) * steps[:, None, None] + torch.empty_like(h).normal_()
        )
        return noised + self.share * h.mean(0)


def test_a_model_that_draws_in_evaluation_passes_on_its_own_draws() -> None:
    with closing(PrivacyEngine()) as engine, no_warnings():
        private(engine, Variational())
        report = engine.self_check(losses)
    assert report.modes == {"eval", "train"}
    assert report.padded


@pytest.mark.parametrize("model", [Variational(masked=False), Variational(share=0.1)])
def test_a_model_that_draws_and_leaks_is_found(model: nn.Module) -> None:
    with closing(PrivacyEngine()) as engine:
        private(engine, model)
        with pytest.raises(SelfCheckError, match="is not its gradient alone"):
            engine.self_check(losses)


@pytest.mark.parametrize(
    ("draw", "said"),
    [
        (lambda h: torch.from_numpy(np.random.rand(*h.shape)).float(), "Python's or numpy's generator"),
        (lambda h: torch.bernoulli(torch.sigmoid(h)), r"on the values of a tensor \(bernoulli\)"),
        (lambda h: torch.randn(h.numel()).view_as(h), r"draws \(\d+,\) for a batch of 3 and"),
        (
            lambda h: torch.tensor([float(torch.rand(())) for _ in h])[:, None, None],
            "makes 2 more draws for a batch of 3 than for an example alone",
        ),
        (
            lambda h: torch.randint(h.shape[1], (len(h),))[:, None, None] / 9,
            r"whole numbers within \[\d\]",
        ),
    ],
)
def test_draws_that_cannot_be_told_apart_are_said(draw: Callable[[Tensor], Tensor], said: str) -> None:
    class Draws(Classifier):
        def mixed(self, h: Tensor, mask: Tensor) -> Tensor:
            return h + draw(h)

    with closing(PrivacyEngine()) as engine:
        private(engine, Draws())
        with pytest.warns(
            UserWarning, match=f"could not check: gradients alone and in a batch, in eval mode: .*{said}"
        ):
            report = engine.self_check(losses)
    assert report.modes == set()


@pytest.mark.parametrize(
    "places", [torch.randperm, lambda n: torch.randint(n, (n,))], ids=["order", "partners"]
)
def test_mixup_is_named(places: Callable[[int], Tensor]) -> None:
    class Mixup(Classifier):
        def mixed(self, h: Tensor, mask: Tensor) -> Tensor:
            return 0.5 * h + 0.5 * h[places(len(h))]

    with closing(PrivacyEngine()) as engine:
        private(engine, Mixup())
        with pytest.raises(SelfCheckError, match=r"whole numbers below the number of examples .*mixup"):
            engine.self_check(losses)


# --- which parts of a batch are the examples'


@dataclass
class Clips:
    x: Tensor
    names: list[str]
    weights: Tensor
    labels: Tensor


Made = tuple[Callable[[list[Any]], Any], Callable[[nn.Module, Any], Tensor]]


def weighted() -> Made:
    """With as many weights of classes as there are examples."""

    def made(items: list[Any]) -> Any:
        x, lengths, labels = collate(items)
        return {"x": x, "n": lengths, "weights": torch.tensor([1.0, 2.0, 3.0]), "y": [labels, len(items)]}

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        logits = model(batch["x"], batch["n"])
        return nn.functional.cross_entropy(logits, batch["y"][0], batch["weights"], reduction="none")

    return made, loss_fn


def of_a_dataclass() -> Made:
    def made(items: list[Any]) -> Any:
        x, lengths, labels = collate(items)
        return Clips(x, [str(length) for length in lengths.tolist()], torch.tensor([1.0, 2.0, 3.0]), labels)

    def loss_fn(model: nn.Module, batch: Clips) -> Tensor:
        logits = model(batch.x, torch.tensor([int(name) for name in batch.names]))
        return nn.functional.cross_entropy(logits, batch.labels, batch.weights, reduction="none")

    return made, loss_fn


def lists_of_tensors() -> Made:
    def made(items: list[Any]) -> Any:
        return tuple(zip(*items, strict=True))

    return made, lambda model, batch: losses(model, collate(list(zip(*batch, strict=True))))


def time_first() -> Made:
    def made(items: list[Any]) -> Any:
        x, lengths, labels = collate(items)
        return x.transpose(0, 1).contiguous(), lengths, labels

    return made, lambda model, batch: losses(model, (batch[0].transpose(0, 1), *batch[1:]))


@pytest.mark.thinned(5)
@pytest.mark.parametrize("made", [weighted, of_a_dataclass, lists_of_tensors, time_first])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("given", [None, 3], ids=["its own", "given"])
def test_whatever_the_batch_is_made_of(made: Callable[[], Made], masked: bool, given: int | None) -> None:
    """Also where another dimension is the number of examples; and what depends on padding is found through it."""
    data, (collate_fn, loss_fn) = Sentences([2, 3, 3, 3]), made()
    batch = None if given is None else collate_fn([data[index] for index in range(given)])
    with closing(PrivacyEngine()) as engine, no_warnings():
        private(engine, Classifier(masked=masked), data, collate_fn)
        if masked:
            assert not engine.self_check(loss_fn, batch).unchecked
            return
        with pytest.raises(SelfCheckError, match="padding that is not masked"):
            engine.self_check(loss_fn, batch)


def test_rows_that_were_guessed_are_said() -> None:
    """The loader's batches are of another form: nothing but their size tells the weights of classes from rows."""
    made, loss_fn = weighted()
    data = Sentences()
    for size, passes in ((3, False), (4, True)):
        batch = made([data[index] for index in range(size)])
        with closing(PrivacyEngine()) as engine:
            private(engine, Classifier())
            if passes:
                with pytest.warns(
                    UserWarning, match=r"which parts .*: x, n, y\.0 were taken to hold one row"
                ):
                    engine.self_check(loss_fn, batch)
            else:
                with pytest.raises(
                    SelfCheckError,
                    match=r"(?s)alone loss_fn raised.*x, n, weights, y\.0 were taken to hold",
                ):
                    engine.self_check(loss_fn, batch)


# --- what sorts


def sorting(items: list[tuple[Tensor, int]]) -> Batch:
    return collate(sorted(items, key=lambda item: -len(item[0])))


def left_padded(items: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor, Tensor]:
    x, lengths, labels = collate(items)
    rows = [row.roll(x.shape[1] - int(length), 0) for row, length in zip(x, lengths, strict=True)]
    return torch.stack(rows), lengths, labels


def unlike_in_a_batch(items: list[tuple[Tensor, int]]) -> Batch:
    """An example alone is not found in its row; the rows are in the order of the items."""
    x, lengths, labels = collate(items)
    return x + len(items), lengths, labels


def sorted_and_unlike(items: list[tuple[Tensor, int]]) -> Batch:
    x, lengths, labels = sorting(items)
    return x + len(items), lengths, labels


@pytest.mark.parametrize("masked", [True, False])
def test_a_collate_fn_that_sorts_is_no_matter(masked: bool) -> None:
    with closing(PrivacyEngine()) as engine:
        private(engine, Classifier(masked=masked), collate_fn=sorting)
        if masked:
            assert not engine.self_check(losses).unchecked
            return
        with pytest.raises(SelfCheckError, match="padding that is not masked"):
            engine.self_check(losses)


@pytest.mark.parametrize("collate_fn", [collate, sorting, left_padded, unlike_in_a_batch])
def test_examples_stand_in_the_order_of_their_rows(collate_fn: Any) -> None:
    made = own_batch(Sentences(), collate_fn)
    assert not isinstance(made, str)
    assert [int(lengths) for _, lengths, _ in made.singles] == made.batch[1].tolist()


def test_rows_that_cannot_be_matched_are_said() -> None:
    with closing(PrivacyEngine()) as engine:
        private(engine, Classifier(), collate_fn=sorted_and_unlike)
        with pytest.warns(UserWarning, match="cannot be matched .*does it sort"):
            engine.self_check(losses, given_batch())


def test_a_model_that_takes_sorted_rows_only_is_told_so() -> None:
    class Packs(Classifier):
        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
            found: Tensor = super().forward(x, lengths)
            return found

    with closing(PrivacyEngine()) as engine:
        model = private(engine, Packs(), collate_fn=sorting)
        said = r"accepts only one order of rows.*enforce_sorted=False"
        with pytest.raises(SelfCheckError, match=said):
            engine.self_check(losses)
        assert model.training
        with pytest.raises(SelfCheckError, match=said):
            engine.check_batch_independence(losses, sorting([Sentences()[index] for index in range(3)]))


def test_one_example_a_micro_batch_needs_no_padding() -> None:
    with closing(PrivacyEngine()) as engine:
        private(engine, Classifier(), TensorDataset(*given_batch()), None, physical_batch_size=1)
        with pytest.warns(UserWarning, match="a micro-batch holds one example"):
            engine.self_check(losses, given_batch())


def test_statistics_that_one_example_has_not_are_named() -> None:
    class Normed(Classifier):
        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return nn.functional.batch_norm(super().forward(x, lengths), None, None, training=True)

    with closing(PrivacyEngine()) as engine:
        private(engine, Normed())
        with pytest.raises(
            SelfCheckError, match=r"(?s)for an example alone loss_fn raised.*Statistics over the"
        ):
            engine.self_check(losses)
