"""The import direction: reference and backends at the bottom, then ops, nn, privacy and interop, then the program."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# package -> the packages of this repository that it may import besides itself
ALLOWED = {
    "dpkernels.reference": set(),
    "dpkernels.backends": set(),
    "dpkernels.ops": {"dpkernels.reference", "dpkernels.backends"},
    "dpkernels.losses": {"dpkernels.nn"},
    "dpkernels.deprecation": set(),
    "dpkernels.errors": set(),
    "dpkernels.files": {"dpkernels.errors"},
    "dpkernels.rounding": set(),
    "dpkernels.checkpoint": {"dpkernels.errors", "dpkernels.files"},
    "dpkernels.nn": {"dpkernels.ops", "dpkernels.deprecation", "dpkernels.errors"},
    "dpkernels.privacy": {
        "dpkernels.nn",
        "dpkernels.ops",
        "dpkernels.deprecation",
        "dpkernels.errors",
        "dpkernels.files",
        "dpkernels.rounding",
    },
    "dpkernels.interop": {"dpkernels.nn", "dpkernels.ops"},  # rules of layers, which nn registers
    "dpkernels.interop.trainer": {  # stands on the engine
        "dpkernels.nn",
        "dpkernels.privacy",
        "dpkernels.losses",
        "dpkernels.errors",
        "dpkernels.files",
        "dpkernels.rounding",
    },
    "dpkernels.blocks": set(),
    "dpkernels.precision": set(),
    "dpkernels.plain": {"dpkernels.privacy", "dpkernels.deprecation"},
    "dpkernels.memory": {"dpkernels.privacy", "dpkernels.blocks"},
    "dpkernels.auditing": {"dpkernels.privacy", "dpkernels.errors", "dpkernels.files"},
    "dpkernels.opacus": {"dpkernels.interop"},  # the interop module, under the name that users type
    # public packages only, and each as a whole: see `violations`
    "asr_finetune": {
        "dpkernels",
        "dpkernels.losses",
        "dpkernels.ops",
        "dpkernels.nn",
        "dpkernels.privacy",
        "dpkernels.interop",
        "dpkernels.deprecation",
        "dpkernels.errors",
        "dpkernels.files",
        "dpkernels.rounding",
        "dpkernels.checkpoint",
        "dpkernels.blocks",
        "dpkernels.precision",
        "dpkernels.plain",
        "dpkernels.memory",
        "dpkernels.auditing",
    },
}
# a constant of the parent package, which Python has imported before any of its modules: no layer
VERSION = "dpkernels.__version__"
# what else may be imported at the bottom
THIRD_PARTY = {"dpkernels.reference": {"torch"}, "dpkernels.backends": {"torch", "triton"}}
# heavy packages, and the only places that may import them
HEAVY = dict.fromkeys(("peft", "datasets", "jiwer"), ("dpkernels.interop", "asr_finetune"))
HEAVY |= {"transformers": ("dpkernels.interop", "dpkernels.interop.trainer", "asr_finetune")}
HEAVY |= {"accelerate": ("dpkernels.interop.trainer",)}
HEAVY |= {"opacus": ("dpkernels.interop",)}


def package_of(module: str) -> str:
    """The entry of ALLOWED that a module belongs to; "dpkernels" for the top level."""
    parts = module.split(".")
    if ".".join(parts[:3]) in ALLOWED:
        return ".".join(parts[:3])
    return module if len(parts) == 1 else ".".join(parts[:2]) if parts[0] == "dpkernels" else parts[0]


def imported(source: str, module: str) -> list[str]:
    """Absolute names of the modules that `source`, the text of `module`, imports anywhere."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = origin(node, module)
            # `from dpkernels import ops` imports the subpackage
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                if whole != VERSION:
                    names.append(whole if base == "dpkernels" and whole in ALLOWED else base)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names += [str(a.value) for a in node.args if isinstance(a, ast.Constant)]
    return names


def origin(node: ast.ImportFrom, module: str) -> str:
    """The absolute name of what `module` imports from."""
    base = node.module or ""
    if not node.level:
        return base
    return ".".join([*module.split(".")[: -node.level], *([base] if base else [])])


class WithoutTypes(ast.NodeTransformer):
    """Takes away what only a type checker sees."""

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        return node.orelse if ast.unparse(node.test).endswith("TYPE_CHECKING") else self.generic_visit(node)


def needed(source: str, module: str, known: set[str]) -> set[str]:
    """Those of `known` that `source` imports once all of it has run, at its top or within functions."""
    tree = WithoutTypes().visit(ast.parse(source))
    names = set(imported(ast.unparse(tree), module))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):  # `from asr_finetune import plots` imports the module
            names |= {f"{origin(node, module)}.{alias.name}" for alias in node.names}
    return names & known


def circle(sources: dict[str, str]) -> list[str]:
    """Modules that import one another in a ring, the first named again at the end; empty where there is none."""
    needs = {module: needed(source, module, set(sources)) for module, source in sources.items()}
    try:
        graphlib.TopologicalSorter(needs).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def violations(source: str, module: str) -> list[str]:
    here = package_of(module)
    if here not in ALLOWED:  # dpkernels/__init__.py and __main__.py only tie things together
        return []
    found = []
    for name in imported(source, module):
        top, target = name.partition(".")[0], package_of(name)
        if top in ("dpkernels", "asr_finetune"):
            bad = target != here and target not in ALLOWED[here]
            bad |= here == "asr_finetune" and top == "dpkernels" and name.count(".") > 1
        elif top in ("bench", "tests"):
            bad = True
        else:
            bad = top in HEAVY and here not in HEAVY[top]
            if here in THIRD_PARTY and top not in sys.stdlib_module_names:
                bad |= top not in THIRD_PARTY[here]
        if bad:
            found.append(f"{module} imports {name}")
    return found


def modules() -> list[tuple[str, Path]]:
    paths = [p for top in ("dpkernels", "asr_finetune", "bench") for p in sorted((ROOT / top).rglob("*.py"))]
    named = []
    for path in paths:
        parts = path.relative_to(ROOT).with_suffix("").parts
        named.append((".".join(parts), path))
    return named


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_go_one_way(package: str) -> None:
    mine = [(module, path) for module, path in modules() if package_of(module) == package]
    found = [line for module, path in mine for line in violations(path.read_text(), module)]
    assert not found, "\n".join(found)


# Files of asr_finetune that each of its folders may import.
LEAVES = ("console", "files", "hub")
# package -> its folders and files -> those of the same package that each may import
FOLDERS: dict[str, dict[str, set[str]]] = {
    "dpkernels.nn": {
        "tensors": set(),
        "copying": set(),
        "thin": set(),
        "batch": set(),
        "recording": {"tensors", "copying", "batch"},
        "layers": {"tensors", "copying", "thin", "batch", "recording"},
        "convert": {"tensors", "copying", "thin", "batch", "recording", "layers"},
    },
    "dpkernels.privacy": {
        "rng": set(),
        "ranks": set(),
        "guards": {"rng", "ranks"},
        "sampling": {"rng", "guards", "ranks"},
        "step": {"rng", "guards", "sampling", "ranks"},
        "keywords": {"step"},
        "accounting": {"sampling", "ranks"},
        "self_check": {"rng", "guards", "sampling", "step"},
        "setup": {"rng", "guards", "sampling", "step", "accounting", "keywords"},
        "engine": {
            *("rng", "ranks", "guards", "sampling", "step", "accounting", "self_check", "setup", "keywords"),
        },
    },
    "asr_finetune": {
        "console": set(),
        "files": set(),
        "hub": set(),
        "config": {*LEAVES},
        "data": {*LEAVES, "config"},
        "models": {*LEAVES, "config", "data"},
        "training": {*LEAVES, "config", "data", "models"},
        "planning": {*LEAVES, "config", "data", "models", "training"},
        "report": {*LEAVES, "config", "data", "models", "training"},
        "demo": {*LEAVES, "config", "data", "models", "training", "planning", "report"},
        "commands": {*LEAVES, "config", "data", "models", "training", "report"},
        "cli": {*LEAVES, "config", "data", "models", "training", "planning", "report", "demo", "commands"},
        "__main__": {"cli"},
    },
    "bench": {
        "names": set(),
        "cases": {"names"},
        "contenders": {"names", "cases"},
        "harness": {"names", "cases", "contenders"},
        "reports": {"names", "cases", "contenders", "harness"},
        "asr": {"names", "cases", "contenders", "harness"},
        "models": set(),
        "scaling": {"cases", "contenders", "harness", "compare", "asr"},
        "gpu": {"cases", "contenders", "harness", "reports"},
        "compare": {"harness"},
        "probe": {"cases", "contenders", "harness"},
        "fit_costs": {"harness"},
        "host": {"names", "cases", "contenders", "harness"},
        "conftest": {"harness"},
        **{
            f"test_{what}": {"names", "cases", "contenders", "harness"}
            for what in ("layers", "model", "opacus", "ops", "step", "transducer")
        },
    },
}


def imports_of(source: str, module: str) -> set[str]:
    """Names that `module` may import as modules, those that only types need included."""
    names = set(imported(source, module))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):  # `from asr_finetune import plots` imports the module
            names |= {f"{origin(node, module)}.{alias.name}" for alias in node.names}
    return names


def folder_of(module: str, package: str) -> str:
    """The folder of `package` that a module is in, or the file; empty for the package itself."""
    return module.removeprefix(package).removeprefix(".").split(".")[0]


def upwards(source: str, module: str, package: str, known: set[str]) -> list[str]:
    """Imports of `module` from a folder of its package that is not below its own; what only types need counts, too."""
    here = folder_of(module, package)
    below = FOLDERS[package][here] | {here}
    return [
        f"{module} imports {name}"
        for name in sorted(imports_of(source, module) & known)
        if name.startswith(f"{package}.") and folder_of(name, package) not in below
    ]


@pytest.mark.parametrize("package", FOLDERS)
def test_folders_import_one_way(package: str) -> None:
    mine = {module: path.read_text() for module, path in modules() if module.startswith(f"{package}.")}
    inner = {module.removesuffix(".__init__"): source for module, source in mine.items()}
    inner.pop(package, None)  # it ties its folders together
    assert {folder_of(module, package) for module in inner} == set(FOLDERS[package])
    found = [
        line for module, source in inner.items() for line in upwards(source, module, package, set(inner))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("package", FOLDERS)
def test_the_folders_stand_in_an_order(package: str) -> None:
    graphlib.TopologicalSorter(FOLDERS[package]).prepare()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dpkernels.nn.batch.shared", "from dpkernels.nn.recording.tape import Tape"),
        ("dpkernels.nn.tensors", "def f():\n    from dpkernels.nn.recording import tape"),
        ("dpkernels.privacy.step.sums", "from dpkernels.privacy.engine import PrivacyEngine"),
        (
            "dpkernels.privacy.guards.model",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from dpkernels.privacy.setup import Setup",
        ),
        ("bench.cases.ops", "from bench.contenders import registry"),
        ("asr_finetune.config.schema", "from asr_finetune.data.corpus import Corpus"),
        ("asr_finetune.data.corpus", "from asr_finetune.models.recognizer import Recognizer"),
        ("asr_finetune.data.corpus", "if TYPE_CHECKING:\n    from asr_finetune.models import recognizer"),
        ("asr_finetune.models.ctc", "def f():\n    from asr_finetune import training"),
        ("asr_finetune.report.report", "from asr_finetune.planning.tables import size"),
        ("asr_finetune.planning.memory", "from ..demo import synth"),
        ("asr_finetune.demo.demo", "import asr_finetune.cli"),
        ("asr_finetune.files", "from asr_finetune.console import Reporter"),
    ],
)
def test_catches_an_import_upwards(module: str, source: str) -> None:
    package = next(package for package in FOLDERS if module.startswith(f"{package}."))
    assert upwards(source, module, package, {name.removesuffix(".__init__") for name, _ in modules()})


def test_every_folder_says_what_lives_there() -> None:
    for top in ("dpkernels", "asr_finetune", "bench"):
        for path in sorted((ROOT / top).rglob("__init__.py")):
            text = ast.get_docstring(ast.parse(path.read_text())) or ""
            assert len(text) > 40, path


@pytest.mark.parametrize(
    "package",
    [
        "asr_finetune",
        "bench",
        "dpkernels.backends",
        "dpkernels.nn",
        "dpkernels.ops",
        "dpkernels.privacy",
        "dpkernels.reference",
    ],
)
def test_no_circle_hides_in_functions(package: str) -> None:
    """An import within a function is for what is heavy or rare, not for a module that could not be imported at the top.

    What only types need is left out: an annotation runs nothing.
    """
    mine = {module: path.read_text() for module, path in modules() if module.startswith(f"{package}.")}
    assert len(mine) > 10
    assert not circle(mine), " -> ".join(circle(mine))


BELOW = "from asr_finetune.above import corpus"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        (f"def load():\n    {BELOW}", True),
        ("def load():\n    from asr_finetune import above", True),
        ("def load():\n    from . import above", True),
        ("import importlib\ndef load():\n    importlib.import_module('asr_finetune.above')", True),
        (f"from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    {BELOW}", False),
        (f"import typing\nif typing.TYPE_CHECKING:\n    x = 1\nelse:\n    {BELOW}", True),
    ],
)
def test_catches_a_circle(source: str, found: bool) -> None:
    sources = {"asr_finetune.above": "import asr_finetune.below", "asr_finetune.below": source}
    assert bool(circle(sources)) == found


def test_there_is_something_to_check() -> None:
    assert {package_of(module) for module, _ in modules()} >= {"dpkernels.ops", "dpkernels.backends"}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dpkernels.reference.linear", "import numpy"),
        ("dpkernels.reference.linear", "from dpkernels.backends import bounds"),
        ("dpkernels.backends.torch_ops", "from dpkernels import reference"),
        ("dpkernels.backends.torch_ops", "def f():\n    from ..ops import linear"),
        ("dpkernels.backends.registry", "import importlib\nimportlib.import_module('dpkernels.reference')"),
        ("dpkernels.ops.linear", "import dpkernels.nn.layers.linear"),
        ("dpkernels.nn.layers.linear", "from dpkernels.backends import native"),
        ("dpkernels.privacy.engine", "import transformers"),
        ("dpkernels.privacy.engine", "from dpkernels import swap"),
        ("dpkernels.privacy.engine", "import opacus"),
        ("dpkernels.opacus", "from opacus.grad_sample import register_norm_sampler"),
        ("dpkernels.opacus", "from dpkernels.nn import GhostLinear"),
        ("asr_finetune.training.run", "import opacus"),
        ("dpkernels.interop.peft", "from dpkernels.privacy import engine"),
        ("dpkernels.interop.peft", "from dpkernels.interop.trainer import losses_per_example"),
        ("dpkernels.privacy.engine", "import accelerate"),
        ("asr_finetune.training.run", "from dpkernels.privacy.engine import PrivacyEngine"),
        ("asr_finetune.training.run", "from dpkernels.nn.layers.linear import GhostLinear"),
        ("dpkernels.nn.layers.linear", "import tests"),
    ],
)
def test_catches_an_import_the_wrong_way(module: str, source: str) -> None:
    assert violations(source, module)


def test_importing_dpkernels_loads_no_heavy_package_and_no_native_library() -> None:
    code = (
        "import sys, dpkernels, dpkernels.ops; "
        f"print([m for m in {sorted({*HEAVY, 'triton'})} if m in sys.modules]); "
        "native = sys.modules.get('dpkernels.backends.native_ops.native'); "
        "print(native is None or native.library.cache_info().currsize == 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "True"], done.stdout
