"""The clipped sums of one logical batch, and the check that each of its examples is in them exactly once."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dpkernels.nn import Record, add_weighted_sums
from dpkernels.privacy.step.strategies import Clipped


class BatchSums:
    """Clipped sums by parameter, in float64, and which part of the logical batch is in them.

    Args:
        bound: largest logical batch that the sensitivity is stated for, in examples.
        claimed: whether there is noise and so a privacy claim. Without noise, batches may come from anywhere.
        whole_units: whether speakers are clipped as speakers, so that each micro-batch must be known beforehand.

    Attributes:
        sums: Σ of the clipped gradients by parameter, for parameters with a gradient. NOT PRIVATE.
        dirty: whether an entry of `sums` may be other than 0.
        examples: number of examples in the sums. NOT PRIVATE.
        drawn: number of examples in the open logical batch; None if none is open. NOT PRIVATE.
        invalidated: whether a failure left examples in the sums partially or uncounted.
        attempt: number of calls of `forget` and `try_again`.
        seen: norms and factors of the examples, by micro-batch. NOT PRIVATE.
    """

    def __init__(self, bound: int, *, claimed: bool, whole_units: bool = False) -> None:
        self._bound = bound
        self._claimed = claimed
        self._whole_units = whole_units
        self._announced: tuple[int, int] | None = (
            None  # of the micro-batch that is to be back-propagated next
        )
        self._replaceable = False  # whether another may be read in its place, after `forget` or `try_again`
        self.sums: dict[nn.Parameter, Tensor] = {}
        self.dirty = False
        self.examples = 0
        self.drawn: int | None = None
        self.invalidated = False
        self.attempt = 0
        self.seen: list[Clipped] = []

    def open(self, examples: int, drawn: int) -> None:
        """Open a logical batch of `drawn` examples, of which this process has `examples`.

        Raises:
            RuntimeError: step() was not called for the previous one, or it is larger than the bound.
        """
        self.check_closed()
        if self._claimed and drawn > self._bound:
            raise RuntimeError(
                f"{drawn} examples in one logical batch (NOT PRIVATE), but the sensitivity is stated for at most "
                f"{self._bound}, and the private loader's sampling does not exceed it. Take every batch from the "
                "loader that make_private returned; for larger batches, give its data_loader a larger batch_size."
            )
        self.drawn = examples

    def check_closed(self) -> None:
        """Raise RuntimeError if a logical batch is open: each one that was drawn gets exactly one step()."""
        if self.examples or self.drawn is not None:
            raise RuntimeError(
                "optimizer.step() was not called for the previous logical batch: call it exactly once for "
                "each, also for an empty one. A skipped step reveals that its batch is empty, and leaving out a batch "
                "that was drawn changes the sampling that ε accounts for. To finish a batch whose loop was left, call "
                "optimizer.zero_grad(), optimizer.backward(losses_of(logical_batch.collate(part))) for each part of "
                "logical_batch.parts, and optimizer.step()."
            )

    def close(self) -> None:
        """Close the open logical batch, whether or not its step succeeded: it is never released again."""
        self.forget()
        self._announced = None
        self.drawn = None

    def forget(self) -> None:
        """Clear the sums; the logical batch stays open."""
        # The memory is cleared, not freed: 8 bytes of fresh memory for each trained parameter in every step took a
        # sixth of a full fine-tuning step on a CPU. The fused step clears the sums itself: they are not dirty then.
        if self.dirty:
            for total in self.sums.values():
                total.zero_()
        self.dirty = False
        self.attempt += 1
        self.examples = 0
        self.seen = []
        self.invalidated = False
        self._replaceable = True

    def try_again(self) -> None:
        """Prepare to repeat a micro-batch that failed, or all of them if it invalidated the sums."""
        self.attempt += 1
        self._replaceable = True
        if self.invalidated:
            self.forget()

    def of(self, parameter: nn.Parameter) -> Tensor:
        """The parameter's sum, of its shape; zeros if nothing was added."""
        if parameter not in self.sums:
            self.sums[parameter] = torch.zeros(parameter.shape, dtype=torch.float64, device=parameter.device)
        return self.sums[parameter]

    @torch.no_grad()
    def add(self, records: Sequence[Record], factors: Tensor) -> None:
        """Add Σ_i factors_i·g_i of these records; the batch is invalidated until `count` is called."""
        for record in records:
            for parameter in record.parameters:
                self.of(parameter)
        # A failure from here to the count would leave examples in the sums partially or uncounted.
        self.invalidated = self.dirty = True
        add_weighted_sums(records, factors, self.sums)

    def count(self, examples: int, clipped: Clipped) -> None:
        """Count `examples` examples of a micro-batch that is completely in the sums."""
        self.examples += examples
        self.seen.append(clipped)
        self.invalidated = False
        self._announced = None

    def votes(self, norms: int) -> list[int]:
        """What the examples in the sums add to the counts that move the norms of adaptive clipping. NOT PRIVATE."""
        votes = [part.votes for part in self.seen if part.votes is not None]
        assert len(votes) == len(self.seen)  # the strategy clips to these norms
        counts: list[int] = torch.stack(votes).sum(0).tolist() if votes else [0] * norms
        return counts

    def announce(self, examples: int, unit: int) -> None:
        """Note that the loader hands out a micro-batch of `examples` examples, `unit` of each of its speakers.

        Raises:
            RuntimeError: speakers are clipped as speakers, and the micro-batch before was not back-propagated.
        """
        if self._whole_units and self._announced is not None and not self._replaceable:
            raise RuntimeError(
                "the next micro-batch was asked for before the last one was back-propagated: speakers are clipped as "
                "speakers (clipping_unit='speaker'), so each micro-batch must be back-propagated before the next one "
                "is read. Call optimizer.backward(losses) in the loop, or optimizer.recover() after a failure"
            )
        self._announced, self._replaceable = (examples, unit), False

    def unit_of(self, examples: int) -> int:
        """How many consecutive examples of the micro-batch at hand are clipped together.

        Raises:
            RuntimeError: speakers are clipped as speakers, and these are not the losses of the micro-batch that the
                loader handed out last.
        """
        if not self._whole_units:
            return 1
        if self._announced is None or self._announced[0] != examples:
            held = (
                "none" if self._announced is None else f"one of {self._announced[0]} examples (NOT PRIVATE)"
            )
            raise RuntimeError(
                f"optimizer.backward: losses of {examples} examples, but the micro-batch at hand is {held}: speakers "
                "are clipped as speakers (clipping_unit='speaker'), so each micro-batch of the private loader is "
                "back-propagated whole, with one loss for each row in its order, before the next one is read"
            )
        return self._announced[1]

    def check_whole(self) -> None:
        """Raise RuntimeError if a failure invalidated the sums."""
        if self.invalidated:
            raise RuntimeError(
                "a backward failed while it added to the sums; call zero_grad() to drop this logical batch, or "
                "recover() to back-propagate all of its micro-batches again"
            )

    def check_room(self, examples: int) -> None:
        """Raise RuntimeError unless `examples` more examples may join the open logical batch."""
        self.check_whole()
        if not self._claimed:
            return
        if self.drawn is None:
            raise RuntimeError(
                "optimizer.backward: no logical batch of the private loader is open. Take every batch from "
                "the loader that make_private returned, and call step() once for each: ε accounts only for "
                "its Poisson sampling."
            )
        total = self.examples + examples
        if total > self.drawn:
            raise RuntimeError(
                f"optimizer.backward: more examples than the logical batch holds: losses of {examples}, after "
                f"{self.examples} that were processed, in a logical batch of {self.drawn} (NOT PRIVATE). Losses have "
                "shape [B], one for each example. An example that is processed twice in a step, or was not sampled, "
                "breaks the privacy claim; call zero_grad() to start this batch again."
            )

    def check_complete(self) -> None:
        """Raise RuntimeError if examples of the open logical batch are missing."""
        if self.drawn is not None and self.examples < self.drawn and self._claimed:
            raise RuntimeError(
                "step(): fewer examples were back-propagated than the logical batch holds. Was step() called "
                "after each micro-batch instead of after the last one of the logical batch, was zero_grad() called "
                "between micro-batches, were losses of two micro-batches added up, or does the "
                "collate_fn pack several examples into one row? Back-propagate every micro-batch once, with one "
                "loss for each example (0 leaves an example out), then call step(), then zero_grad()."
            )
