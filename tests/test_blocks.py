"""Blocks of a model: compiled where they are frozen, with the same clipped sums, and the engine's checks as ever."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._inductor.config
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dpkernels import PrivacyEngine
from dpkernels.blocks import CompilerError, compile_frozen_blocks, frozen_blocks
from dpkernels.privacy import SelfCheckReport
from dpkernels.privacy.self_check.probing import innermost
from tests.privacy.strategy_models import distance
from tests.slow import slow_cases

STRATEGIES = ("bookkeeping", "mixed", "two_pass", "per_layer")
Graphs = list[torch.fx.GraphModule]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    limits: Any = torch._dynamo.config
    with (
        limits.patch(recompile_limit=limits.recompile_limit),
        torch._functorch.config.patch(donated_buffer=True),
    ):
        torch._dynamo.reset()
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)
    torch._dynamo.reset()


def counting(backend: str = "aot_eager") -> tuple[Callable[..., Any], Graphs, list[int]]:
    """A backend, the graphs that it compiled, and which of them ran, in order."""
    graphs: Graphs = []
    runs: list[int] = []

    def compile_graph(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        number = len(graphs)
        graphs.append(graph)
        compiled = torch._dynamo.lookup_backend(backend)(graph, inputs)

        def run(*arguments: Any) -> Any:
            runs.append(number)
            return compiled(*arguments)

        return run

    return compile_graph, graphs, runs


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Net(nn.Module):
    """A trained layer, a frozen block of two layers, a trained layer; on [B,T,6], any T."""

    def __init__(self, block: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.block = Block() if block is None else block
        self.block.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.block(self.first(x))))


def squares(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().flatten(1).sum(1)


def in_half(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return squares(model, x).float()


def batches() -> list[Tensor]:
    """Of unlike sizes and lengths, one of a single example."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, length, 6, generator=generator) for size, length in ((3, 5), (2, 9), (1, 4))]


def private(engine: PrivacyEngine, model: nn.Module, strategy: str = "bookkeeping") -> Any:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with pytest.warns(UserWarning, match="noise_multiplier=0"):
        return engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(trained, lr=0.0),
            data_loader=DataLoader(range(6), batch_size=6),  # type: ignore[arg-type]
            noise_multiplier=0.0,
            max_grad_norm=1.0,
            strategy=strategy,
        )[1]


def sums(
    model: nn.Module, loss_fn: Callable[..., Tensor], parts: list[Any], strategy: str
) -> dict[str, Tensor]:
    with closing(PrivacyEngine()) as engine:
        optimizer = private(engine, model.train(), strategy)
        optimizer.keep_gradients = True
        for part in parts:
            optimizer.backward(loss_fn(model, part))
        optimizer.step()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["bookkeeping", "two_pass", *slow_cases("mixed", "per_layer")])
def test_clipped_sums_are_those_of_uncompiled_blocks(strategy: str) -> None:
    backend, graphs, runs = counting()
    model = Net()
    assert compile_frozen_blocks(model, backend=backend) == ["block"]
    assert (
        distance(sums(model, squares, batches(), strategy), sums(Net(), squares, batches(), strategy)) < 1e-6
    )
    assert len(graphs) == 2  # a single example has one of its own; another length has not
    assert runs[-1] == 1  # those before it ask for batch axes
    assert set(runs[:-1]) == {0}


@pytest.mark.slow
def test_with_inductor() -> None:
    """In a process of its own, as a run is: inductor imports setuptools, which refuses where distutils came first."""
    code = "from tests.test_blocks import check_inductor; check_inductor()"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=Path(__file__).parents[1])


def check_inductor() -> None:
    model = Net()
    compile_frozen_blocks(model)
    part = batches()[:1]
    assert distance(sums(model, squares, part, "two_pass"), sums(Net(), squares, part, "two_pass")) < 1e-5


def test_what_training_runs_is_what_the_self_check_ran() -> None:
    """No form of its own, with the check's hooks in it."""
    backend, graphs, runs = counting()
    model = Net()
    compile_frozen_blocks(model, backend=backend)
    with closing(PrivacyEngine()) as engine:
        optimizer = private(engine, model)
        batch = batches()[0]
        report = engine.self_check(squares, batch, singles=[batch[i : i + 1] for i in range(3)])
        assert isinstance(report, SelfCheckReport)
        checked = len(graphs)
        runs.clear()
        optimizer.backward(squares(model.train(), batch))
        assert len(graphs) == checked
        # In half precision the graphs are others, and the batch-independence check runs those.
        engine.check_batch_independence(in_half, batch)
        assert (checked_in_half := len(graphs)) > checked
        optimizer.zero_grad()
        optimizer.backward(in_half(model.train(), batch))
        assert len(graphs) == checked_in_half
    assert runs
    code = "".join(graph.code for graph in graphs)
    assert "detach" not in code, code


def test_the_self_check_hooks_nothing_that_is_compiled_by_whichever_way() -> None:
    model = nn.Module()
    model.act = nn.Tanh()  # met first under another name than within the compiled block
    model.shared = nn.Sequential(model.act, nn.Linear(8, 8))
    model.shared.compile(backend="eager")
    model.wrapped = torch.compile(nn.Sequential(nn.Linear(8, 8)), backend="eager")
    model.replaced = nn.Sequential(nn.Linear(8, 8))
    model.replaced.forward = torch.compile(model.replaced.forward, backend="eager")  # type: ignore[method-assign]
    model.last = nn.Linear(8, 3)
    assert [name for name, _ in innermost(model)] == ["last"]


class Recording(nn.Module):
    """Writes the mean of what it sees into a buffer."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.how = nn.Linear(8, 8), how
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.detach().mean((0, 1))
        if self.how == "in place":
            self.seen.mul_(0.5).add_(mean)
        elif self.how == "replaced":
            self.seen = mean
        else:
            self.seen.data.copy_(mean)
        return self.layer(x)


@pytest.mark.parametrize("how", ["in place", "replaced", "past autograd"])
def test_a_buffer_that_a_compiled_block_writes_is_still_refused(how: str) -> None:
    backend, graphs, _ = counting()
    model = Net(Recording(how))
    assert compile_frozen_blocks(model, backend=backend) == ["block"]
    with closing(PrivacyEngine()) as engine:
        optimizer = private(engine, model.train())

        def step() -> None:
            optimizer.backward(squares(model, batches()[0]))
            optimizer.step()

        with pytest.raises(RuntimeError, match=r"buffers of the model .*block\.seen"):
            step()
    assert graphs


def test_torchs_own_containers_are_looked_into() -> None:
    nested = nn.Sequential(nn.ModuleDict({"a": Block()}), nn.Sequential(Block(), nn.Linear(2, 2)))
    nested.requires_grad_(False)
    assert [name for name, _ in frozen_blocks(nested)] == ["0.a", "1.0"]
    assert list(frozen_blocks(nn.Sequential(nn.Linear(2, 2), nn.Tanh()).requires_grad_(False))) == []


def test_a_machine_that_cannot_compile_is_told_so() -> None:
    with pytest.raises(CompilerError, match=r"'nonsense'.* train without"):
        compile_frozen_blocks(Net(), backend="nonsense")
    broken = {"cpp.cxx": (None, "no-such-compiler"), "force_disable_caches": True}
    with (
        torch._inductor.config.patch(broken),
        pytest.raises(CompilerError, match=r"does not work here on cpu: .*C\+\+ compiler"),
    ):
        compile_frozen_blocks(Net())
