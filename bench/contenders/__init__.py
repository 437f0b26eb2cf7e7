"""The contenders: ways to take one optimizer step, with one interface and the same work.

This folder imports `cases` for what a step is taken on, and `bench.names`; `harness`, `asr` and `reports` import it.
"""

from collections.abc import Sequence

from bench.contenders import fastdp, functorch, opacus, own, plain
from bench.contenders.base import CannotRun, Contender, Factory, Settings
from bench.names import (
    FASTDP,
    NON_PRIVATE,
    OPACUS_GHOST,
    OPACUS_HOOKS,
    OPACUS_OURS,
    OWN_LAYERS,
    TIMED_STRATEGIES,
    TORCH_FUNC,
    compiled,
    ours,
)

__all__ = ["CannotRun", "Contender", "Factory", "Settings", "compiled_pairs", "registry", "with_fastdp"]


def registry() -> dict[str, Factory]:
    """Name -> factory, in the order of a round and of the tables."""
    known: dict[str, Factory] = {
        NON_PRIVATE: plain.NonPrivate,
        OWN_LAYERS: plain.OwnLayers,
        **{ours(name): own.with_strategy(name) for name in TIMED_STRATEGIES},
        OPACUS_HOOKS: opacus.Hooks,
        OPACUS_GHOST: opacus.Ghost,
        OPACUS_OURS: opacus.GhostWithOurNorms,
        TORCH_FUNC: functorch.PerSample,
    }
    if fastdp.folder() is not None:
        fastdp.package()  # now, so that no measured step imports it
        known[FASTDP] = fastdp.BookKeeping
    return known


def compiled_pairs() -> dict[str, Factory]:
    """Training without and with privacy, each in eager code and under torch.compile. Compiling takes up to minutes."""
    return {
        NON_PRIVATE: plain.NonPrivate,
        compiled(NON_PRIVATE): plain.Compiled,
        ours(): own.with_strategy("bookkeeping"),
        compiled(ours()): own.with_strategy("bookkeeping", compiled=True),
    }


def with_fastdp(names: Sequence[str]) -> tuple[str, ...]:
    """These contenders, and fastDP where the user named its folder."""
    return (*names, FASTDP) if fastdp.folder() is not None else tuple(names)
