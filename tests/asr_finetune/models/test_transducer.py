"""Transducers: transformers' own loss, greedy decoding, methods, private sums, and padding that changes nothing."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.loss.loss_tdt import tdt_loss

from asr_finetune.config.schema import ConfigError, MethodConfig, ModelConfig
from asr_finetune.models.loading import load_with_adapter
from asr_finetune.models.methods import apply_method
from asr_finetune.models.transducer import (
    DECODER_PARTS,
    TransducerRecognizer,
    alignable,
    output_layer,
)
from dpkernels import ops
from dpkernels.privacy.step.clipping import total_norm_sq
from experiments.full_size.run import one_by_one, private
from tests.asr_finetune import small_models

FAMILIES = ("parakeet_tdt", "parakeet_rnnt")
LORA = MethodConfig(kind="lora", rank=2)


def load(folder: Path, **options: Any) -> TransducerRecognizer:
    recognizer = small_models.load(folder, **options)
    assert isinstance(recognizer, TransducerRecognizer)
    return recognizer


def own_logits(recognizer: TransducerRecognizer, batch: dict[str, Any]) -> torch.Tensor:
    """transformers' logits of all cells."""
    inputs: dict[str, Any] = {key: batch[key] for key in ("input_features", "attention_mask")}
    labels = recognizer._before(batch["labels"])
    logits: torch.Tensor = recognizer.base(**inputs, decoder_input_ids=labels).logits
    return logits[:, :, None] if logits.dim() == 3 else logits  # it drops U + 1 = 1


def test_an_utterance_has_transformers_own_tdt_loss(folders: dict[str, Path]) -> None:
    recognizer = load(folders["parakeet_tdt"])
    for item in small_models.items(recognizer):
        batch = recognizer.collate([item])
        logits, frames = own_logits(recognizer, batch), recognizer.frames(batch["attention_mask"].sum(1))
        labels, classes = batch["labels"], recognizer.classes
        lengths = torch.tensor([labels.shape[1]])
        own = tdt_loss(
            logits[..., :classes],
            logits[..., classes:],
            labels,
            frames,
            lengths,
            recognizer.blank,
            list(recognizer.durations),
            reduction="none",
        )
        (loss,) = recognizer.loss_per_example(recognizer.model, batch)
        assert loss.item() == pytest.approx(own.item(), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_the_rest_of_the_batch_change_nothing(folders: dict[str, Path], family: str) -> None:
    recognizer = load(folders[family])
    assert recognizer.equal_lengths_only == ""
    batch, singles = small_models.batch_and_singles(recognizer)
    alone = [recognizer.loss_per_example(recognizer.model, single) for single in singles]
    together = recognizer.loss_per_example(recognizer.model, batch)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    assert recognizer.transcribe(batch) == [text for one in singles for text in recognizer.transcribe(one)]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_emitted_is_the_likeliest_of_each_cell(folders: dict[str, Path], family: str) -> None:
    """Greedy decoding by hand, one cell after another, over transformers' logits."""
    recognizer = load(folders[family])
    for item in small_models.items(recognizer):
        batch = recognizer.collate([item])
        frames = int(recognizer.frames(batch["attention_mask"].sum(1)))
        t, here, labels, expected = 0, 0, [], []
        while t < frames:
            given = {**batch, "labels": torch.tensor([labels], dtype=torch.int64)}
            cell = own_logits(recognizer, given)[0, t, -1]
            label = int(cell[: recognizer.classes].argmax())
            if label != recognizer.blank:
                labels.append(label)
                expected.append((t, label))
            if recognizer.durations:
                ahead = recognizer.durations[int(cell[recognizer.classes :].argmax())]
                t += max(ahead, 1) if label == recognizer.blank else ahead
            else:
                here = 0 if label == recognizer.blank else here + 1
                forced = here == recognizer.base.max_symbols_per_step
                t, here = t + int(label == recognizer.blank or forced), 0 if forced else here
            if len(expected) > recognizer.base.max_symbols_per_step * frames:
                break
        (found,) = recognizer.emitted(batch)
        assert found == expected[: len(found)]
        assert len(found) == len(expected) or len(expected) > recognizer.base.max_symbols_per_step * frames


@pytest.mark.parametrize("family", FAMILIES)
def test_an_impossible_label_adds_nothing_and_moves_no_other_utterance(
    folders: dict[str, Path], family: str
) -> None:
    recognizer = load(folders[family])
    items = small_models.items(recognizer)
    parameters = list(recognizer.model.parameters())

    def found(labels: torch.Tensor) -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
        given = [items[0], {**items[1], "labels": labels}, items[2]]
        losses = recognizer.loss_per_example(recognizer.model, recognizer.collate(given))
        grads = [
            torch.autograd.grad(
                loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for loss in losses
        ]
        return losses.detach(), [list(row) for row in grads]

    usual, gradients = found(items[1]["labels"])
    for label in (recognizer.classes, 2**40, -1, recognizer.blank):
        labels = items[1]["labels"].clone()
        labels[0] = label
        losses, moved = found(labels)
        assert losses[1] == torch.inf
        assert not any(part.any() for part in moved[1])
        for row in (0, 2):
            assert losses[row] == usual[row]
            assert all(torch.equal(*pair) for pair in zip(moved[row], gradients[row], strict=True))


METHODS = {
    "full": MethodConfig(kind="full"),
    "lora": LORA,
    "lora and the output layer": MethodConfig(kind="lora", rank=2, train_head=True),
    "bitfit": MethodConfig(kind="bitfit"),
    "head": MethodConfig(kind="head"),
    "decoder": MethodConfig(kind="full", layers="decoder"),
}


@pytest.mark.parametrize(
    ("family", "method"),
    [*product(FAMILIES[:1], METHODS), ("parakeet_rnnt", "full"), ("parakeet_rnnt", "lora")],
)
def test_clipped_sums_are_those_of_one_utterance_after_another(
    folders: dict[str, Path], family: str, method: str
) -> None:
    recognizer = load(folders[family])
    apply_method(recognizer, METHODS[method])
    check_sums(recognizer)


@pytest.mark.parametrize("vocabulary", ["own", "characters"])
def test_so_are_those_of_a_new_decoder(folders: dict[str, Path], vocabulary: str) -> None:
    recognizer = load(folders["parakeet_tdt"], new_head=True, vocabulary=vocabulary)
    apply_method(recognizer, LORA)
    names = [name for name, p in recognizer.model.named_parameters() if p.requires_grad]
    assert {"lora_A", "lora_B"} < {part for name in names for part in name.split(".")}
    for part in DECODER_PARTS:
        assert any(f"{part}.modules_to_save" in name for name in names)
    assert output_layer(recognizer.model).weight.requires_grad
    check_sums(recognizer)


def check_sums(recognizer: TransducerRecognizer) -> None:
    """Norms and clipped sums of a padded batch against torch's own gradients of each utterance alone, in float64."""
    model = recognizer.model.double().train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    items = small_models.items(recognizer)
    records = private(recognizer, recognizer.collate(items))  # type: ignore[arg-type]
    covered = {parameter for record in records for parameter in record.parameters}
    assert covered == {parameter for parameter in model.parameters() if parameter.requires_grad}
    with torch.no_grad():
        norm_sq = total_norm_sq(records, len(items), torch.device("cpu"))
        factors = ops.clip_factors(norm_sq, 0.9 * float(norm_sq.sqrt().median()))
    exact_sq = torch.zeros(len(items), dtype=torch.float64)
    expected, _ = one_by_one(recognizer, items, list(covered), factors.double(), exact_sq)  # type: ignore[arg-type]
    assert bool((norm_sq >= exact_sq).all())
    torch.testing.assert_close(norm_sq, exact_sq, rtol=1e-3, atol=0.0)
    scale = float(exact_sq.sum().sqrt())
    for record in records:
        sums = {p: torch.zeros(p.shape, dtype=torch.float64) for p in record.parameters}
        record.add_weighted_sum(factors, sums)
        for parameter, total in sums.items():
            error = float((total - expected[parameter]).norm())
            assert error <= 1e-6 * float(expected[parameter].norm()) + 1e-9 * scale, record.layer


def test_bitfit_trains_the_prediction_networks_biases_too(folders: dict[str, Path]) -> None:
    recognizer = load(folders["parakeet_tdt"])
    apply_method(recognizer, METHODS["bitfit"])
    names = {name for name, p in recognizer.model.named_parameters() if p.requires_grad}
    assert {"decoder.lstm.bias_ih_l0", "decoder.lstm.bias_hh_l0", "joint.head.bias"} < names
    assert not any(name.endswith("weight") for name in names)


@pytest.mark.parametrize(
    ("layers", "names"),
    [("encoder", {"encoder"}), ("decoder", {"decoder", "joint", "encoder_projector"})],
)
def test_layers_choose_a_part(folders: dict[str, Path], layers: Any, names: set[str]) -> None:
    recognizer = load(folders["parakeet_tdt"])
    apply_method(recognizer, MethodConfig(kind="full", layers=layers))
    trained = {name.partition(".")[0] for name, p in recognizer.model.named_parameters() if p.requires_grad}
    assert trained == names


def test_lora_on_the_output_layer_is_refused_with_the_reason(folders: dict[str, Path]) -> None:
    recognizer = load(folders["parakeet_tdt"])
    with pytest.raises(ConfigError, match=r"joint\.head is not called in the model's forward"):
        apply_method(recognizer, MethodConfig(kind="lora", targets=["q_proj", "joint.head"]))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_with_a_new_decoder_is_saved_and_loaded(
    folders: dict[str, Path], tmp_path: Path, family: str
) -> None:
    recognizer = load(folders[family], new_head=True, vocabulary="characters")
    apply_method(recognizer, LORA)
    torch.manual_seed(2)
    for parameter in recognizer.model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    recognizer.save(tmp_path)
    batch, _ = small_models.batch_and_singles(recognizer)
    again = load_with_adapter(ModelConfig(str(folders[family]), device="cpu"), tmp_path)
    for model in (again.model, recognizer.model):
        model.eval()
    torch.testing.assert_close(
        again.loss_per_example(again.model, batch), recognizer.loss_per_example(recognizer.model, batch)
    )
    assert again.transcribe(batch) == recognizer.transcribe(batch)


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_transformers_loads_what_was_trained(
    folders: dict[str, Path], tmp_path: Path, family: str
) -> None:
    recognizer = load(folders[family], new_head=True, vocabulary="characters")
    apply_method(recognizer, METHODS["full"])
    recognizer.save(tmp_path)
    auto = transformers.AutoModelForTDT if family.endswith("tdt") else transformers.AutoModelForRNNT
    plain = auto.from_pretrained(tmp_path).eval()
    assert type(plain) is type(recognizer.base)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    batch, _ = small_models.batch_and_singles(recognizer)
    inputs = {key: batch[key] for key in ("input_features", "attention_mask")}
    expected = recognizer.base.eval().get_audio_features(**inputs).pooler_output
    torch.testing.assert_close(plain.get_audio_features(**inputs).pooler_output, expected)
    assert processor.tokenizer("low")["input_ids"] == recognizer.encode_text("low").tolist()
    assert load(tmp_path).transcribe(batch) == recognizer.transcribe(batch)


def test_restricted_decoding_takes_the_likeliest_text(folders: dict[str, Path]) -> None:
    recognizer = load(folders["parakeet_tdt"])
    batch, singles = small_models.batch_and_singles(recognizer)
    texts = ["low", "high low", "wolf"]
    scores = recognizer._scores(batch, texts)
    for row, single in zip(scores, singles, strict=True):
        for score, text in zip(row, texts, strict=True):
            given = {**single, "labels": recognizer.encode_text(text)[None]}
            (loss,) = recognizer.loss_per_example(recognizer.model, given)
            assert -score.item() == pytest.approx(loss.item(), rel=1e-4)
    best = [texts[int(place)] for place in scores.argmax(1)]
    assert recognizer.transcribe(batch, restrict_to=texts) == best


@pytest.mark.parametrize("durations", [(), (0, 1), (1, 2), (2, 3), (0, 2), (4,)])
def test_alignable_says_whether_the_loss_is_finite(durations: tuple[int, ...]) -> None:
    for frames, labels in product(range(7), range(4)):
        scores = torch.zeros(1, max(frames, 1), labels + 1, 2 + len(durations))
        (loss,), _ = ops.transducer_lattice(
            scores, torch.tensor([frames]), torch.tensor([labels]), durations=durations
        )
        assert alignable(frames, labels, durations) == bool(loss.isfinite()), (frames, labels)


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "whisper's window": ({"window_seconds": 1.0}, "model.window_seconds"),
    "a language": ({"language": "de"}, "model.language"),
    "an adapter of a language": ({"target_lang": "deu"}, "model.target_lang"),
    "weights in parts": ({"shard": True}, "model.shard"),
    "a new decoder without a vocabulary": ({"new_head": True}, "a new decoder needs a vocabulary"),
    "words": ({"vocabulary": "words"}, "a new decoder needs a vocabulary"),
    "an alphabet of the old decoder": ({"alphabet": "german"}, "model.alphabet"),
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_options_that_do_not_fit_are_refused(folders: dict[str, Path], kind: str) -> None:
    options, message = OPTIONS[kind]
    with pytest.raises(ConfigError, match=message):
        load(folders["parakeet_tdt"], **options)


def test_problems_of_transcripts(folders: dict[str, Path]) -> None:
    recognizer = load(folders["parakeet_tdt"])
    assert recognizer.text_problem(small_models.recording(6400, "low")) is None
    assert (
        recognizer.text_problem(small_models.recording(6400, "")) == "no transcript left after tokenisation"
    )
    assert "not in the vocabulary" in str(recognizer.text_problem(small_models.recording(6400, "lxw")))
    recognizer.durations = (2,)
    frames = recognizer.length(small_models.recording(6400))
    text = "l" * frames
    assert "no alignment" in str(recognizer.text_problem(small_models.recording(6400, text)))
    assert recognizer.label_problem(torch.tensor([recognizer.blank])) is not None
