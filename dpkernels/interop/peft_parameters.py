"""PEFT keeps adapters' raw parameters in a ParameterDict that its parent layer reads. They are covered in two ways:

- *shared*: during its forward the layer reads SharedTensors, and runs PEFT's own arithmetic on them. Per-sample
  gradients are kept, so this is for vectors: (IA)³, VeRA, RoAd, BEFT, and DoRA's magnitudes.
- by a rule of the parent layer for the parameter: see `peft_embedding`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dpkernels.nn import EXPANSION_LIMIT, GhostModule
from dpkernels.nn.layers.expanded import SharedParameters


class GhostParameterDict(GhostModule, nn.ParameterDict):
    """nn.ParameterDict with parameters that its parent layer records by its own rule."""

    ghost_asks_axes = True

    @property
    def ghost_covers(self) -> tuple[str, ...]:  # type: ignore[override]
        """All current parameters: adapters can be added and removed."""
        return tuple(self._parameters)


class SharingModule(GhostModule):
    """Mixin: within `shared()` the module reads its privately trained parameters as SharedTensors."""

    ghost_asks_axes = True
    _ghost_substitutes: SharedParameters | None = None

    def ghost_refusal(self) -> str | None:
        """Refuse parameters whose per-sample gradients would take too much memory."""
        assert isinstance(self, nn.Module)
        most = max((p.numel() for p in self.parameters(recurse=False) if p.requires_grad), default=0)
        if most > EXPANSION_LIMIT:
            return f"its {most:,} elements exceed the limit of {EXPANSION_LIMIT:,} for per-sample gradients; freeze it"
        return None

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Replace the trained parameters within this context. Raises RuntimeError if the batch size is unknown."""
        assert isinstance(self, nn.Module)
        trained = {name: p for name, p in self._parameters.items() if p is not None and p.requires_grad}
        if not trained or not self._ghost_records():
            yield
            return
        tape, label = self.ghost_tape, self.ghost_label()
        assert tape is not None
        if tape.examples is None:
            raise RuntimeError(
                f"{label!r}: the model's forward got no tensor, so the batch size is unknown and the per-sample "
                "gradients of its trained parameters cannot be kept; call the model itself, with a tensor whose first "
                "dimension is the batch, or freeze them"
            )
        before = self._ghost_substitutes
        self._ghost_substitutes = SharedParameters(trained, label, tape.examples, tape)
        try:
            yield
        finally:
            self._ghost_substitutes = before


class SharedParameterDict(SharingModule, GhostParameterDict):
    """nn.ParameterDict with parameters that its parent layer reads as SharedTensors."""

    @property
    def ghost_forms(self) -> tuple[str, ...]:  # type: ignore[override]
        """All current parameters."""
        return tuple(self._parameters)

    def __getitem__(self, key: str) -> Any:
        """The parameter, or the SharedTensor that represents it."""
        substitutes, name = self._ghost_substitutes, self._key_to_attr(key)
        if substitutes is not None and name in substitutes:
            return substitutes[name]
        return super().__getitem__(key)


class SharedPeftLayer(GhostModule):
    """Mixin of PEFT layers that read their SharedParameterDicts in their own forward."""

    ghost_covers = ()
    ghost_in_graph = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's."""
        with ExitStack() as stack:
            for dictionary in self._shared_dictionaries():
                stack.enter_context(dictionary.shared())
            return super().forward(*args, **kwargs)  # type: ignore[misc]

    def ghost_fused_rules(self) -> dict[nn.Parameter, str]:
        """The rules of the dictionaries' parameters, with the name of the method."""
        method = type(self).__module__.split(".")[-1]
        return {
            parameter: f"PEFT's {method}: per-sample gradient (B × {parameter.numel():,} entries)"
            for dictionary in self._shared_dictionaries()
            for parameter in dictionary.parameters()
        }

    def _shared_dictionaries(self) -> list[SharedParameterDict]:
        assert isinstance(self, nn.Module)
        return [child for child in self.children() if isinstance(child, SharedParameterDict)]


class GhostDora(SharingModule):
    """Mixin of PEFT's DoRA layers, which hold the magnitudes m: y = m/‖W + sBA‖ · (W x + sBA x) + b.

    PEFT treats the norm as a constant, as the paper does, so the gradients of A, B and m are those of two linear
    layers and of a vector. PEFT reads W and b without calling the base layer, so they must be frozen.
    """

    ghost_covers = ghost_forms = ("weight",)

    @property
    def weight(self) -> Any:
        """The magnitudes, or the SharedTensor that represents them."""
        assert isinstance(self, nn.Module)
        return (
            self._parameters["weight"]
            if self._ghost_substitutes is None
            else self._ghost_substitutes["weight"]
        )

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's."""
        with self.shared():
            result: Tensor = super().forward(*args, **kwargs)  # type: ignore[misc]
            return result

    def get_lora_weight(self, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's, but without gradients: it is used for the constant norm only, and not recorded."""
        with torch.no_grad():
            weight: Tensor = super().get_lora_weight(*args, **kwargs)  # type: ignore[misc]
            return weight
