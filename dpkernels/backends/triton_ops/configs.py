"""The table of tiles, warps and pipeline stages of every kernel.

The table replaces autotuning: a kernel's configuration is the same on every run and every machine of a kind, a key does
not contain a batch size or a length, and `python -m bench.gpu.triton_table` compiles every entry for every
architecture. Entries for 16-bit tensors are among the fastest of those tried on an H100 for
layers of 1024×1024 and 1024×4096 at T = 188 and 750 (bench/results/nvidia-h100-80gb-hbm3/tune.json lists
faster ones that are untested there). The others, and all of the transducer's (`joint_`, `lattice_`), which have run on
no GPU, are chosen by registers and shared memory; an architecture has an entry of its own if the common one would spill
on it.
"""

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Config:
    """Tile sizes by the name of the kernel's constexpr, and a program's warps and stages."""

    tiles: dict[str, int]
    warps: int = 4
    stages: int = 1
    options: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        launch = {"num_warps": self.warps, "num_stages": self.stages}
        object.__setattr__(self, "options", self.tiles | launch)


ANY = 0
"""Key for all architectures without an entry of their own."""

CONFIGS: dict[str, dict[tuple[int, int], Config]] = {
    # kernel: {(bytes of an element, compute capability × 10): ...}
    "finish_norms": {(4, ANY): Config({"BLOCK": 256}, warps=1)},
    "add_weighted": {(4, ANY): Config({"BLOCK": 128}, warps=4)},
    "bias_sums": {
        (2, 100): Config({"BT": 64, "BN": 64}, warps=8),
        (2, ANY): Config({"BT": 128, "BN": 64}),
        (4, ANY): Config({"BT": 32, "BN": 64}),
    },
    "layer_norm_sums": {
        (2, ANY): Config({"BT": 64, "BN": 32}),
        (4, ANY): Config({"BT": 16, "BN": 64}),
    },
    "embedding_squares": {
        (2, ANY): Config({"BT": 8, "BN": 128}),
        (4, ANY): Config({"BT": 8, "BN": 128}),
    },
    "embedding_add": {
        (2, ANY): Config({"BT": 8, "BN": 128}),
        (4, ANY): Config({"BT": 8, "BN": 128}),
    },
    "depthwise_conv1d_sums": {
        (2, ANY): Config({"BC": 8, "BT": 16, "EACH": 2, "SPAN": 1024}),
        (4, ANY): Config({"BC": 8, "BT": 16, "EACH": 1, "SPAN": 1024}),
    },
    "depthwise_conv1d_sums channels_last": {
        (2, ANY): Config({"BC": 64, "BT": 4, "EACH": 2, "SPAN": 256}),
        (4, ANY): Config({"BC": 64, "BT": 4, "EACH": 2, "SPAN": 256}),
    },
    "lora_pieces": {
        (2, ANY): Config({"BT": 64, "BN": 64, "SAMPLES": 4}, warps=4, stages=4),
        (4, ANY): Config({"BT": 32, "BN": 64, "SAMPLES": 4}, warps=8, stages=2),
    },
    "lora_pieces unaligned": {
        (2, ANY): Config({"BT": 32, "BN": 64, "SAMPLES": 4}, warps=8, stages=1),
        (4, ANY): Config({"BT": 16, "BN": 64, "SAMPLES": 4}, warps=8, stages=1),
    },
    "lora_pieces long": {
        (2, ANY): Config({"BT": 64, "BN": 64, "SAMPLES": 4}, warps=8, stages=3),
        (4, ANY): Config({"BT": 32, "BN": 64, "SAMPLES": 4}, warps=8, stages=1),
    },
    "lora_pieces long unaligned": {
        (2, ANY): Config({"BT": 32, "BN": 64, "SAMPLES": 4}, warps=8, stages=1),
        (4, ANY): Config({"BT": 16, "BN": 64, "SAMPLES": 4}, warps=8, stages=1),
    },
    "lora_forms long": {
        (2, ANY): Config({"BT": 64, "BN": 64}, warps=8, stages=3),
        (4, ANY): Config({"BT": 32, "BN": 64}, warps=8, stages=1),
    },
    "lora_forms long unaligned": {
        (4, 80): Config({"BT": 16, "BN": 64}, warps=4, stages=1),
        (2, ANY): Config({"BT": 32, "BN": 64}, warps=8, stages=1),
        (4, ANY): Config({"BT": 16, "BN": 64}, warps=8, stages=1),
    },
    "lora_forms": {
        (2, ANY): Config({"BT": 64, "BN": 64}, warps=4, stages=4),
        (4, ANY): Config({"BT": 32, "BN": 64}, warps=4, stages=2),
    },
    "lora_forms unaligned": {
        (2, 100): Config({"BT": 32, "BN": 64}, warps=8, stages=1),
        (2, ANY): Config({"BT": 32, "BN": 64}, warps=4, stages=1),
        (4, ANY): Config({"BT": 16, "BN": 64}, warps=4, stages=1),
    },
    "linear_gram": {
        (2, 80): Config({"BS": 64, "BT": 128, "BK": 64}, warps=8, stages=4),
        (2, ANY): Config({"BS": 128, "BT": 128, "BK": 64}, warps=8, stages=4),
        (4, ANY): Config({"BS": 64, "BT": 64, "BK": 16}, warps=8, stages=2),
    },
    "linear_gram unaligned": {
        (2, ANY): Config({"BS": 64, "BT": 64, "BK": 64}, warps=8, stages=3),
        (4, ANY): Config({"BS": 64, "BT": 64, "BK": 16}, warps=8, stages=1),
    },
    "frames_that_count": {
        (2, ANY): Config({"BT": 64, "BN": 32}),
        (4, ANY): Config({"BT": 64, "BN": 32}),
    },
    "order_frames": {(4, ANY): Config({"BLOCK": 1024})},
    "linear_rows": {
        (2, ANY): Config({"BT": 8, "BN": 256}),
        (4, ANY): Config({"BT": 16, "BN": 128}),
    },
    "linear_direct": {
        (2, ANY): Config({"BT": 64, "BP": 128, "BD": 64}, warps=4, stages=3),
        (4, ANY): Config({"BT": 32, "BP": 64, "BD": 64}, warps=8, stages=2),
    },
    "linear_direct long": {
        (2, ANY): Config({"BT": 64, "BP": 64, "BD": 64}, warps=8, stages=3),
        (4, ANY): Config({"BT": 32, "BP": 64, "BD": 64}, warps=8, stages=2),
    },
    "linear_direct long unaligned": {
        (2, ANY): Config({"BT": 32, "BP": 64, "BD": 32}, warps=8, stages=2),
        (4, ANY): Config({"BT": 32, "BP": 32, "BD": 32}, warps=8, stages=2),
    },
    "linear_direct unaligned": {
        (2, ANY): Config({"BT": 32, "BP": 64, "BD": 128}, warps=8, stages=2),
        (4, ANY): Config({"BT": 32, "BP": 64, "BD": 64}, warps=8, stages=2),
    },
    "linear_sum unaligned": {
        (2, ANY): Config({"BT": 32, "BP": 64, "BD": 64}, warps=8, stages=2),
        (4, ANY): Config({"BT": 32, "BP": 64, "BD": 32}, warps=8, stages=1),
    },
    "linear_sum": {
        (2, 80): Config({"BT": 32, "BP": 128, "BD": 64}, warps=8, stages=3),
        (2, 100): Config({"BT": 64, "BP": 64, "BD": 64}, warps=4, stages=3),
        (2, ANY): Config({"BT": 64, "BP": 64, "BD": 64}, warps=4, stages=4),
        (4, ANY): Config({"BT": 32, "BP": 64, "BD": 64}, warps=8, stages=2),
    },
    "grouped_norms": {
        (4, 80): Config({"BT": 32, "BN": 64}, warps=8, stages=2),
        (4, 100): Config({"BT": 32, "BN": 64}, warps=4, stages=1),
        (2, ANY): Config({"BT": 64, "BN": 128}, warps=4, stages=2),
        (4, ANY): Config({"BT": 32, "BN": 64}, warps=4, stages=2),
    },
    "grouped_norms long": {
        (2, ANY): Config({"BT": 64, "BN": 128}, warps=8, stages=2),
        (4, ANY): Config({"BT": 32, "BN": 64}, warps=8, stages=1),
    },
    "grouped_norms long unaligned": {
        (4, 100): Config({"BT": 16, "BN": 64}, warps=4, stages=1),
        (2, ANY): Config({"BT": 32, "BN": 64}, warps=8, stages=1),
        (4, ANY): Config({"BT": 16, "BN": 64}, warps=8, stages=1),
    },
    "grouped_norms unaligned": {
        (2, ANY): Config({"BT": 32, "BN": 64}, warps=4, stages=1),
        (4, ANY): Config({"BT": 16, "BN": 64}, warps=4, stages=1),
    },
    "grouped_sums": {
        (4, 80): Config({"BT": 32, "BN": 64}, warps=8, stages=2),
        (2, ANY): Config({"BT": 64, "BN": 64}, warps=4, stages=3),
        (4, ANY): Config({"BT": 32, "BN": 64}, warps=4, stages=2),
    },
    "grouped_sums unaligned": {
        (4, 100): Config({"BT": 16, "BN": 64}, warps=8, stages=1),
        (2, ANY): Config({"BT": 32, "BN": 64}, warps=4, stages=1),
        (4, ANY): Config({"BT": 16, "BN": 64}, warps=4, stages=1),
    },
    "grouped_vector_norms": {(4, ANY): Config({"BN": 2048})},
    "grouped_vector_sums": {(4, ANY): Config({"BN": 256})},
    "finish_group": {(4, ANY): Config({"BLOCK": 64}, warps=1)},
    "add_columns": {(4, ANY): Config({"BLOCK": 256}, warps=1)},
    "joint_scores": {
        (2, 80): Config({"BM": 64, "BN": 128, "BK": 32}, warps=8, stages=3),
        (2, 100): Config({"BM": 128, "BN": 64, "BK": 64}, warps=8, stages=3),
        (2, ANY): Config({"BM": 128, "BN": 128, "BK": 64}, warps=8, stages=3),
        (4, ANY): Config({"BM": 32, "BN": 64, "BK": 16}, warps=4, stages=2),
    },
    "joint_scores unaligned": {
        (2, ANY): Config({"BM": 64, "BN": 64, "BK": 32}, warps=8, stages=2),
        (4, ANY): Config({"BM": 32, "BN": 32, "BK": 16}, warps=4, stages=2),
    },
    "joint_logit_gradients": {
        (2, 80): Config({"BM": 64, "BN": 128, "BK": 32}, warps=8, stages=3),
        (2, ANY): Config({"BM": 128, "BN": 128, "BK": 64}, warps=8, stages=3),
        (4, ANY): Config({"BM": 64, "BN": 64, "BK": 16}, warps=8, stages=2),
    },
    "joint_logit_gradients unaligned": {
        (2, ANY): Config({"BM": 64, "BN": 64, "BK": 32}, warps=8, stages=2),
        (4, ANY): Config({"BM": 64, "BN": 32, "BK": 16}, warps=8, stages=2),
    },
    "joint_state_gradients unaligned": {
        (2, ANY): Config({"BM": 64, "BN": 64, "BK": 32}, warps=8, stages=2),
        (4, ANY): Config({"BM": 64, "BN": 32, "BK": 16}, warps=8, stages=2),
    },
    "joint_state_gradients": {
        (2, ANY): Config({"BM": 128, "BN": 128, "BK": 64}, warps=8, stages=3),
        (4, ANY): Config({"BM": 64, "BN": 64, "BK": 16}, warps=8, stages=2),
    },
    "joint_sums": {(4, ANY): Config({"BT": 8, "BN": 128})},
    "joint_states": {(4, ANY): Config({"BM": 16, "BN": 128})},
    "lattice_paths": {(4, ANY): Config({"BLOCK": 64})},
    "lattice_flows": {(4, ANY): Config({"BLOCK": 64})},
    "finish_gram": {(4, ANY): Config({"BLOCK": 128}, warps=1)},
    "finish_direct": {(4, ANY): Config({"BLOCK": 128}, warps=1)},
}


def config(kernel: str, dtype: torch.dtype, architecture: int, aligned: bool = True) -> Config:
    """Return the entry for a kernel on inputs of a dtype.

    Args:
        kernel: the name of the kernel's function.
        dtype: the dtype of the tensors that the kernel reads.
        architecture: compute capability × 10, such as 90; 0 in the interpreter.
        aligned: whether the kernel reads 16 bytes at a time. If not, addresses take registers, and the entry
            "kernel unaligned", if it exists, has smaller tiles.
    """
    entries = CONFIGS[kernel]
    if not aligned:
        entries = CONFIGS.get(f"{kernel} unaligned", entries)
    size = dtype.itemsize if (dtype.itemsize, ANY) in entries else 4
    # sm_103 runs as sm_100 does, sm_86 as sm_80
    return entries.get((size, architecture // 10 * 10), entries[size, ANY])


SUMS: dict[str, tuple[str, ...]] = {
    "linear": ("linear_sum", "grouped_sums"),
    "lora": ("lora_pieces", "grouped_sums"),
}
"""The kernels that may compute a family's weighted sum."""


def largest(kernels: tuple[str, ...], tile: str, dtype: torch.dtype, architecture: int) -> int:
    """Return the largest tile size over kernels and layouts, for a bound that must hold for each of them."""
    return max(
        config(kernel, dtype, architecture, aligned).tiles[tile]
        for kernel in kernels
        for aligned in (True, False)
    )
