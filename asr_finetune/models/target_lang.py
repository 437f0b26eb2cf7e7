"""Languages of a checkpoint with an adapter for each: the Wav2Vec2 models of MMS.

Such a checkpoint has one vocabulary for each language, and the adapter layers and output layer of each in a file of its
own, `adapter.nld.safetensors` for Dutch. Its weights hold one of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from asr_finetune.config.schema import ConfigError, ModelConfig
from asr_finetune.models.checkpoint import cached_hub_answers


def load_target_lang(config: ModelConfig, model: Any, tokenizer: Any) -> None:
    """Load the adapter, output layer and vocabulary of the language `config.target_lang`, in place.

    Raises:
        ConfigError: the model has no such languages, the vocabulary lacks this one, or it has no file with weights.
    """
    language = config.target_lang
    start = f"model.name={config.name!r}, model.target_lang={language!r}:"
    if getattr(model.config, "adapter_attn_dim", None) is None:
        raise ConfigError(
            f"{start} {type(model).__name__} has no adapter for each language (adapter_attn_dim in its config.json): "
            "leave it null"
        )
    held = tokenizer.target_lang
    try:
        tokenizer.set_target_lang(language)
        model.load_adapter(
            language,
            revision=config.revision,
            local_files_only=Path(config.name).is_dir()
            or not cached_hub_answers(config.name, config.revision),
        )
    except (OSError, ValueError) as error:
        if held == language and isinstance(error, OSError):
            return  # a model that was saved after training holds its language, and has no file for it
        raise ConfigError(
            f"{start} it cannot be loaded: give a language of the checkpoint that has a file "
            f"adapter.{language}.safetensors; transformers says: {str(error).strip().splitlines()[0]}"
        ) from error
