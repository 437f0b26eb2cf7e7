"""The recipes that come with the package: what each says is what it does."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from asr_finetune.config.schema import Config
from asr_finetune.config.yaml_io import RECIPES, load_yaml, overridden, recipes
from asr_finetune.models.loading import tiny_parakeet
from asr_finetune.models.recognizer import trained_parameters
from asr_finetune.planning.dry_run import check_run
from asr_finetune.training.run import train
from bench.asr.recipes import recogniser
from dpkernels.privacy import SAFE_DELTA_TIMES_N, noise_multiplier
from tests.asr_finetune import families, small_models, tones
from tests.asr_finetune.recordings import write
from tests.slow import slow_cases

DOCS = RECIPES.parents[2] / "docs" / "recipes.md"
MODELS = ("parakeet", "wav2vec2_bert")
LIBRISPEECH = [f"{model}_{kind}" for model in MODELS for kind in ("lora", "bitfit", "dp_rp", "full")]
# Transducers, and CTC models that keep their output layer.
OTHERS = ["parakeet_tdt_lora", "parakeet_tdt_new_decoder", "omniasr_ctc_lora", "lasr_ctc_lora"]
PRIVATE = [*LIBRISPEECH, *OTHERS]
QUICK = ("wav2vec2_bert_bitfit", "parakeet_warm_start")
WARM = [f"{model}_warm_start" for model in MODELS]
SUBSETS = ("train-clean-100", "train-clean-360", "train-other-500", "test-clean", "test-other")
N, EPSILON, DELTA = 281_241, 10.0, 3.52e-6
# Noise by hand: calibration takes seconds, and the recipes' own has a test.
TINY = (
    "train.batch_size=8",
    "train.steps=3",
    "train.physical_batch_size=4",
    "train.warmup_steps=1",
    "train.num_workers=0",
    "privacy.delta=1e-3",
    "privacy.noise_multiplier=2.0",
    "method.rank=2",
    "model.device=cpu",
    "evaluate.bootstrap=0",
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with tones.one_thread():
        yield


def head(name: str) -> str:
    """The comment that a recipe begins with."""
    lines = (RECIPES / f"{name}.yaml").read_text().split("\n")
    return "\n".join(line for line in lines if line.startswith("#"))


@cache
def sigma_for(batch: int, steps: int) -> float:
    return noise_multiplier(EPSILON, DELTA, batch / N, steps, dataset_size=N)


def test_there_is_one_for_each_model_and_method() -> None:
    assert {*PRIVATE, *WARM} <= set(recipes())


@pytest.mark.slow
@pytest.mark.parametrize("name", PRIVATE)
def test_the_noise_is_the_accountants(name: str) -> None:
    config = Config.from_dict(load_yaml(name))
    config.check_trainable()
    stated = re.search(
        r"σ = ([\d.]+) \(PLD, Poisson sampling, N = 281,241, batch ([\d,]+), ([\d,]+) steps\)", head(name)
    )
    assert stated is not None
    sigma, batch, steps = (float(part.replace(",", "")) for part in stated.groups())
    assert (config.train.batch_size, config.train.steps) == (batch, steps)
    privacy = config.privacy
    assert (privacy.epsilon, privacy.delta, privacy.accountant) == (EPSILON, DELTA, "pld")
    assert privacy.noise_multiplier is None
    assert sigma == sigma_for(config.train.batch_size, config.train.steps)


@pytest.mark.parametrize("name", [*PRIVATE, *WARM])
def test_each_says_what_is_whose_and_has_one_place_for_what_is_measured(name: str) -> None:
    text = head(name)
    assert len(re.findall(r"^# (?:measured|estimated) on one H100: .+", text, re.M)) == 1
    assert "Ours" in text
    if name in PRIVATE:
        (paper,) = re.findall(r"^# The paper's \(.*$", text, re.M)
        assert paper.endswith("LibriSpeech's 281,241 training utterances, (ε, δ) = (10, 3.52e-6).")
        assert "arXiv 2410.01948" in paper
    else:
        assert text.startswith("# NOT PRIVATE")
        assert Config.from_dict(load_yaml(name)).privacy.enabled is False
    assert f"--config {name}" in text


@pytest.mark.parametrize("name", LIBRISPEECH)
def test_what_a_recipe_leaves_to_its_bases_is_there(name: str) -> None:
    config = Config.from_dict(load_yaml(name))
    assert config.method.kind == name.removeprefix("parakeet_").removeprefix("wav2vec2_bert_")
    assert config.data.train_split == "train-clean-100+train-clean-360+train-other-500"
    assert config.model.new_head
    assert config.output == f"runs/{name}"
    assert len((RECIPES / f"{name}.yaml").read_text().split("\n")) < 30


@pytest.mark.parametrize("name", OTHERS)
def test_what_a_recipe_of_another_family_says_is_there(name: str) -> None:
    config = Config.from_dict(load_yaml(name))
    assert config.method.kind == "lora"
    assert config.data.train_split == "train-clean-100+train-clean-360+train-other-500"
    assert config.model.new_head == name.endswith("new_decoder")
    assert config.output == f"runs/{name}"


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LibriSpeech tree of noise, tiny checkpoints of both models, and a manifest."""
    folder = tmp_path_factory.mktemp("recipes")
    for number, subset in enumerate(SUBSETS):
        place = folder / "LibriSpeech" / subset / str(number) / "1"
        lines = []
        for index in range(5):
            write(place / f"{number}-1-{index}.flac", 1.2, seed=100 * number + index)
            lines.append(f"{number}-1-{index} {('LOW', 'HIGH', 'LOW HIGH')[index % 3]}\n")
        (place / f"{number}-1.trans.txt").write_text("".join(lines))
    # Letters as its own tokens: enough of them that a new layer is worth its name.
    with tones.one_thread():
        tiny_parakeet([*"ghilow", "|"], hidden=16, layers=2, heads=2, channels=4, mels=16).save(
            folder / "parakeet"
        )
        small_models.wav2vec2_bert(folder / "wav2vec2_bert")
        others = ("parakeet_tdt", "omniasr_ctc", "lasr_ctc")
        for name in others:
            families.FAMILIES[name](folder / name)
    return {
        "data": folder / "LibriSpeech",
        "parakeet": folder / "parakeet",
        "wav2vec2_bert": folder / "wav2vec2_bert",
        **{name: folder / name for name in others},
    }


def tiny(name: str, stand_ins: dict[str, Path], output: Path, *settings: str) -> Config:
    """A recipe with a stand-in for its model, its data and its sizes."""
    family = (
        name.rsplit("_", 2)[0]
        if name.endswith(("dp_rp", "warm_start", "new_decoder"))
        else name.rsplit("_", 1)[0]
    )
    flags = {
        "model.name": str(stand_ins[family]),
        "data.train": str(stand_ins["data"]),
        "output": str(output),
    }
    if name in PRIVATE:
        flags["data.test"] = str(stand_ins["data"])
    config = Config.from_dict(overridden(load_yaml(name), flags, [*TINY, *settings]))
    config.check_trainable()
    return config


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [*QUICK, *slow_cases(*(name for name in (*PRIVATE, *WARM) if name not in QUICK))],
)
def test_every_recipe_would_start(stand_ins: dict[str, Path], tmp_path: Path, name: str) -> None:
    checks = check_run(tiny(name, stand_ins, tmp_path / "run"), progress=False)
    assert [check for check in checks if not check.passed] == []
    found = {check.what: check.found for check in checks}
    if name in PRIVATE:
        assert "15 utterances" in found["training data"]
        assert "5 utterances" in found["test data"]
        assert "target 10" in found["privacy"]
    assert ("classes (new)" in found["model"]) == (name not in OTHERS or name.endswith("new_decoder"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["parakeet_lora", "wav2vec2_bert_full"])
def test_a_recipe_in_bfloat16_with_recomputed_blocks(
    stand_ins: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """All of the run: self-check, training, evaluation, and files that are float32 and load without this package."""
    settings = ("model.dtype=bfloat16", "train.checkpointing=true", "privacy.strategy=mixed")
    result = train(tiny(name, stand_ins, tmp_path / "run", *settings), progress=False)
    assert result.steps == 3
    assert result.epsilon is not None
    saved = tmp_path / "run" / ("adapter" if name.endswith("lora") else "model")
    tensors = [tensor for file in saved.glob("*.safetensors") for tensor in load_file(file).values()]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    evaluated = small_models.load(saved, dtype="bfloat16")
    batch, _ = small_models.batch_and_singles(evaluated)
    assert len(evaluated.transcribe(batch)) == len(batch["labels"])


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_a_warm_start_goes_into_a_private_run(stand_ins: dict[str, Path], tmp_path: Path, model: str) -> None:
    """As the recipe's comment says: the layer is not new any more, and is trained on along with the adapters."""
    warm = tiny(f"{model}_warm_start", stand_ins, tmp_path / "warm")
    train(warm, progress=False)
    settings = ("model.new_head=false", "model.vocabulary=keep", "method.train_head=true")
    said = head(f"{model}_warm_start")
    assert all(f"--set {setting}" in said for setting in settings)
    again = {**stand_ins, model: tmp_path / "warm" / "model"}
    result = train(tiny(f"{model}_lora", again, tmp_path / "run", *settings), progress=False)
    assert result.epsilon is not None
    assert result.epsilon <= EPSILON
    adapter = (tmp_path / "run" / "adapter" / "adapter_config.json").read_text()
    assert yaml.safe_load(adapter)["modules_to_save"] == ["ctc_head" if model == "parakeet" else "lm_head"]


def parameters(config: Config) -> int:
    """Trained parameters of the real model, without its memory."""
    return trained_parameters(recogniser(config, "meta").model)


@pytest.mark.thinned(5)
@pytest.mark.parametrize("name", PRIVATE)
def test_the_table_in_the_docs_is_the_recipes(name: str) -> None:
    first, _ = DOCS.read_text().split("\n## Hours", maxsplit=1)
    (row,) = re.findall(rf"^\| `{name}` \| (.*) \|$", first, re.M)
    config = Config.from_dict(load_yaml(name))
    said = [cell.replace(",", "") for cell in row.split(" | ")]
    (sigma,) = re.findall(r"σ = ([\d.]+) ", head(name))
    assert said == [
        str(parameters(config)),
        str(config.train.batch_size),
        str(config.train.steps),
        sigma,
    ]


def test_every_file_is_in_the_package() -> None:
    package = RECIPES.parents[1]
    listed = tomllib.loads((package.parent / "pyproject.toml").read_text())
    patterns = listed["tool"]["setuptools"]["package-data"]["asr_finetune"]
    shipped = {path for pattern in patterns for path in package.glob(pattern)}
    assert {*RECIPES.rglob("*.yaml")} <= shipped


def test_bases_are_no_recipes() -> None:
    names: Any = {path.stem for path in (RECIPES / "base").glob("*.yaml")}
    assert names == {"librispeech_960h", "parakeet_tdt", *MODELS}
    assert not names & set(recipes())


def test_the_digits_have_a_delta_that_nothing_warns_of() -> None:
    """Unlike LibriSpeech's, which is the paper's."""
    recipe = Config.from_dict(load_yaml("fsdd_whisper_tiny"))
    assert recipe.privacy.delta is not None
    assert recipe.privacy.delta * 1800 <= SAFE_DELTA_TIMES_N
