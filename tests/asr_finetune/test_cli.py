from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from asr_finetune import cli, console
from asr_finetune.config.schema import Config, ConfigError
from asr_finetune.config.yaml_io import recipes
from tests.asr_finetune import tones


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with tones.one_thread():
        yield


def invoke(*arguments: object) -> Any:
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(
        cli.app, [str(item) for item in arguments]
    )


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of the entry point itself."""
    monkeypatch.setattr(sys, "argv", ["asr-finetune", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


COMMANDS = [
    "plan",
    "train",
    "evaluate",
    "report",
    "recipes",
    "transcribe",
    "export",
    "merge",
    "audit",
    "verify",
    "synthesise",
    "demo",
]


@pytest.mark.thinned(5)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert f"asr-finetune {command}" in result.output
    assert "Example" in result.output


def test_help_lists_the_commands() -> None:
    listed = re.findall(r"^\W*(\w+)  +\w", invoke("--help").output.partition("Commands")[2], re.MULTILINE)
    assert listed == COMMANDS


def test_recipes_are_listed_with_a_line_each() -> None:
    lines = dict(line.split(None, 1) for line in invoke("recipes").output.splitlines())
    assert list(lines) == recipes()
    assert "whisper-tiny.en" in lines["librispeech_whisper_tiny"]
    assert all(len(title) > 30 for title in lines.values())


def test_the_help_loads_nothing_that_is_slow() -> None:
    slow = ["torch", "numpy", "transformers", "peft", "matplotlib", "dp_accounting", "huggingface_hub"]
    code = f"import sys, asr_finetune.cli; print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_lora_is_the_default_method() -> None:
    assert yaml.safe_load(invoke("train", "--print-config").output)["method"]["kind"] == "lora"


def test_print_config_is_a_configuration() -> None:
    values = yaml.safe_load(invoke("train", "--print-config").output)
    assert Config.from_dict(values).train.batch_size == 256
    given = invoke(
        "train",
        "--model",
        "m",
        "--train",
        "d",
        "-o",
        "runs/x",
        "--epsilon",
        "3",
        "--not-private",
        "--print-config",
    )
    config = Config.from_dict(yaml.safe_load(given.output))
    assert (config.privacy.epsilon, config.privacy.enabled, config.output) == (3.0, False, "runs/x")
    partly = invoke("train", "--print-config", "--epsilon", 8)
    assert Config.from_dict(yaml.safe_load(partly.output)).privacy.epsilon == 8.0


SIZE = ("--examples", "500", "--batch-size", "50", "--steps", "10", "--delta", "1e-3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--epsilon", "3"], "output is missing"),
        (["train", "--config", "none.yaml"], "--config none.yaml: no such file"),
        (["train", "--set", "trian.steps=3"], "did you mean train?"),
        (["train", "--model", "m", "--train", "d", "-o", "o", "--epsilon", "3"], "privacy.delta is missing"),
        (["plan", "--epsilon", "3", "--delta", "1e-5"], "--examples, --batch-size, --steps missing"),
        (["plan", "--gpu-memory", "80"], "--gpu-memory needs a model to plan for"),
        (["evaluate", "--data", "d"], "give --model, --adapter, or both"),
        (["plan", "--epsilon", "3", "--noise-multiplier", "1"], "--epsilon and --noise-multiplier: give one"),
        (["plan", "--epsilon", "3", "--set", "privacy.noise_multiplier=1"], "--noise-multiplier: give one"),
        (["plan", "--epsilon", "3", "--set", "privacy.enabled=false"], "privacy.enabled is false"),
        (["plan", *SIZE, "--epsilon", "3", "--set", "privacy.unit=speaker"], "max_examples_per_speaker"),
        (["plan", *SIZE, "--epsilon", "3", "--delta", "0.5"], "privacy.delta=0.5: must be below 0.5"),
        (
            ["train", "--model", "m", "--train", "d", "-o", "o", "--delta", "0.5"],
            "privacy.delta=0.5: must be below 0.5",
        ),
        (["plan", *SIZE], "privacy.epsilon and privacy.noise_multiplier are both missing"),
    ],
)
def test_expected_errors_are_messages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run_main(monkeypatch, *arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err


def test_a_delta_that_needs_no_noise_is_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, "plan", *SIZE[:5], 1, "--delta", 0.2, "--epsilon", 3) == 2
    assert "error: target_delta=0.2 must be below 0.1" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "plan"])
def test_a_printed_configuration_says_what_is_to_be_filled_in(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str
) -> None:
    printed = tmp_path / "run.yaml"
    printed.write_text(invoke("train", "--print-config", "--epsilon", 8, "--delta", 1e-6).output)
    assert run_main(monkeypatch, command, "--config", printed, "--model", "m") == 2
    assert "error: still the placeholder '...' of --print-config" in (said := capsys.readouterr().err)
    assert "data.train" in said
    assert "model.name" not in said


def test_unexpected_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a ValueError, where a library raised it: json here."""
    monkeypatch.setattr(sys, "argv", ["asr-finetune", "train"])
    monkeypatch.setattr(cli, "app", lambda: json.loads("{"))
    with pytest.raises(json.JSONDecodeError):
        cli.main()
    monkeypatch.setattr(cli, "app", lambda: {}["missing"])
    with pytest.raises(KeyError):
        cli.main()


def test_interruption_has_its_own_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from asr_finetune.training.loop import Interrupted

    def stop() -> None:
        raise Interrupted("the same command continues from here")

    monkeypatch.setattr(cli, "app", stop)
    assert run_main(monkeypatch, "train") == 130
    assert "continues from here" in capsys.readouterr().err


def test_plan() -> None:
    size = ("--examples", 500, "--batch-size", 50, "--steps", 10)
    result = invoke("plan", "--epsilon", 0.5, "--delta", "1e-3", *size)
    assert result.exit_code == 0, result.output
    for text in ("noise multiplier σ (PLD)", "by RDP it would be", "0.10000", "ε after step 5"):
        assert text in result.output
    assert not result.stderr
    with pytest.warns(UserWarning, match=r"delta=0\.01 >= 1/N"):
        invoke("plan", "--delta", "0.01", "--noise-multiplier", 4, *size)


def test_a_plan_says_its_noise_before_it_loads_a_model(tmp_path: Path) -> None:
    size = ("--examples", 500, "--batch-size", 50, "--set", "train.steps=10", "--delta", "1e-3")
    result = invoke("plan", *size, "--noise-multiplier", 4, "--model", tmp_path)
    assert "0.10000" in result.output
    assert isinstance(result.exception, ConfigError)
    assert "no usable checkpoint" in str(result.exception)


def test_a_printed_configuration_can_be_planned_before_there_is_data(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(invoke("train", "--print-config").stdout)
    sizes = (
        "--examples",
        500,
        "--batch-size",
        50,
        "--set",
        "train.steps=10",
        "--delta",
        "1e-3",
        "--epsilon",
        0.5,
    )
    result = invoke("plan", "--config", config, "--model", tmp_path, *sizes, "--gpu-memory", 80)
    assert "0.10000" in result.output
    assert "no usable checkpoint" in str(result.exception)  # the model is asked for, the data is not


def test_a_plan_of_so_many_examples_reads_no_data(tmp_path: Path) -> None:
    """The sizes and the method are the file's; the data is not there yet."""
    (tmp_path / "model").mkdir()
    by_hand = {"privacy__noise_multiplier": 4.0, "privacy__epsilon": None, "privacy__accountant": "rdp"}
    values = tones.settings(tmp_path, privacy__delta=1e-4, train__batch_size=50, **by_hand)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    result = invoke("plan", "--config", tmp_path / "run.yaml", "--examples", 500)
    assert "rate 0.10000" in result.output
    assert "ε after step 4" in result.output
    assert "no usable checkpoint" in str(result.exception)  # the model is asked for, the data is not


def test_train_evaluate_and_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tones.write_manifest(tmp_path, 12)
    tones.write_model(tmp_path / "model")
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tones.settings(tmp_path, method__kind="lora", method__rank=2)))
    common = ("--config", config, "--noise-multiplier", 3, "--set", "privacy.epsilon=null", "--batch-size", 4)
    result = invoke("train", *common, "--steps", 2)
    assert result.exit_code == 0, result.output
    assert "parameters are trained (lora)" in result.output
    assert "self-check passed" in result.output
    assert "[not private: loss" in result.output
    assert "epsilon " in result.output

    with pytest.raises(ConfigError, match=r"train\.steps: was 2, is 3"):
        cli.app(["train", *map(str, common), "--steps", "3"], standalone_mode=False)

    out = tmp_path / "evaluation.json"
    evaluated = invoke(
        "evaluate", "--model", tmp_path / "model", "--adapter", tmp_path / "run" / "adapter",
        "--data", tmp_path / "tones.jsonl", "--out", out, "--device", "cpu",
    )  # fmt: skip
    assert evaluated.exit_code == 0, evaluated.output
    assert len(json.loads(out.read_text())["hypotheses"]) == 12

    report = pytest.importorskip("asr_finetune.report.report")
    written: list[tuple[Path, Path]] = []
    monkeypatch.setattr(report, "write_report", lambda run, path: written.append((run, path)) or path)
    assert invoke("report", tmp_path / "run").exit_code == 0
    assert written == [(tmp_path / "run", tmp_path / "run" / "report.html")]


def test_version() -> None:
    result = invoke("--version")
    assert (result.exit_code, result.output.split()[0]) == (0, "asr-finetune")


@pytest.mark.slow
def test_a_warning_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tones.write_manifest(tmp_path, 12)
    tones.write_model(tmp_path / "model")
    by_hand = {
        "privacy__noise_multiplier": 4.0,
        "privacy__accountant": "rdp",
    }  # else half a minute at such a delta
    values = tones.settings(tmp_path, method__kind="head", train__steps=1, privacy__delta=0.2, **by_hand)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.setattr(console, "_shown_warnings", set())
    monkeypatch.setattr(sys, "argv", ["asr-finetune", "train", "-q", "--config", str(tmp_path / "run.yaml")])
    with warnings.catch_warnings(), contextlib.suppress(SystemExit):
        cli.main()
    assert capsys.readouterr().err.count("delta=0.2 >= 1/N") == 1


def test_an_old_name_warns_on_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = "--model m --train d --output o --set privacy.strategy=keep_small --print-config"
    monkeypatch.setattr(console, "_shown_warnings", set())
    monkeypatch.setattr(sys, "argv", ["asr-finetune", "train", *old.split()])
    with warnings.catch_warnings(), contextlib.suppress(SystemExit):
        warnings.simplefilter("ignore")
        cli.main()
    printed = capsys.readouterr()
    assert "strategy: mixed" in printed.out
    assert printed.err.count("privacy.strategy=keep_small is now called privacy.strategy=mixed") == 1


def test_a_missing_synthesiser_is_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from asr_finetune.demo.synth import SynthesisError

    def fail() -> None:
        raise SynthesisError("pip install it")

    monkeypatch.setattr(cli, "app", fail)
    assert run_main(monkeypatch, "demo") == 2
    assert "error: pip install it" in capsys.readouterr().err


@pytest.mark.slow
def test_a_new_target_has_its_noise_planned_and_trained_with(tmp_path: Path) -> None:
    """--epsilon goes over a noise multiplier of the file."""
    tones.write_manifest(tmp_path, 12)
    tones.write_model(tmp_path / "model")
    by_rdp = {"privacy__noise_multiplier": 9.0, "privacy__accountant": "rdp"}
    values = tones.settings(tmp_path, method__kind="head", **by_rdp)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    common = ("--config", tmp_path / "run.yaml", "--epsilon", 1)
    output = invoke("plan", *common).output
    assert re.search(r"target 1, spends (0\.99\d|1\.000) ", output)
    planned = re.search(r"noise multiplier σ \(RDP\)\W+([\d.]+)", output)
    started = re.search(r"σ = ([\d.]+): 4 steps", invoke("train", *common, "--dry-run", "--quiet").output)
    assert planned is not None
    assert started is not None
    assert planned[1] == f"{float(started[1]):.3f}"
    assert "9.000" in invoke("plan", "--config", tmp_path / "run.yaml").output
