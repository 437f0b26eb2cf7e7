"""The model card, README.md beside the weights: what the record of the run says, for those who get the model.

Like the report, the card is made from the record alone, which holds nothing that ε does not cover but N.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from asr_finetune.files import write_text
from asr_finetune.training.record import unit_name
from asr_finetune.training.run_folder import by_test_set
from dpkernels.rounding import shown_epsilon, shown_sigma

CARD = "README.md"
_OPEN, _CLOSE = "<!-- load -->", "<!-- /load -->"
_WHEN = {"before": "before", "after": "after", "non_private": "the same without privacy"}
_CLASSES = {"ctc": "AutoModelForCTC", "seq2seq": "AutoModelForSpeechSeq2Seq"}


def write_card(folder: Path, record: Mapping[str, Any], name: str) -> Path:
    """Write the card of a run's adapter or model.

    Args:
        folder: of the adapter or the model, which was saved there.
        record: the values of run.json.
        name: of the run.
    """
    privacy, model, data = record["privacy"], record["model"], record["data"]
    adapter = (folder / "adapter_config.json").is_file()
    named = model["name"]
    if adapter:  # which may have been trained on from another adapter
        saved = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        named = saved["base_model_name_or_path"] or named
    base = Path(named).name if Path(named).is_dir() else named
    card = ModelCardData(
        base_model=None if Path(named).is_dir() else named,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="automatic-speech-recognition",
        language=model.get("language") or model.get("target_lang"),
        tags=["differential-privacy"] if privacy["epsilon"] is not None else ["not-private"],
        model_name=name,
        eval_results=_results(record),
    )
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"epsilon": shown_epsilon, "sigma": shown_sigma, "percent": _percent}
    text = environment.from_string(Path(__file__).with_name("card.md").read_text(encoding="utf-8")).render(
        card_data=card.to_yaml(),
        name=name,
        base=base,
        noun="adapter" if adapter else "model",
        private=privacy["epsilon"] is not None,
        privacy=privacy,
        unit=unit_name(record),
        units=data["units"],
        model=model,
        method=record["method"],
        steps=record["steps"],
        planned_steps=record["training"]["steps"],
        stopped=record.get("stopped", False),
        audited=record.get("audited", False),
        rates=_rates(record),
        scoring=record["scoring"],
        versions=record["versions"],
        load=_adapter_code(base, model) if adapter else _model_code(_class_of(model)),
    )
    write_text(folder / CARD, str(ModelCard(text)))
    return folder / CARD


def write_merged_card(folder: Path, adapter: Path, model: Mapping[str, Any]) -> None:
    """Write the card of an adapter's merged model: the adapter's, with other words on how to load it.

    model: `Recognizer.describe` of the merged model.
    """
    text = (adapter / CARD).read_text(encoding="utf-8") if (adapter / CARD).is_file() else ""
    if _OPEN not in text:  # not a card of ours
        return
    head, _, rest = text.partition(_OPEN)
    card = ModelCard(f"{head}{_OPEN}\n{_model_code(_class_of(model))}\n{_CLOSE}{rest.partition(_CLOSE)[2]}")
    vars(card.data)["library_name"] = "transformers"
    write_text(folder / CARD, str(card))


def _results(record: Mapping[str, Any]) -> list[EvalResult]:
    """The error rates after training in the form that the hub shows."""
    return [
        EvalResult(
            task_type="automatic-speech-recognition",
            dataset_type="private",
            dataset_name=name,
            dataset_config=name,  # the hub merges results of one type and configuration
            metric_type="wer",
            metric_value=round(100 * result["wer"], 2),
        )
        for name, result in by_test_set(record["evaluation"].get("after")).items()
    ]


def _rates(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for when, label in _WHEN.items():
        for name, result in by_test_set(record["evaluation"].get(when)).items():
            interval = result["wer_ci"]
            left_out = sum((result.get("left_out") or {}).values())
            rows.append(
                {
                    "set": name,
                    "when": label,
                    "wer": result["wer"],
                    "interval": " to ".join(map(_percent, interval)) if interval else "–",
                    "of": f"{result['utterances']:,}"
                    + (f" of {result['utterances'] + left_out:,}" if left_out else ""),
                }
            )
    return rows


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _adapter_code(base: str, model: Mapping[str, Any]) -> str:
    """Code that loads an adapter on its base model, or the reason why plain PEFT cannot."""
    ours = "`asr-finetune transcribe AUDIO --model THIS_FOLDER` loads the adapter with its base model."
    if model["kind"] == "seq2seq":
        options = ""
        more = (
            f" It was trained with a window of {model['window_seconds']:g} s of audio: with plain transformers, cut "
            "the base model's encoder to it."
            if model.get("window_seconds", 30) != 30
            else ""
        )
    else:
        more = ""
        special = (
            f"blank_token_id={model['blank']}"
            if model["kind"] == "transducer"
            else "pad_token_id=processor.tokenizer.pad_token_id"
        )
        options = (
            f", vocab_size={model['vocabulary']}, {special}, ignore_mismatched_sizes=True"
            if model["new_head"]
            else ""
        )
        if model.get("target_lang"):
            options = f', target_lang="{model["target_lang"]}", ignore_mismatched_sizes=True'
    return (
        f"{ours}{more}\n\n```python\nimport peft, transformers\n\n"
        'processor = transformers.AutoProcessor.from_pretrained("THIS_FOLDER")\n'
        f'base = transformers.{_class_of(model)}.from_pretrained("{base}"{options})\n'
        'model = peft.PeftModel.from_pretrained(base, "THIS_FOLDER")\n```\n\n'
        "`asr-finetune merge THIS_FOLDER --output MODEL` writes a model that needs no PEFT."
    )


def _class_of(model: Mapping[str, Any]) -> str:
    """transformers' class that loads the model; RNN-T and TDT have one each."""
    return _CLASSES.get(model["kind"], model["class"])


def _model_code(model_class: str) -> str:
    return (
        "`asr-finetune transcribe AUDIO --model THIS_FOLDER` loads the model.\n\n```python\nimport transformers\n\n"
        'processor = transformers.AutoProcessor.from_pretrained("THIS_FOLDER")\n'
        f'model = transformers.{model_class}.from_pretrained("THIS_FOLDER")\n```'
    )
