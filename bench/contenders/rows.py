"""A batch as a map-style data set, for the engines that want a DataLoader."""

from __future__ import annotations

from torch import Tensor
from torch.utils.data import Dataset

from bench.cases.models import Batch


class Rows(Dataset[dict[str, Tensor]]):
    """Example i of the batch; on the CPU, as a data set's examples are."""

    def __init__(self, batch: Batch) -> None:
        self._batch = {name: value.cpu() for name, value in batch.items()}

    def __len__(self) -> int:
        return len(self._batch["labels"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[index] for name, value in self._batch.items()}
