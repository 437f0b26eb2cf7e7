from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from asr_finetune.config.schema import (
    SECTIONS,
    Config,
    ConfigError,
    DataConfig,
    MethodConfig,
    ModelConfig,
    PrivacyConfig,
    TrainConfig,
)
from asr_finetune.config.values import fields_of, help_of
from asr_finetune.config.yaml_io import (
    changed_keys,
    commented_yaml,
    find,
    load_yaml,
    overridden,
    parse_setting,
    template,
)

CONFIGS = Path(__file__).parents[3] / "asr_finetune" / "config" / "recipes"
LEAST: dict[str, Any] = {"model": {"name": "m"}, "data": {"train": "d"}, "output": "o"}


def with_(**sections: Any) -> dict[str, Any]:
    return {**LEAST, **sections}


def test_round_trip_through_yaml_and_comments() -> None:
    values = with_(
        data={"train": "d", "speakers": [19, "anna"], "target_prefix": " "},
        privacy={"epsilon": 8, "delta": "1e-6"},
        train={"learning_rate": "1e-3", "steps": 60.0},
    )
    config = Config.from_dict(values)
    assert config.privacy.delta == 1e-6
    assert config.train.steps == 60
    assert isinstance(config.train.steps, int)
    assert config.data.speakers == ["19", "anna"]
    assert Config.from_dict(yaml.safe_load(config.to_yaml())) == config
    assert Config.from_dict(yaml.safe_load(commented_yaml(config.to_dict()))) == config
    assert Config.from_dict(config.to_dict()) == config


def test_defaults_stand_where_nothing_is_written() -> None:
    config = Config.from_dict(LEAST)
    assert config.privacy == PrivacyConfig()
    assert config.train == TrainConfig()
    assert config.train.batch_size == 256


def test_the_old_name_of_mixed_is_accepted(tmp_path: Path) -> None:
    file = tmp_path / "old.yaml"
    file.write_text("model: {name: m}\ndata: {train: d}\nprivacy: {strategy: keep_small}\noutput: o\n")
    with pytest.warns(DeprecationWarning, match="privacy.strategy=keep_small is now called .*=mixed"):
        config = Config.from_dict(load_yaml(file))
    assert config == Config.from_dict(with_(privacy={"strategy": "mixed"}))
    with pytest.warns(DeprecationWarning, match="mixed"):
        assert Config.from_dict(overridden(LEAST, settings=["privacy.strategy=keep_small"])) == config
    with pytest.raises(ConfigError, match="expected one of bookkeeping, mixed, auto, two_pass, per_layer"):
        Config.from_dict(with_(privacy={"strategy": "smallest"}))


def test_every_key_is_explained() -> None:
    for section in SECTIONS.values():
        for name, item in fields_of(section).items():
            assert len(help_of(item)) > 10, name
    text = template()
    assert all(f"  {item.name}:" in text for item in dataclasses.fields(DataConfig))
    assert set(yaml.safe_load(text)) == {*SECTIONS, "output"}


@pytest.mark.parametrize(
    ("values", "key", "hint"),
    [
        (with_(modl={}), "modl", "did you mean model?"),
        (with_(train={"learning_rat": 1}), "train.learning_rat", "did you mean train.learning_rate?"),
        (with_(train={"zzzz": 1}), "train.zzzz", "known: batch_size"),
        ({"model": {}, **{k: LEAST[k] for k in ("data", "output")}}, "model.name is missing", "set it"),
        ({"model": {"name": "m"}, "data": {"train": "d"}}, "output is missing", "--output"),
        (with_(train=[1]), "train: expected a section", "indented keys"),
        (with_(method={"kind": "lorra"}), "method.kind='lorra'", "did you mean lora?"),
        (with_(privacy={"delta": 1.5}), "privacy.delta=1.5", "below 0.5"),
        (with_(privacy={"delta": 0.5}), "privacy.delta=0.5", "below 0.5"),
        (with_(privacy={"epsilon": 0}), "privacy.epsilon=0", "above 0"),
        (with_(privacy={"epsilon": float("nan")}), "privacy.epsilon=nan", "a number"),
        (with_(train={"batch_size": 2.5}), "train.batch_size=2.5", "a whole number"),
        (with_(train={"steps": True}), "train.steps=True", "a whole number"),
        (with_(privacy={"enabled": "yes"}), "privacy.enabled='yes'", "true or false"),
        (with_(data={"train": "d", "speakers": "anna"}), "data.speakers='anna'", "a list"),
        (with_(data={"train": "d", "min_seconds": 5, "max_seconds": 2}), "data.min_seconds=5", "lower it"),
        (with_(output=3), "output", "a folder"),
        (with_(evaluate={"restrict_to": []}), "evaluate.restrict_to=[]", "null for free decoding"),
    ],
)
def test_errors_name_key_value_and_mend(values: dict[str, Any], key: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_dict(values)
    assert key in str(caught.value)
    assert hint in str(caught.value)


def test_sections_check_themselves_when_built_directly() -> None:
    with pytest.raises(ConfigError, match=r"train\.batch_size=0"):
        TrainConfig(batch_size=0)
    assert MethodConfig(alpha=3).alpha == 3.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig("m").name = "n"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("privacy", "message"),
    [
        ({"epsilon": 8}, r"privacy\.delta is missing"),
        ({"delta": 1e-6}, "both missing"),
        ({"epsilon": 8, "delta": 1e-6, "noise_multiplier": 0}, r"noise_multiplier=0 with .*epsilon=8"),
        ({"epsilon": 8, "delta": 1e-6, "unit": "speaker"}, r"needs privacy\.max_examples_per_speaker"),
        ({"epsilon": 8, "delta": 1e-6, "max_examples_per_speaker": 2}, r"needs privacy\.unit=speaker"),
        (
            {"epsilon": 8, "delta": 1e-6, "clipping": "automatic", "strategy": "per_layer"},
            "automatic clipping scales by the norm of the whole gradient",
        ),
    ],
)
def test_what_says_too_little_of_privacy_is_refused(privacy: dict[str, Any], message: str) -> None:
    section = PrivacyConfig(**privacy)
    with pytest.raises(ConfigError, match=message):
        section.check()
    with pytest.raises(ConfigError, match=message):
        Config.from_dict(with_(privacy=privacy)).check_trainable()
    dataclasses.replace(section, enabled=False).check()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"privacy": {"epsilon": 8, "delta": 1e-6, "max_batch_size": 100}}, r"below train\.batch_size=256"),
        ({"privacy": {"enabled": False}, "train": {"eval_every": 5}}, r"needs data\.valid"),
        ({"privacy": {"enabled": False}, "train": {"steps": 5, "warmup_steps": 5}}, r"below train\.steps=5"),
    ],
)
def test_what_does_not_fit_together_is_refused(sections: dict[str, Any], message: str) -> None:
    config = Config.from_dict(with_(**sections))
    with pytest.raises(ConfigError, match=message):
        config.check_trainable()


def test_a_private_run_with_epsilon_and_delta_is_trainable() -> None:
    Config.from_dict(with_(privacy={"epsilon": 8, "delta": 1e-6})).check_trainable()


def test_overrides(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: {name: m}\ndata: {train: d}\ntrain: {steps: 5}\noutput: o\n")
    config = Config.from_dict(
        overridden(
            load_yaml(path),
            {"train.steps": 7, "privacy.epsilon": None},
            ["train.steps=9", "data.speakers=[1, b]", "output=p"],
        )
    )
    assert (config.train.steps, config.data.speakers, config.output) == (9, ["1", "b"], "p")
    assert config.privacy.epsilon is None
    with pytest.raises(ConfigError, match=r"did you mean train\.steps\?"):
        overridden({}, {}, ["train.stps=1"])
    with pytest.raises(ConfigError, match="did you mean train"):
        overridden({}, {}, ["trian.steps=1"])


@pytest.mark.parametrize(
    ("flags", "settings", "epsilon", "noise"),
    [
        ({"privacy.epsilon": 3.0}, [], 3, None),
        ({"privacy.epsilon": None}, ["privacy.epsilon=3"], 3, None),
        ({"privacy.epsilon": 3.0, "privacy.noise_multiplier": 4.0}, [], 3, 4),
        ({"privacy.epsilon": 3.0}, ["privacy.noise_multiplier=4"], 3, 4),
        ({"privacy.noise_multiplier": 4.0}, [], 8, 4),
        ({}, ["privacy.epsilon=null"], None, 9),
        ({"train.steps": 7}, [], 8, 9),
    ],
)
def test_a_target_that_is_typed_chooses_the_noise(
    flags: dict[str, Any], settings: list[str], epsilon: float | None, noise: float | None
) -> None:
    """Over a file with a noise multiplier, unless one is typed too."""
    file = with_(privacy={"epsilon": 8, "delta": 1e-6, "noise_multiplier": 9})
    privacy = Config.from_dict(overridden(file, flags, settings)).privacy
    assert (privacy.epsilon, privacy.noise_multiplier) == (epsilon, noise)


def test_settings_are_read_as_yaml() -> None:
    assert parse_setting("data.test=null") == ("data.test", None)
    assert parse_setting("data.target_prefix= ") == ("data.target_prefix", " ")
    assert parse_setting("evaluate.restrict_to=[one, two]")[1] == ["one", "two"]
    with pytest.raises(ConfigError, match=r"expected section\.key=value"):
        parse_setting("train.steps")
    with pytest.raises(ConfigError, match="not YAML"):
        parse_setting("data.speakers=[a")


def test_files_that_are_not_configurations(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--print-config"):
        load_yaml(tmp_path / "none.yaml")
    path = tmp_path / "bad.yaml"
    path.write_text("model: [")
    with pytest.raises(ConfigError, match="not YAML"):
        load_yaml(path)
    path.write_text("just text")
    with pytest.raises(ConfigError, match="expected sections"):
        load_yaml(path)


def test_a_file_stands_on_a_base(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "least.yaml").write_text(
        "model: {name: m, dtype: bfloat16}\ndata: {train: d}\noutput: o\n"
    )
    (tmp_path / "base" / "middle.yaml").write_text(
        "base: least.yaml\ntrain: {steps: 5, batch_size: 7}\ndata:\n"
    )
    path = tmp_path / "run.yaml"
    path.write_text("base: base/middle.yaml\ntrain: {steps: 9}\nmodel: {name: n}\noutput: p\n")
    config = Config.from_dict(load_yaml(path))
    assert (config.model.name, config.model.dtype, config.data.train, config.output) == (
        "n",
        "bfloat16",
        "d",
        "p",
    )
    assert (config.train.steps, config.train.batch_size) == (9, 7)
    path.write_text("base: parakeet_lora\noutput: q\n")  # a recipe's name
    assert Config.from_dict(load_yaml(path)).method.kind == "lora"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: run.yaml", "leads back to itself"),
        ("base: [a, b]", "another configuration's path or name"),
        ("base: none.yaml", "none.yaml: no such file"),
        ("base: parakeet_lora\ntrain: [1]", "train: expected a section"),
        ("base: parakeet_lora\ntrian: {steps: 1}", "did you mean train"),
    ],
)
def test_wrong_bases_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises((ConfigError, FileNotFoundError), match=message):
        Config.from_dict(load_yaml(path))


def test_recipes_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find("parakeet_lora") == find("parakeet_lora.yaml") == CONFIGS / "parakeet_lora.yaml"
    (tmp_path / "parakeet_lora").write_text("a user's own file comes first")
    assert find("parakeet_lora") == Path("parakeet_lora")
    with pytest.raises(FileNotFoundError, match=r"did you mean wav2vec2_bert_full\?"):
        find("wav2vec2_bert_ful")
    with pytest.raises(FileNotFoundError, match="no such file"):
        find("elsewhere/parakeet_lora")


def test_changed_keys_are_dotted() -> None:
    old = Config.from_dict(LEAST).to_dict()
    new = Config.from_dict(with_(train={"steps": 7}, output="p")).to_dict()
    assert changed_keys(old, new) == {"train.steps": (100, 7), "output": ("o", "p")}
    assert changed_keys(old, old) == {}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_are_valid(path: Path) -> None:
    if "demo" not in path.stem:
        Config.from_dict(load_yaml(path)).check_trainable()


def test_a_placeholder_that_was_left_in_is_named() -> None:
    printed = yaml.safe_load(template({"privacy": {"epsilon": 8, "delta": 1e-6}}))
    named = (
        r"placeholder '\.\.\.' of --print-config.*: model\.name \(folder or hub id.*; data\.train \(private"
    )
    with pytest.raises(ConfigError, match=named):
        Config.from_dict(printed).check_trainable()
    printed["model"]["name"] = "m"
    with pytest.raises(ConfigError, match=r"a value of yours: data\.train \(private[^;]*$"):
        Config.from_dict(printed).check_trainable()
    printed["data"]["train"] = "d"
    Config.from_dict(printed).check_trainable()


def test_the_template_takes_what_is_given() -> None:
    config = Config.from_dict(yaml.safe_load(template({"privacy": {"epsilon": 8}, "train": {"steps": 7}})))
    assert (config.privacy.epsilon, config.train.steps) == (8.0, 7)
    assert (config.model.name, config.output) == ("...", "runs/first")
    for wrong in ({"privacy": {"epsilon": -1}}, {"privcy": {}}, {"train": [1]}):
        with pytest.raises(ConfigError):
            template(wrong)
