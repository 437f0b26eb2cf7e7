"""Opacus, by its documented interface: per-sample gradients by hooks, and ghost clipping.

Ghost clipping's step is `loss = criterion(output, target); loss.backward(); optimizer.step()` with the criterion,
optimizer and model that `make_private(grad_sample_mode="ghost", criterion=…)` returns (Opacus's tutorial
"building_text_classifier" and its ghost-clipping example). Adapters need no more than that: PEFT's factors are
nn.Linear. `poisson_sampling=False`, so that the given batch is taken as it is.
"""

from __future__ import annotations

import warnings
from typing import Any

import opacus
import torch
from opacus.layers import DPGRU, DPLSTM, DPRNN, DPMultiheadAttention
from opacus.validators.errors import UnsupportedModuleError
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bench.cases.models import Batch, Case, Criterion, OneAttention, forward
from bench.contenders.base import CannotRun, Contender, Settings
from bench.contenders.rows import Rows

_OWN_LAYERS = {nn.LSTM: DPLSTM, nn.GRU: DPGRU, nn.RNN: DPRNN}


def with_opacus_layers(model: nn.Module) -> nn.Module:
    """Opacus's own layers in place of torch's recurrent ones and attention, in place, with their weights."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) in _OWN_LAYERS:
                names = (
                    "input_size",
                    "hidden_size",
                    "num_layers",
                    "bias",
                    "batch_first",
                    "dropout",
                    "bidirectional",
                )
                replacement = _OWN_LAYERS[type(layer)](**{option: getattr(layer, option) for option in names})
                replacement.to(next(layer.parameters())).load_state_dict(layer.state_dict())
                setattr(parent, name, replacement)
    if isinstance(model, OneAttention):
        # The layout [T,B,d] in all of the model: in the other one its output is not torch's, since it views
        # [B·heads,T,d/heads] as [B,T,d].
        attention = DPMultiheadAttention(model.layer.embed_dim, model.layer.num_heads)
        attention.to(model.norm.weight).load_state_dict(dict(model.layer.state_dict()))
        model.layer, model.norm_first = attention, False
    return model


class Hooks(Contender):
    """Per-sample gradients materialised by hooks, then clipped."""

    def __init__(self, case: Case, model: nn.Module, batch: Batch, settings: Settings) -> None:
        super().__init__(case, with_opacus_layers(model), batch, settings)
        self.model, self.optimizer, _ = self._private(model, "hooks")

    def _private(self, model: nn.Module, mode: str, **options: Any) -> tuple[Any, ...]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return opacus.PrivacyEngine().make_private(
                    module=model,
                    optimizer=self.new_optimizer(),
                    data_loader=DataLoader(Rows(self.batch), batch_size=self.size),
                    noise_multiplier=self.settings.noise,
                    max_grad_norm=self.settings.clip,
                    poisson_sampling=False,
                    grad_sample_mode=mode,
                    batch_first=not isinstance(model, OneAttention),
                    **options,
                )
            except (UnsupportedModuleError, NotImplementedError) as error:
                raise CannotRun(f"Opacus refuses the model: {error}") from error

    def released(self) -> dict[str, Tensor]:
        """By the names of torch's layers: DPMultiheadAttention's q, k and v are one parameter there."""
        gradients = super().released()
        for kind in ("weight", "bias"):
            parts = [gradients.pop(f"layer.{name}linear.{kind}", None) for name in "qkv"]
            if isinstance(self.model._module, OneAttention):
                gradients[f"layer.in_proj_{kind}"] = torch.cat([part for part in parts if part is not None])
        return gradients

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.case.losses(forward(self.model, self.batch), self.batch["labels"]).mean().backward()
        self.optimizer.step()


class Ghost(Hooks):
    """Norms by ghost clipping, then a second backward of the weighted loss."""

    def __init__(self, case: Case, model: nn.Module, batch: Batch, settings: Settings) -> None:
        Contender.__init__(self, case, with_opacus_layers(model), batch, settings)
        criterion = Criterion(case.losses)
        self.model, self.optimizer, self.criterion, _ = self._private(model, "ghost", criterion=criterion)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.criterion(forward(self.model, self.batch), self.batch["labels"]).backward()
        self.optimizer.step()


class GhostWithOurNorms(Ghost):
    """The same loop with `dpkernels.opacus.register()`: this package's norms in Opacus's ghost clipping.

    Registered for the time of a step only, because the other contenders of the process want Opacus's own; that is seven
    entries of a dict.
    """

    def step(self) -> None:
        # Here, so that bench.compare can take the other contenders' steps with a commit that has no such module.
        import dpkernels.opacus

        with dpkernels.opacus.register():
            super().step()
