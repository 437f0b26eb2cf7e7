"""The flat loop, `for batch in loader.flat()`: what `optimizer.step()` and `zero_grad()` do within a logical batch."""

from collections.abc import Callable

from dpkernels.privacy.step.sums import BatchSums


class FlatLoop:
    """Which micro-batches of the open logical batch a flat loop has handed out, and which learning rates it must keep.

    Args:
        batch: the sums of the logical batch.
        rates: returns the learning rates of the optimizer's groups.
        step: takes the step of an empty logical batch, of which the loop's body hears nothing.

    Attributes:
        active: whether the current pass is flat.
        given: number of examples of the open logical batch that were handed out so far. NOT PRIVATE.
    """

    def __init__(
        self, batch: BatchSums, rates: Callable[[], list[float]], step: Callable[[], object]
    ) -> None:
        self._batch = batch
        self._rates = rates
        self.step = step
        self.active = False
        self.given = 0
        self._kept_rates: list[float] = []
        self._after_step: Callable[[], object] | None = None

    def begin(self, after_step: Callable[[], object] | None) -> None:
        """Begin a flat pass. after_step: called after each step that was taken, the steps of empty batches included."""
        self.active, self.given = True, 0
        self._after_step, self._kept_rates = after_step, self._rates()

    def end(self) -> None:
        """Begin a pass that is not flat."""
        self.active = False

    def take_back(self) -> bool:
        """Close a logical batch whose loop was left before its step; False if none is open.

        Nothing of it is released. The caller hands the same batch out again before any other: a batch that was drawn
        and never gets its step would change the sampling that ε accounts for.
        """
        if self._batch.drawn is None:
            return False
        self._batch.close()
        return True

    def give(self, examples: int) -> None:
        """Note that a micro-batch of so many examples is handed out."""
        self.given += examples

    def check_room(self, examples: int) -> None:
        """Raise RuntimeError if losses of `examples` more examples are more than were handed out."""
        if self.active and self._batch.drawn is not None and self._batch.examples + examples > self.given:
            raise RuntimeError(
                f"optimizer.backward: losses of {examples} examples, after {self._batch.examples} that were processed, "
                f"but the flat loop has handed out {self.given} of this logical batch (NOT PRIVATE). Give one loss for "
                "each example of the micro-batch, [B], and call backward once for each micro-batch"
            )

    def check_processed(self) -> None:
        """Raise RuntimeError unless every micro-batch that was handed out is in the sums."""
        self._batch.check_whole()
        if self._batch.drawn is not None and self._batch.examples < self.given:
            raise RuntimeError(
                "a micro-batch of the flat loop was not back-propagated: call optimizer.backward(losses) once for each "
                "(losses of 0 leave examples out), then optimizer.step(). A new loader.flat() hands out the same "
                "logical batch again, from its start"
            )

    def check_closed(self) -> None:
        """Raise RuntimeError unless the logical batch, all of which was handed out, got its step."""
        self.check_processed()
        if self._batch.drawn is not None:
            raise RuntimeError(
                "optimizer.step() was not called after the last micro-batch of a logical batch: in a flat loop call it "
                "after each micro-batch. A skipped step changes the sampling that ε accounts for. A new loader.flat() "
                "hands out the same logical batch again, from its start"
            )

    def acts(self) -> bool:
        """Whether a step() now ends the logical batch; False for a micro-batch that others follow.

        Raises:
            RuntimeError: no logical batch is open; a micro-batch was not back-propagated; the learning rate was changed
                in the loop's body.
        """
        if self._batch.drawn is None:
            raise RuntimeError(
                "step(): no logical batch is open: the flat loop has ended, or step() was called twice after one "
                "micro-batch. A step without a batch spends ε for noise alone; call step() once for each micro-batch"
            )
        self.check_processed()
        self.check_rates()
        return self.given == self._batch.drawn

    def keeps_sums(self) -> bool:
        """Whether zero_grad() must do nothing: the sums of earlier micro-batches belong to the step to come."""
        batch = self._batch
        return self.active and batch.drawn is not None and (batch.examples > 0 or batch.invalidated)

    def check_rates(self) -> None:
        """Raise RuntimeError if the learning rate was changed otherwise than by `after_step`."""
        if self._rates() != self._kept_rates:
            raise RuntimeError(
                "the learning rate was changed in the body of a flat loop, which runs once for each micro-batch and "
                "not for empty batches: a schedule that counts micro-batches depends on how many examples were drawn, "
                "which is not private. Write loader.flat(after_step=scheduler.step), and leave scheduler.step() out of "
                "the body"
            )

    def note_closed(self) -> None:
        """Note that a step ended the logical batch, whether or not it succeeded; nothing to note where it did not."""
        if self._batch.drawn is None:
            self.given = 0

    def note_step(self) -> None:
        """Note that the logical batch got its step."""
        if self._after_step is not None:
            self._after_step()
        self._kept_rates = self._rates()
