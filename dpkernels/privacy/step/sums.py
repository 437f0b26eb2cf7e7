"""The sums of one logical batch: what its examples added so far, and whether that is all of them, each once."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dpkernels.nn import Record, add_weighted_sums
from dpkernels.privacy.step.strategies import Clipped


class BatchSums:
    """Clipped sums by parameter, in float64, and which part of the logical batch is in them.

    Args:
        bound: largest logical batch that the sensitivity is stated for, in examples.
        claimed: whether there is noise, so that privacy is claimed: without, batches may come from anywhere.

    Attributes:
        sums: Σ of the clipped gradients by parameter, for those that had one. NOT PRIVATE.
        dirty: whether an entry of `sums` may be other than 0.
        examples: how many examples are in the sums. NOT PRIVATE.
        drawn: how many the open logical batch holds; None where none is open. NOT PRIVATE.
        invalidated: a failure left examples in the sums in part or uncounted.
        attempt: counts what `forget` and `try_again` begin anew.
        seen: what was done to the examples, by micro-batch. NOT PRIVATE.
    """

    def __init__(self, bound: int, *, claimed: bool) -> None:
        self._bound = bound
        self._claimed = claimed
        self.sums: dict[nn.Parameter, Tensor] = {}
        self.dirty = False
        self.examples = 0
        self.drawn: int | None = None
        self.invalidated = False
        self.attempt = 0
        self.seen: list[Clipped] = []

    def open(self, examples: int) -> None:
        """A logical batch of `examples` examples.

        Raises:
            RuntimeError: the one before it got no step().
        """
        self.check_closed()
        self.drawn = examples

    def check_closed(self) -> None:
        """Raise RuntimeError where a logical batch is open: each that was drawn is stepped on exactly once."""
        if self.examples or self.drawn is not None:
            raise RuntimeError(
                "optimizer.step() was not called for the previous logical batch: call it exactly once for "
                "each, also for an empty one. Skipping a step because a batch is empty shows that it is, and leaving "
                "out a batch that was drawn changes the sampling that epsilon is of. One whose loop was left is done "
                "by optimizer.zero_grad(), optimizer.backward(losses_of(logical_batch.collate(part))) for each part of "
                "logical_batch.parts, and optimizer.step()."
            )

    def close(self) -> None:
        """The end of the open logical batch, whether or not its step succeeded: it is never released again."""
        self.forget()
        self.drawn = None

    def forget(self) -> None:
        """Drop what is summed up; the logical batch stays open."""
        # Kept and cleared, not dropped: touching 8 bytes a trained parameter of fresh memory in every step was
        # measured to cost a sixth of a full fine-tuning step on a CPU. Cleared once: the sweep does it, too.
        if self.dirty:
            for total in self.sums.values():
                total.zero_()
        self.dirty = False
        self.attempt += 1
        self.examples = 0
        self.seen = []
        self.invalidated = False

    def try_again(self) -> None:
        """A micro-batch that failed is about to be done again, or, where it invalidated the sums, all of them."""
        self.attempt += 1
        if self.invalidated:
            self.forget()

    def of(self, parameter: nn.Parameter) -> Tensor:
        """The parameter's sum, of its shape; zeros where nothing was added."""
        if parameter not in self.sums:
            self.sums[parameter] = torch.zeros(parameter.shape, dtype=torch.float64, device=parameter.device)
        return self.sums[parameter]

    @torch.no_grad()
    def add(self, records: Sequence[Record], factors: Tensor) -> None:
        """Σ_i factors_i·g_i of these records; the batch is invalidated until `count` says that this was all."""
        for record in records:
            for parameter in record.parameters:
                self.of(parameter)
        # A failure from here to the count would leave examples in the sums, in part or uncounted.
        self.invalidated = self.dirty = True
        add_weighted_sums(records, factors, self.sums)

    def count(self, examples: int, clipped: Clipped) -> None:
        """A micro-batch of so many examples is in the sums, whole."""
        self.examples += examples
        self.seen.append(clipped)
        self.invalidated = False

    def check_whole(self) -> None:
        """Raise RuntimeError where a failure invalidated the sums."""
        if self.invalidated:
            raise RuntimeError(
                "a backward failed half-way through its sums; call zero_grad() to drop this logical batch, or "
                "recover() to do all of its micro-batches again"
            )

    def check_room(self, examples: int) -> None:
        """Raise RuntimeError unless so many more examples may join the open logical batch."""
        self.check_whole()
        if not self._claimed:
            return
        if self.drawn is None:
            raise RuntimeError(
                "optimizer.backward: no logical batch of the private loader is open. Take every batch from "
                "the loader that make_private returned, and call step() once for each: ε is accounted for "
                "its Poisson sampling, and for nothing else."
            )
        total = self.examples + examples
        if total > self.drawn:
            raise RuntimeError(
                f"optimizer.backward: more examples than the logical batch holds: losses of {examples}, after "
                f"{self.examples} that were processed, in a logical batch of {self.drawn} (NOT PRIVATE). Losses have "
                "shape [B], one an example. An example processed twice in a step, or one that was not sampled, breaks "
                "the privacy claim; call zero_grad() to start this batch again."
            )
        if total > self._bound:
            raise RuntimeError(
                f"optimizer.backward: {total} examples in one logical batch (NOT PRIVATE), and the sensitivity is "
                f"stated for at most {self._bound}, which the private loader's sampling does not exceed. Take every "
                "batch from the loader that make_private returned; for larger ones, give its data_loader a larger "
                "batch_size."
            )

    def check_complete(self) -> None:
        """Raise RuntimeError where examples of the open logical batch are missing."""
        if self.drawn is not None and self.examples < self.drawn and self._claimed:
            raise RuntimeError(
                "step(): fewer examples were back-propagated than the logical batch holds. Was step() called "
                "after a micro-batch, where it belongs after the last one of its logical batch, was zero_grad() called "
                "between its micro-batches, were losses of two micro-batches added up, or does the "
                "collate_fn pack several examples into one row? Back-propagate every micro-batch once, with one "
                "loss for each example (0 for one that is to be left out), then step(), then zero_grad()."
            )
