"""Models of images and texts of transformers."""

from __future__ import annotations

from functools import partial
from typing import Any

from bench.models.entry import of_transformers
from bench.models.kinds import CAPTIONS, IMAGE, IMAGE_TEXTS, IMAGE_TOKEN, PAIRS
from bench.models.zoo_text import TINY as TEXT

TINY: dict[str, Any] = {**TEXT, "image_size": IMAGE, "patch_size": 16, "projection_dim": 8}

pairs, inside, caption = (partial(of_transformers, TINY, kind) for kind in (PAIRS, IMAGE_TEXTS, CAPTIONS))

ENTRIES = [
    pairs("CLIP", "CLIPModel"),
    pairs("SigLIP", "SiglipModel"),
    pairs("Chinese-CLIP", "ChineseCLIPModel"),
    pairs("AltCLIP", "AltCLIPModel"),
    caption("BLIP captions", "BlipForConditionalGeneration"),
    caption("GIT", "GitForCausalLM"),
    inside(
        "LLaVA",
        "LlavaForConditionalGeneration",
        image_token_index=IMAGE_TOKEN,
        vision_feature_select_strategy="default",
    ),
    inside(
        "InternVL",
        "InternVLForConditionalGeneration",
        image_token_id=IMAGE_TOKEN,
        vision_config={"image_size": [IMAGE, IMAGE], "patch_size": [8, 8]},
    ),
    inside("Gemma 3", "Gemma3ForConditionalGeneration", image_token_id=IMAGE_TOKEN, mm_tokens_per_image=4),
]
