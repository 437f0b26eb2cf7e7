"""Vision: transformers, torchvision and timm."""

from __future__ import annotations

from functools import partial
from typing import Any

from bench.models.entry import CONVOLUTIONS, of_transformers
from bench.models.kinds import IMAGE, IMAGES

TINY: dict[str, Any] = {
    "image_size": IMAGE,
    "patch_size": 16,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "num_labels": 3,
    "embed_dim": 8,
    "window_size": 4,
}


image = partial(of_transformers, TINY, IMAGES)

STAGES: dict[str, Any] = {"hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1]}
HEADS: dict[str, Any] = {"num_attention_heads": [1, 2, 2, 2]}
HIERA: dict[str, Any] = {
    "embed_dim": 8,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 2, 2, 2],
    "image_size": [32, 32],
}
HIERA |= {"patch_size": [3, 3], "patch_stride": [2, 2], "patch_padding": [1, 1]}

ENTRIES = [
    image("ViT", "ViTForImageClassification"),
    image("DeiT", "DeiTForImageClassification"),
    image("BEiT", "BeitForImageClassification", use_relative_position_bias=True),
    image("data2vec vision", "Data2VecVisionForImageClassification", use_relative_position_bias=True),
    image("DINOv2", "Dinov2ForImageClassification", mlp_ratio=2),
    image("DINOv2 with registers", "Dinov2WithRegistersForImageClassification", mlp_ratio=2),
    image("DINOv3 ViT", "DINOv3ViTModel", pos_embed_rescale=None),
    image("DINOv3 ConvNeXt", "DINOv3ConvNextModel", CONVOLUTIONS, **STAGES),
    image("ViT-MSN", "ViTMSNForImageClassification"),
    image("I-JEPA", "IJepaForImageClassification"),
    image("ViTDet", "VitDetModel", pretrain_image_size=IMAGE),
    image("YOLOS", "YolosForObjectDetection", image_size=[IMAGE, IMAGE], num_detection_tokens=4),
    image("SigLIP vision", "SiglipVisionModel"),
    image("CLIP vision", "CLIPVisionModel"),
    image("Swin", "SwinForImageClassification", patch_size=4, depths=[2, 2], num_heads=[2, 4], mlp_ratio=2.0),
    image(
        "Swin v2",
        "Swinv2ForImageClassification",
        patch_size=4,
        depths=[2, 2],
        num_heads=[2, 4],
        mlp_ratio=2.0,
    ),
    image("Hiera", "HieraForImageClassification", **HIERA),
    image("SegFormer", "SegformerForSemanticSegmentation", **STAGES, **HEADS, decoder_hidden_size=8),
    image("PVT", "PvtForImageClassification", **STAGES, **HEADS, sequence_reduction_ratios=[2, 2, 1, 1]),
    image(
        "PVT v2", "PvtV2ForImageClassification", **STAGES, **HEADS, sr_ratios=[2, 2, 1, 1], mlp_ratios=[2] * 4
    ),
    image(
        "LeViT",
        "LevitForImageClassification",
        hidden_sizes=[8, 8, 16],
        num_attention_heads=[2, 2, 2],
        depths=[1, 1, 1],
        key_dim=[4, 4, 4],
    ),
    image(
        "FocalNet",
        "FocalNetForImageClassification",
        patch_size=4,
        depths=[1, 1],
        focal_levels=[1, 1],
        focal_windows=[3, 3],
        mlp_ratio=2.0,
    ),
    image(
        "MobileViT",
        "MobileViTForImageClassification",
        hidden_sizes=[16, 16, 16],
        neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 16],
        patch_size=2,
    ),
    image("PoolFormer", "PoolFormerForImageClassification", CONVOLUTIONS, **STAGES, patch_size=3),
    image("ConvNeXt", "ConvNextForImageClassification", CONVOLUTIONS, **STAGES, num_stages=4, patch_size=4),
    image(
        "ConvNeXt v2", "ConvNextV2ForImageClassification", CONVOLUTIONS, **STAGES, num_stages=4, patch_size=4
    ),
    image(
        "ResNet",
        "ResNetForImageClassification",
        CONVOLUTIONS,
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
    ),
    image(
        "BiT",
        "BitForImageClassification",
        CONVOLUTIONS,
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        num_groups=2,
    ),
    image("RegNet", "RegNetForImageClassification", CONVOLUTIONS, **STAGES, embedding_size=8, groups_width=4),
    image(
        "MobileNet v1",
        "MobileNetV1ForImageClassification",
        CONVOLUTIONS,
        depth_multiplier=0.25,
        min_depth=4,
        tf_padding=False,
    ),
    image(
        "MobileNet v2",
        "MobileNetV2ForImageClassification",
        CONVOLUTIONS,
        depth_multiplier=0.25,
        min_depth=4,
        tf_padding=False,
    ),
    image(
        "EfficientNet",
        "EfficientNetForImageClassification",
        CONVOLUTIONS,
        width_coefficient=0.1,
        depth_coefficient=0.3,
        hidden_dim=128,
        num_block_repeats=[1] * 7,
    ),
    image(
        "DPT depth",
        "DPTForDepthEstimation",
        num_hidden_layers=4,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[4, 4, 8, 8],
        fusion_hidden_size=8,
    ),
    image(
        "Swin2SR",
        "Swin2SRForImageSuperResolution",
        image_size=8,
        patch_size=1,
        depths=[1],
        num_heads=[2],
        embed_dim=8,
    ),
    image(
        "SwiftFormer",
        "SwiftFormerForImageClassification",
        CONVOLUTIONS,
        depths=[1, 1, 1, 1],
        embed_dims=[8, 8, 8, 16],
        mlp_ratio=2,
    ),
]
