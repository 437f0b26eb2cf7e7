"""This package, used as in its README."""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

import dpkernels
from bench.cases.models import Batch, Case, forward
from bench.contenders.base import Contender, Factory, Settings
from bench.contenders.rows import Rows
from dpkernels.precision import hold_frozen


class Private(Contender):
    """`PrivacyEngine.make_private` with one strategy, on one process or on those of a group.

    The data set is the batch and q = 1, so that Poisson sampling draws exactly this batch every time: the public
    loop runs unchanged, and every contender sees the same examples.
    """

    def __init__(
        self,
        case: Case,
        model: nn.Module,
        batch: Batch,
        settings: Settings,
        *,
        strategy: str,
        process_group: dist.ProcessGroup | None = None,
        compiled: bool = False,
    ) -> None:
        super().__init__(case, model, batch, settings)
        if case.mixed:  # as asr_finetune does
            hold_frozen(model, batch["input_features"].dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="noise_multiplier=0")
            self.model, self.optimizer, self.loader = dpkernels.PrivacyEngine().make_private(
                module=model,
                optimizer=self.new_optimizer(),
                data_loader=DataLoader(Rows(batch), batch_size=self.size),
                noise_multiplier=settings.noise,
                max_grad_norm=settings.clip,
                strategy=strategy,
                physical_batch_size=self.size,
                process_group=process_group,
            )
        self.optimizer.keep_gradients = (
            settings.lr == 0
        )  # the checker's run, which reads the released gradients
        self._drawn: list[Batch] = []
        self._ready = False
        self._must_compile = compiled
        self._run = torch.compile(self.model) if compiled else self.model
        # As in a long run, what is checked at every doubling of the steps is not due: the row check's two backwards,
        # and the sums of all parameters' bits.
        self.optimizer._rows.due = lambda losses: False
        self.optimizer._guard._parameter_watch._begun = 2**20
        # Several private runs take turns in this process: each would take the others' secret seeds for known ones.
        self.optimizer._guard._seeds = None

    def prepare(self) -> None:
        # The data loader draws and collates; no contender's time includes that.
        if self._ready:
            return
        if self._must_compile:
            self._must_compile = False
            self.prepare()
            self.step()  # compiles; with lr=0, as the checker has it, it changes nothing
        self._ready = True
        self.optimizer.zero_grad()
        device = self.batch["labels"].device
        self._drawn = [
            {name: value.to(device) for name, value in part.items()} for part in next(iter(self.loader))
        ]

    def step(self) -> None:
        self.optimizer.zero_grad()
        for batch in self._drawn:
            self.optimizer.backward(self.case.losses(forward(self._run, batch), batch["labels"]))
        self.optimizer.step()
        self._ready = False


def with_strategy(strategy: str, *, compiled: bool = False) -> Factory:
    """The factory of one of `dpkernels.privacy.keywords.STRATEGIES`, eager or under torch.compile."""

    def make(case: Case, model: nn.Module, batch: Batch, settings: Settings) -> Contender:
        return Private(case, model, batch, settings, strategy=strategy, compiled=compiled)

    return make
