"""The contenders' names in result files, tables and plots."""

from dpkernels.privacy.keywords import STRATEGIES

TIMED_STRATEGIES = tuple(name for name in STRATEGIES if name != "per_layer")
"""The strategies that clip as every contender does, by the norm of the whole gradient."""

NON_PRIVATE, OWN_LAYERS = "non-private", "own layers, non-private"
OPACUS_HOOKS, OPACUS_GHOST, TORCH_FUNC = "Opacus hooks", "Opacus ghost", "torch.func"
OPACUS_OURS = "Opacus ghost + dpkernels"
FASTDP = "fastDP"


def compiled(name: str) -> str:
    """The name of a contender whose model runs under torch.compile."""
    return f"{name}, compiled"


def ours(strategy: str = "bookkeeping") -> str:
    """The name of this package's contender of a strategy."""
    return f"dpkernels {strategy}"
