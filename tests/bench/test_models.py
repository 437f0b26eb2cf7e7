"""The table of models: its page, a part of it run anew, and the faults that the judge must show."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

for package in ("transformers", "peft"):  # found, not imported: bench.models.zoo imports torchvision first
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)
from bench.models import table  # noqa: E402
from bench.models.entry import Entry, Kind  # noqa: E402
from bench.models.judge import ERROR, METHODS, REFUSED, RIGHT, WRONG, judge  # noqa: E402
from bench.models.zoo import ENTRIES  # noqa: E402
from dpkernels.nn.layers import linear  # noqa: E402
from tests.slow import slow_cases  # noqa: E402

# One of each kind, and of each way in which a model is covered or refused.
QUICK = ("BERT", "GPT-2", "ViT", "wav2vec 2.0")
SLOW = ("CLIP", "ConvNeXt", "DeBERTa v3", "Llama", "M2M-100, NLLB", "Mixtral", "Parakeet CTC", "RWKV", "T5")


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recorded() -> dict[tuple[str, str, str], str]:
    return {(v.library, v.name, v.method): v.status for v in table.load()[1]}


def assert_as_recorded(entries: list[Entry]) -> None:
    found = {(e.library, e.name, m): judge(e, m) for e in entries for m in METHODS}
    want = recorded()
    other = [
        f"{key}: {v.status}, not {want.get(key)}: {v.reason}"
        for key, v in found.items()
        if v.status != want.get(key)
    ]
    assert not other, "\n".join(other)


def test_the_page_is_made_of_the_results() -> None:
    assert table.PAGE.read_text(encoding="utf-8") == table.page(*table.load())


def test_nothing_is_wrong_and_enough_is_right() -> None:
    found = table.counts(table.load()[1])
    for method, enough in (("lora", 60), ("all", 50)):
        assert sum(found[method].values()) >= 80
        assert found[method][RIGHT] >= enough
        assert found[method][WRONG] == found[method][ERROR] == 0


def test_the_table_has_the_zoo() -> None:
    """Those of libraries that are not installed here are in the table all the same."""
    names = {(entry.library, entry.name) for entry in ENTRIES}
    assert len(names) == len(ENTRIES)
    assert {(library, name, method) for library, name in names for method in METHODS} <= set(recorded())


@pytest.mark.thinned(2)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*QUICK, *slow_cases(*SLOW)])
def test_a_part_of_it_is_as_recorded(name: str) -> None:
    (chosen,) = [entry for entry in ENTRIES if entry.name == name and entry.library == "transformers"]
    assert_as_recorded([chosen])


@pytest.mark.models
@pytest.mark.filterwarnings("ignore")
def test_all_of_it_is_as_recorded() -> None:
    assert_as_recorded(ENTRIES)


# -- faults ------------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


class Mixing(Small):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out - out.mean(0).detach() / 2


class Unnamed(Small):
    def forward(self, x: Tensor) -> Tensor:
        if getattr(self.first, "ghost_tape", None) is not None:
            raise IndexError("some size")
        return super().forward(x)


class Untold(Small):
    def forward(self, x: Tensor) -> Tensor:
        if getattr(self.first, "ghost_tape", None) is not None:
            raise RuntimeError("sizes of tensors must match")
        return super().forward(x)


class Bilinear(Small):
    def __init__(self) -> None:
        super().__init__()
        self.big = nn.Bilinear(64, 64, 64)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.repeat(1, 1, 16)
        return super().forward(x) + self.big(wide, wide)[..., :2]


class PastItsRule(Small):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.second.weight.mean()


class Silent(Small):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0


def entry(build: Callable[[], nn.Module]) -> Entry:
    def batch(size: int) -> dict[str, Tensor]:
        return {"x": torch.randn(size, 5, 4)}

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["x"]).square().flatten(1).sum(1)

    return Entry("small", "none", Kind("rows", batch, loss, 5), build)


@pytest.mark.parametrize(
    ("build", "status", "reason"),
    [
        (Small, RIGHT, ""),
        (Mixing, WRONG, "the losses"),
        (Unnamed, ERROR, "IndexError"),
        (Untold, ERROR, "sizes of tensors"),
        (Bilinear, REFUSED, "big.weight"),
        (PastItsRule, REFUSED, "second.weight"),
        (Silent, ERROR, "nothing would be shown"),
    ],
)
def test_the_verdicts(build: Callable[[], nn.Module], status: str, reason: str) -> None:
    verdict = judge(entry(build), "all")
    assert (verdict.status, reason in verdict.reason) == (status, True), verdict
    assert (verdict.error is not None) == (status in (RIGHT, WRONG))


def test_lora_is_judged_by_the_adapters() -> None:
    verdict = judge(entry(Small), "lora")
    assert verdict.status == RIGHT, verdict
    assert verdict.parameters == 2 * (4 + 6) + 2 * (6 + 2)


@pytest.mark.parametrize(
    "fault", ["half a gradient", "rows exchanged", "another forward", "a norm too small"]
)
def test_a_fault_in_a_layer_is_wrong(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    plain, norm = linear.LinearRecord, linear.LinearRecord.norm_sq

    def record(layer: str, weight: nn.Parameter, x: Tensor, g: Tensor, *more: Any, **named: Any) -> Any:
        if fault == "half a gradient":
            g = g / 2
        if fault == "rows exchanged":
            x = x.flip(0)
        return plain(layer, weight, x, g, *more, **named)

    if fault == "another forward":
        monkeypatch.setattr(linear, "not_a_view", lambda y: y * (1 + 1e-7))
    elif fault == "a norm too small":
        monkeypatch.setattr(plain, "norm_sq", lambda self: norm(self) * 0.99)
    else:
        monkeypatch.setattr(linear, "LinearRecord", record)
    assert judge(entry(Small), "all").status == WRONG


def test_a_verdict_survives_the_file(tmp_path: Any) -> None:
    verdicts = [judge(entry(build), "all") for build in (Small, Bilinear, Mixing)]
    verdicts.append(dataclasses.replace(verdicts[0], error=0.0))
    table.save(verdicts, tmp_path / "models.json")
    versions, found = table.load(tmp_path / "models.json")
    assert found == verdicts
    assert versions["torch"] == torch.__version__
    assert [v.status for v in table.faults(found)] == [WRONG]
