"""torchvision's and timm's models of images."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from bench.models.entry import CONVOLUTIONS, Entry
from bench.models.kinds import CLASSIFIER, IMAGE


@cache
def torchvision() -> Any:
    """torchvision, also where its package was built for another build of torch than this one.

    The package index has it for one build only. Beside another its library of operators is not loaded, and its import
    fails at the registration of two of them, which no model here uses: their schemas are then declared first.
    """
    try:
        import torchvision
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
        import torchvision
    return torchvision


def of_torchvision(name: str, model: str, targets: str = CONVOLUTIONS, **options: Any) -> Entry:
    """An entry of torchvision.models."""

    def build() -> nn.Module:
        return torchvision().models.get_model(model, num_classes=3, **options)

    return Entry(name, "torchvision", CLASSIFIER, build, targets)


def of_class(name: str, make: Callable[[Any], nn.Module], targets: str = CONVOLUTIONS) -> Entry:
    """An entry of torchvision's, built by its class: `make(torchvision.models)`."""
    return Entry(name, "torchvision", CLASSIFIER, lambda: make(torchvision().models), targets)


def of_timm(name: str, model: str, targets: str = CONVOLUTIONS, **options: Any) -> Entry:
    """An entry of timm."""

    def build() -> nn.Module:
        torchvision()
        import timm

        return timm.create_model(model, num_classes=3, **options)

    return Entry(name, "timm", CLASSIFIER, build, targets)


def of_timm_class(name: str, make: Callable[[Any], nn.Module], targets: str = CONVOLUTIONS) -> Entry:
    """An entry of timm's, built by its class: `make(timm)`."""

    def build() -> nn.Module:
        torchvision()
        import timm

        return make(timm)

    return Entry(name, "timm", CLASSIFIER, build, targets)


SMALL: dict[str, Any] = {"img_size": IMAGE, "patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 4}
LINEAR = "all-linear"

TORCHVISION = [
    of_class("ResNet", lambda m: m.ResNet(m.resnet.BasicBlock, [1, 1, 1, 1], num_classes=3)),
    of_class("DenseNet", lambda m: m.DenseNet(4, (2, 2), 8, num_classes=3)),
    of_torchvision("SqueezeNet", "squeezenet1_1"),
    of_torchvision("MobileNet v2", "mobilenet_v2", width_mult=0.1),
    of_torchvision("ShuffleNet v2", "shufflenet_v2_x0_5"),
    of_class("MNASNet", lambda m: m.MNASNet(0.1, num_classes=3)),
    of_class("ViT", lambda m: m.VisionTransformer(IMAGE, 16, 2, 4, 16, 24, num_classes=3), LINEAR),
    of_class("Swin", lambda m: m.SwinTransformer([4, 4], 8, [1, 1], [2, 2], [4, 4], num_classes=3), LINEAR),
    of_class("ConvNeXt", lambda m: m.ConvNeXt([m.convnext.CNBlockConfig(8, None, 2)], num_classes=3)),
]

TIMM = [
    of_timm("ViT", "vit_tiny_patch16_224", LINEAR, **SMALL),
    of_timm("ViT, relative positions", "vit_relpos_small_patch16_224", LINEAR, **SMALL),
    of_timm("DeiT, distilled", "deit_tiny_distilled_patch16_224", LINEAR, **SMALL),
    of_timm("CaiT", "cait_xxs24_224", LINEAR, **SMALL),
    of_timm("BEiT", "beit_base_patch16_224", LINEAR, **SMALL),
    of_timm("EVA-02", "eva02_tiny_patch14_224", LINEAR, **SMALL),
    of_timm_class(
        "MLP-Mixer",
        lambda t: t.models.MlpMixer(num_classes=3, img_size=IMAGE, patch_size=16, num_blocks=2, embed_dim=16),
        LINEAR,
    ),
    of_timm_class("ConvMixer", lambda t: t.models.ConvMixer(16, 2, kernel_size=3, num_classes=3)),
    of_timm("ConvNeXt", "convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 16)),
    of_timm_class(
        "Swin",
        lambda t: t.models.SwinTransformer(
            IMAGE, num_classes=3, embed_dim=8, depths=(1, 1), num_heads=(2, 2), window_size=4
        ),
        LINEAR,
    ),
    of_timm("ResNet", "resnet18", layers=(1, 1, 1, 1), channels=(8, 8, 16, 16)),
    of_timm_class(
        "ResNet v2, group norms",
        lambda t: t.models.ResNetV2(
            (1, 1),
            (128, 128),
            num_classes=3,
            stem_chs=128,
            conv_layer=t.layers.StdConv2d,
            norm_layer=t.layers.GroupNormAct,
        ),
    ),
    of_timm("MobileNet v3", "mobilenetv3_small_050"),
    of_timm_class("PoolFormer", lambda t: t.models.MetaFormer(num_classes=3, depths=(1, 1), dims=(8, 16))),
    of_timm_class(
        "NFNet",
        lambda t: t.models.NormFreeNet(
            t.models.nfnet.NfCfg(depths=(1, 1), channels=(16, 32), stem_chs=16, act_layer="gelu"),
            num_classes=3,
        ),
    ),
]

ENTRIES = [
    *(TORCHVISION if importlib.util.find_spec("torchvision") else []),
    *(TIMM if importlib.util.find_spec("torchvision") and importlib.util.find_spec("timm") else []),
]
