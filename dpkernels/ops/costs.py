"""The time of keeping a layer's tensors until the norms are known, and of materialising its gradient in the backward.

Times are nanoseconds for one example of L frames. A linear layer of d inputs and p outputs, whose tensors are kept:

    norm  gram · L²(p + d) + gram_frame · L(p + d)       in Gram form, below `GRAM_SHARE` of the other's operations,
          direct · L·p·d + direct_frame · L(p + d)       or in direct form
    sum   summed · L·p·d + widened · p·d                 products in float32, added to the sum in float64

and whose gradient is materialised, read for its norm and read again for the sum:

    product · L·p·d + entry · p·d

LoRA of rank r has n = r(p + d) entries. What materialising saves an example is

    lora_frame · L(p + d) + lora_product · L·n − lora_entry · n − lora_call

since x and g are read once, not for norm and sum each. The call's own time is that of one example in the fit's batch: a
constant too, since the choice must not depend on the batch at hand.

The constants of a backend are measured (`python -m bench.fit_costs`) and kept in `costs.json`. They are times of one
machine, but only their ratios decide, and these differ less between machines.
"""

import json
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

from dpkernels.backends import registry

FILE = Path(__file__).with_name("costs.json")
"""Backend -> the constants that were fitted for it, and where."""

GRAM_SHARE = 0.75
"""The native norm takes the Gram form if L(p + d) is below this share of 2pd (csrc/cpu/linear.cpp, kGramShare)."""

LONGEST = 2**20
"""Frames of the longest example that the model is asked about: three hours at 100 frames a second."""


@dataclass(frozen=True)
class Costs:
    """The constants of one backend, in nanoseconds; each is at least 0."""

    gram: float
    gram_frame: float
    direct: float
    direct_frame: float
    summed: float
    widened: float
    product: float
    entry: float
    lora_product: float
    lora_frame: float
    lora_entry: float
    lora_call: float

    def kept(self, frames: int, outputs: int, inputs: int) -> float:
        """Nanoseconds of norm and sum of one example of a linear layer whose tensors are kept."""
        entries, both = outputs * inputs, outputs + inputs
        by_gram = frames * both < GRAM_SHARE * 2 * entries
        norm = (
            (self.gram * frames + self.gram_frame) * frames * both
            if by_gram
            else (self.direct * entries + self.direct_frame * both) * frames
        )
        return norm + (self.summed * frames + self.widened) * entries

    def made(self, frames: int, outputs: int, inputs: int) -> float:
        """Nanoseconds of materialising an example's gradient of a linear layer, of its norm and its part in the sum."""
        return (self.product * frames + self.entry) * outputs * inputs

    def saved(self, frames: int, outputs: int, inputs: int, rank: int = 0) -> float:
        """Nanoseconds that materialising saves an example of so many frames; negative where it takes longer.

        rank: LoRA's r; 0 for a linear layer.
        """
        if not rank:
            return self.kept(frames, outputs, inputs) - self.made(frames, outputs, inputs)
        of_frames = (self.lora_product * rank + self.lora_frame) * frames
        return (of_frames - self.lora_entry * rank) * (outputs + inputs) - self.lora_call

    @cache  # noqa: B019 - a few instances, and a few hundred shapes
    def crossing(self, outputs: int, inputs: int, rank: int = 0) -> int | None:
        """The number of frames from which on materialising saves time; None if that is above `LONGEST`.

        What is saved grows with the frames, except for the step from the Gram form to the direct one.
        """
        if self.saved(LONGEST, outputs, inputs, rank) <= 0:
            return None
        costs, saves = 0, LONGEST
        while saves - costs > 1:
            middle = (costs + saves) // 2
            if self.saved(middle, outputs, inputs, rank) > 0:
                saves = middle
            else:
                costs = middle
        return saves


@cache
def _fitted() -> dict[str, Costs]:
    known = {field.name for field in fields(Costs)}
    return {
        backend: Costs(**{name: float(value) for name, value in row["nanoseconds"].items() if name in known})
        for backend, row in json.loads(FILE.read_text()).items()
    }


def costs_on(device_type: str) -> Costs | None:
    """The constants of the backend that serves linear layers on a device type, or None if it was never measured.

    device_type: "cpu", "cuda", …
    """
    return _fitted().get(registry.backend_of("linear_norm_sq", device_type))
