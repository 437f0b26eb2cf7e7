"""What a property of the privacy design consists of here: its tests, and the faults that show that they can fail."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, init=False)
class Fault:
    """One edit that harms a property, and the tests of which at least one must then fail.

    Attributes:
        name: unique among all faults.
        path: the file, from the root of the repository.
        old: text that occurs in it exactly once.
        new: what replaces it.
        tests: pytest node ids, the quickest first.
    """

    name: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...]

    def __init__(self, name: str, path: str, old: str, new: str, *tests: str) -> None:
        for attribute, value in zip(self.__dataclass_fields__, (name, path, old, new, tests), strict=True):
            object.__setattr__(self, attribute, value)


@dataclass(frozen=True)
class Line:
    """A numbered property of the privacy design.

    Attributes:
        number: of the property.
        claim: the property in words.
        tests: by node id, what each of its tests holds.
        faults: what is planted.
        without: why there is no fault; "" where there are some.
    """

    number: int
    claim: str
    tests: Mapping[str, str]
    faults: Sequence[Fault] = field(default_factory=tuple)
    without: str = ""
