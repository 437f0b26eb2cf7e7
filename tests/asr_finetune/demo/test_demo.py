"""The demo, end to end at a reduced size, once; and what its speech must be for its claims to hold."""

import importlib.util
import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from asr_finetune.config.schema import DataConfig
from asr_finetune.console import Reporter
from asr_finetune.data.sources import load_corpus
from asr_finetune.demo import demo
from asr_finetune.demo.demo import DIGITS, PRIVATE_VOICES, PUBLIC_VOICES, VALID_VOICES, DemoResult, Recipe
from asr_finetune.models.loading import tiny_parakeet
from asr_finetune.training.dataset import SpeechDataset
from dpkernels.privacy import read_ledger
from tests.asr_finetune import tones

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None,
    reason="espeakng-loader (the demo extra) is not installed",
)
# Too little to learn much: this is about the path, `make demo` about the result.
SMALL = Recipe(
    public=8, private=8, test=2, valid=2, public_epochs=1, batch_size=16, steps=3, epsilon=1.0, delta=1e-3
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DemoResult, str]:
    """(folder, result, what was printed)."""
    folder = tmp_path_factory.mktemp("demo")
    out = io.StringIO()
    with tones.one_thread():
        result = demo.run(folder, SMALL, console=Console(file=out, width=110))
    return folder, result, out.getvalue()


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's recordings alone."""
    return demo.make_speech(tmp_path_factory.mktemp("speech"), SMALL, Reporter(False)).parent


@pytest.mark.slow
def test_result_is_what_the_run_recorded(made: tuple[Path, DemoResult, str]) -> None:
    folder, result, printed = made
    run = json.loads((folder / "private" / "run.json").read_text())
    plain = json.loads((folder / "not_private" / "run.json").read_text())
    assert result.before == run["evaluation"]["before"]["wer"] == plain["evaluation"]["before"]["wer"]
    assert result.private == run["evaluation"]["after"]["wer"]
    assert result.non_private == plain["evaluation"]["after"]["wer"]
    assert result.epsilon == run["privacy"]["epsilon"] <= SMALL.epsilon
    assert result.delta == SMALL.delta < 1 / run["privacy"]["dataset_size"]
    assert run["privacy"]["dataset_size"] == SMALL.private * len(PRIVATE_VOICES)
    assert read_ledger(folder / "private" / "ledger.jsonl").steps == SMALL.steps
    assert not (folder / "not_private" / "ledger.jsonl").exists()
    for part in (
        f"{result.before:.1%}",
        f"{result.private:.1%}",
        f"{result.non_private:.1%}",
        f"ε = {result.epsilon:.2f}",
        "δ = 0.001",
        f"σ = {run['privacy']['noise_multiplier']:g}",
        "report.html",
    ):
        assert part in printed, part


@pytest.mark.slow
def test_report_is_of_the_private_run(made: tuple[Path, DemoResult, str]) -> None:
    folder, result, _ = made
    page = result.report.read_text()
    assert result.report == folder / "report.html"
    assert read_ledger(folder / "private" / "ledger.jsonl").last_hash in page
    assert "the same recipe without privacy" in page
    assert "public</em> validation data" in page


def test_nothing_is_held_out_in_name_only(speech: Path) -> None:
    """No test text is trained on, no private voice is public, every file is there and says what it says."""
    entries = [json.loads(line) for line in (speech / "manifest.jsonl").read_text().splitlines()]
    texts = {
        split: {entry["text"] for entry in entries if entry["split"] == split}
        for split in ("public", "valid", "train", "test")
    }
    assert not (texts["test"] | texts["valid"]) & (texts["train"] | texts["public"])
    assert not set(PRIVATE_VOICES) & (set(PUBLIC_VOICES) | set(VALID_VOICES))
    assert len({entry["audio"] for entry in entries}) == len(entries)
    for entry in entries:
        assert (speech / entry["audio"]).is_file()
        assert set(entry["text"].split()) <= set(DIGITS)
    counts = {split: sum(entry["split"] == split for entry in entries) for split in texts}
    assert counts == {"public": 80, "valid": 4, "train": 48, "test": 12}


@pytest.mark.slow
def test_called_again_it_keeps_what_is_there(made: tuple[Path, DemoResult, str]) -> None:
    folder, result, _ = made
    ledger = (folder / "private" / "ledger.jsonl").read_bytes()
    again = demo.run(folder, SMALL, console=Console(file=io.StringIO()))
    assert (again.private, again.epsilon) == (result.private, result.epsilon)
    assert (folder / "private" / "ledger.jsonl").read_bytes() == ledger


def test_private_and_plain_runs_differ_in_privacy_only(tmp_path: Path) -> None:
    private, plain = (
        demo.configuration(tmp_path, tmp_path, tmp_path, Recipe(), private=private).to_dict()
        for private in (True, False)
    )
    assert private["privacy"]["enabled"]
    assert private["privacy"]["epsilon"] <= 8
    assert not plain["privacy"]["enabled"]
    plain["privacy"] = private["privacy"]
    plain["train"]["eval_every"] = private["train"]["eval_every"]
    assert plain == private
    assert private["privacy"]["delta"] < 1 / (Recipe().private * len(PRIVATE_VOICES))


def first_and_last_loss(folder: Path) -> tuple[float, float]:
    """Mean loss of a fresh small model on sixteen recordings, before and after fitting them."""
    torch.manual_seed(0)
    recognizer = tiny_parakeet(list(tones.WORDS), hidden=48, layers=1, heads=2, channels=8, mels=40)
    corpus = load_corpus(str(tones.write_manifest(folder, 16)), data=DataConfig(train="-"))
    dataset = SpeechDataset(corpus, recognizer, cache=True)
    batch = recognizer.collate([dataset[index] for index in range(16)])

    def loss() -> float:
        with torch.no_grad():
            return float(recognizer.loss_per_example(recognizer.model, batch).mean())

    before = loss()
    with tones.one_thread():
        demo._fit(recognizer, dataset, 60, Reporter(enabled=False))
    return before, loss()


@pytest.mark.slow
def test_a_fresh_small_model_learns(tmp_path: Path) -> None:
    before, after = first_and_last_loss(tmp_path)
    assert after < 0.2 * before


def test_planted_start_of_the_convolutions_learns_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' own start, N(0, 0.02) in the convolutions."""
    for convolution in (nn.Conv1d, nn.Conv2d):
        monkeypatch.setattr(convolution, "reset_parameters", lambda self: None)
    before, after = first_and_last_loss(tmp_path)
    assert not after < 0.2 * before
