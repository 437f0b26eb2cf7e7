"""`train.compile_frozen`: compiled blocks, the same clipped sums, and the engine's checks as ever."""

from __future__ import annotations

import copy
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

from asr_finetune.config.schema import ConfigError, MethodConfig, TrainConfig
from asr_finetune.models.checkpointing import checkpoint_blocks
from asr_finetune.models.compiling import compile_frozen_blocks, frozen_blocks
from asr_finetune.models.loading import Recognizer
from asr_finetune.models.methods import apply_method
from asr_finetune.planning.memory import Rehearsal, losses_of
from asr_finetune.progress import Reporter
from asr_finetune.training.setup import prepare_blocks
from dpkernels import PrivacyEngine
from dpkernels.nn import detach
from dpkernels.privacy import SelfCheckReport
from dpkernels.privacy.self_check.probing import innermost
from tests.asr_finetune import small_models, tones
from tests.privacy.strategy_models import distance

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
        with tones.one_thread():
            yield
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


@pytest.mark.parametrize("strategy", STRATEGIES)
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


def test_with_inductor() -> None:
    """In a process of its own, as a run is: inductor imports setuptools, which refuses where distutils came first."""
    code = "from tests.asr_finetune.models.test_compiling import check_inductor; check_inductor()"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=Path(__file__).parents[3])


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


def prepared(folder: Path, **method: Any) -> Recognizer:
    recognizer = small_models.load(folder)
    small_models.same_start(lambda: apply_method(recognizer, MethodConfig(rank=2, **method)))
    for name, parameter in recognizer.model.named_parameters():
        if "lora_B" in name:
            torch.manual_seed(len(name))
            nn.init.normal_(parameter, std=0.3)
    return recognizer


@pytest.mark.parametrize(
    ("family", "method", "expected"),
    [
        ("whisper", {"kind": "lora", "layers": "decoder"}, {"WhisperEncoder": 1}),
        ("whisper", {"kind": "lora"}, {}),
        (
            "parakeet",
            {"kind": "lora"},
            {"ParakeetEncoderSubsamplingConv2D": 1, "ParakeetEncoderConvolutionModule": 2},
        ),
        ("parakeet", {"kind": "full"}, {}),
        ("parakeet", {"kind": "head"}, {"ParakeetEncoder": 1}),
    ],
)
def test_blocks_are_the_largest_that_are_frozen(
    folders: dict[str, Path], family: str, method: dict[str, Any], expected: dict[str, int]
) -> None:
    model = prepared(folders[family], **method).model
    found = [type(block).__name__ for _, block in frozen_blocks(model)]
    assert {name: found.count(name) for name in found} == expected
    for name, block in frozen_blocks(model):
        assert model.get_submodule(name) is block


@pytest.mark.parametrize(
    ("family", "method", "strategy", "checkpointed"),
    [
        ("parakeet", {"kind": "lora"}, "two_pass", True),
        ("whisper", {"kind": "lora", "layers": "decoder"}, "bookkeeping", False),
    ],
)
def test_a_recognisers_clipped_sums_and_self_check(
    folders: dict[str, Path], family: str, method: dict[str, Any], strategy: str, checkpointed: bool
) -> None:
    backend, graphs, runs = counting()
    plain, compiled = prepared(folders[family], **method), prepared(folders[family], **method)
    if checkpointed:
        checkpoint_blocks(compiled.model)
    names = [*compiled.model.state_dict()]
    assert compile_frozen_blocks(compiled.model, backend=backend)
    assert [*compiled.model.state_dict()] == names
    batch, singles = small_models.batch_and_singles(compiled)
    with closing(PrivacyEngine()) as engine:
        private(engine, compiled.model)
        engine.self_check(compiled.loss_per_example, batch, singles=singles)
    detach(compiled.model)
    before = len(runs)
    found = sums(compiled.model, compiled.loss_per_example, [batch, singles[0]], strategy)
    assert distance(found, sums(plain.model, plain.loss_per_example, [batch, singles[0]], strategy)) < 1e-5
    assert len(runs) > before
    assert graphs
    assert compiled.transcribe(batch) == plain.transcribe(batch)


def test_torchs_own_containers_are_looked_into() -> None:
    nested = nn.Sequential(nn.ModuleDict({"a": Block()}), nn.Sequential(Block(), nn.Linear(2, 2)))
    nested.requires_grad_(False)
    assert [name for name, _ in frozen_blocks(nested)] == ["0.a", "1.0"]
    assert list(frozen_blocks(nn.Sequential(nn.Linear(2, 2), nn.Tanh()).requires_grad_(False))) == []


def test_checkpoints_within_a_compiled_block_are_taken_off(folders: dict[str, Path]) -> None:
    model: Any = prepared(folders["whisper"], kind="lora", layers="decoder").model
    checkpoint_blocks(model)
    compile_frozen_blocks(model, backend="eager")
    on = {name for name, m in model.named_modules() if getattr(m, "gradient_checkpointing", False)}
    assert on
    assert all(".decoder" in name for name in on)


def test_a_copy_and_a_rehearsal_are_not_compiled(folders: dict[str, Path]) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("compiled")

    recognizer = prepared(folders["parakeet"], kind="lora")
    item = small_models.items(recognizer)[0]
    with Rehearsal(recognizer.model) as stage:
        expected = stage.peak(losses_of(recognizer, item), 2)
    kinds = [type(module) for module in recognizer.model.modules()]
    compile_frozen_blocks(recognizer.model, backend=refuse)
    assert [type(module) for module in recognizer.model.modules()] == kinds
    with Rehearsal(recognizer.model) as stage:
        assert stage.peak(losses_of(recognizer, item), 2) == expected
    copied = copy.deepcopy(recognizer.model)
    recognizer.loss_per_example(copied, recognizer.collate([item]))


def test_nothing_to_compile_is_refused_by_the_key(folders: dict[str, Path]) -> None:
    recognizer = prepared(folders["parakeet"], kind="full")
    with pytest.raises(ConfigError, match=r"train.compile_frozen=true: every block .* set it to false"):
        prepare_blocks(TrainConfig(compile_frozen=True), recognizer, Reporter(False))


def test_a_machine_that_cannot_compile_is_told_so() -> None:
    with pytest.raises(ConfigError, match=r"train.compile_frozen=true: .*'nonsense'.* set it to false"):
        compile_frozen_blocks(Net(), backend="nonsense")
    broken = {"cpp.cxx": (None, "no-such-compiler"), "force_disable_caches": True}
    with (
        torch._inductor.config.patch(broken),
        pytest.raises(ConfigError, match=r"does not work here on cpu: .*C\+\+ compiler"),
    ):
        compile_frozen_blocks(Net())
