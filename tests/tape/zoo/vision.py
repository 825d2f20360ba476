"""Image models."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.tape.zoo.base import B, Case, case, classes, labels
from torch import Tensor, nn


@case
def vit() -> Case:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20,
        image_size=16, patch_size=4, num_labels=3, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    return Case(model, (torch.randn(B, 3, 16, 16), labels()), logits_classes)


def logits_classes(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).logits, y, reduction="none")


@case
def swin_windows() -> Case:
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4,
        num_labels=3, hidden_dropout_prob=0.0, drop_path_rate=0.0,
    )  # fmt: skip
    model = SwinForImageClassification(config)
    return Case(model, (torch.randn(B, 3, 16, 16), labels()), logits_classes)


def _hugging_face(kind: str, **settings: object) -> Case:
    import transformers

    model_class = getattr(transformers, kind)
    common = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20,
        "image_size": 16, "patch_size": 4, "num_labels": 3, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    model = model_class(model_class.config_class(**common | settings))
    return Case(model, (torch.randn(B, 3, 16, 16), labels()), logits_classes)


@case
def deit() -> Case:
    return _hugging_face("DeiTForImageClassification")


@case
def beit_hugging_face() -> Case:
    case = _hugging_face(
        "BeitForImageClassification",
        use_relative_position_bias=True,
        use_absolute_position_embeddings=True,
        layer_scale_init_value=0.5,
        drop_path_rate=0.0,
    )
    for name, p in case.model.named_parameters():
        if "relative_position_bias_table" in name:
            nn.init.normal_(p)
    return case


@case
def clip() -> Case:
    from transformers import CLIPConfig, CLIPModel

    small = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20,
        "projection_dim": 8,
    }  # fmt: skip
    config = CLIPConfig(
        text_config={**small, "vocab_size": 40, "max_position_embeddings": 12, "eos_token_id": 2,
                     "bos_token_id": 0, "pad_token_id": 1},
        vision_config={**small, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )  # fmt: skip
    model = CLIPModel(config)

    def loss(m: nn.Module, ids: Tensor, pixels: Tensor) -> Tensor:
        """Pairs agree. CLIP's own loss takes every other pair of the batch as a negative."""
        text = m.text_projection(m.text_model(input_ids=ids).pooler_output)
        image = m.visual_projection(m.vision_model(pixel_values=pixels).pooler_output)
        return m.logit_scale.exp() * (1 - F.cosine_similarity(text, image))

    both = Together(model, loss)
    ids = torch.randint(3, 40, (B, 6))
    ids[:, -1] = 2
    return Case(both, (ids, torch.randn(B, 3, 16, 16)), lambda m, *batch: m(*batch))


class Together(nn.Module):
    """A model and what is asked of it, as one forward pass."""

    def __init__(self, model: nn.Module, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, *batch: Tensor) -> Tensor:
        return self.function(self.model, *batch)


def group_norm(model: nn.Module) -> nn.Module:
    """Replace every BatchNorm by GroupNorm, by hand."""
    for name, child in list(model.named_children()):
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            channels = child.num_features
            groups = next(g for g in (4, 3, 2, 1) if channels % g == 0)
            # timm's BatchNormAct2d carries an activation of its own
            act = getattr(child, "act", nn.Identity())
            setattr(model, name, nn.Sequential(nn.GroupNorm(groups, channels), act))
        else:
            group_norm(child)
    return model


def steady(model: nn.Module) -> nn.Module:
    """Switch off what is random, and fill zero-initialised scales and tables, which hide errors."""
    for module in model.modules():
        for probability in ("p", "drop_prob", "drop_rate"):
            if isinstance(getattr(module, probability, None), float):
                setattr(module, probability, 0.0)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


def _image_case(model: nn.Module, size: int) -> Case:
    batch = (torch.randn(2, 3, size, size), torch.tensor([0, 2]))
    return Case(steady(group_norm(model)).double(), batch, classes)


# One small member of each family: (name or class, image size, settings).
_FAMILIES: dict[str, tuple[str, int, dict[str, object]]] = {
    "resnet": ("resnet10t", 32, {}),
    "vit": ("vit_tiny_patch16_224", 32, {"img_size": 32, "depth": 2}),
    "deit3": ("deit3_small_patch16_224", 32, {"img_size": 32, "depth": 1}),
    "beit": ("beit_base_patch16_224", 32, {"img_size": 32, "depth": 1, "embed_dim": 48}),
    "convnext": ("convnext_atto", 32, {"depths": (1, 1, 1, 1)}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        28,
        {"img_size": 28, "depths": (2, 1), "num_heads": (3, 6), "embed_dim": 24},
    ),
    "cait": ("cait_xxs24_224", 32, {"img_size": 32, "depth": 1}),
    "xcit": ("xcit_nano_12_p16_224", 32, {"img_size": 32, "depth": 1, "cls_attn_layers": 1}),
    "convit": ("convit_tiny", 32, {"img_size": 32, "depth": 11, "embed_dim": 16, "num_heads": 2}),
    "crossvit": ("crossvit_9_240", 240, {"embed_dim": (16, 24), "num_heads": (2, 2)}),
    "mixer": (
        "timm.models.mlp_mixer.MlpMixer",
        32,
        {"img_size": 32, "num_blocks": 1, "embed_dim": 32},
    ),
    "gmlp": (
        "timm.models.mlp_mixer.MlpMixer",
        32,
        {
            "img_size": 32,
            "num_blocks": 1,
            "embed_dim": 32,
            "mlp_ratio": 4,
            "block_layer": "timm.models.mlp_mixer.SpatialGatingBlock",
            "mlp_layer": "timm.layers.GatedMlp",
        },
    ),
    "pvt": ("pvt_v2_b0", 32, {}),
    "twins": ("twins_svt_small", 64, {"img_size": 64, "depths": (1, 2, 1, 1)}),
    "volo": (
        "timm.models.volo.VOLO",
        32,
        {
            "img_size": 32,
            "layers": (1, 1, 1, 1),
            "embed_dims": (16, 32, 32, 32),
            "num_heads": (2, 2, 2, 2),
            "use_mix_token": False,
        },
    ),
    "pit": ("pit_ti_224", 64, {"img_size": 64, "depth": (1, 1, 1)}),
    "nest": (
        "timm.models.nest.Nest",
        32,
        {"img_size": 32, "depths": (1, 1, 1), "embed_dims": (8, 16, 16), "num_heads": (1, 2, 2)},
    ),
    "visformer": ("visformer_tiny", 32, {"img_size": 32, "depth": (1, 1, 1)}),
    "hrnet": ("hrnet_w18_small", 64, {}),
    "res2net": ("res2net50_26w_4s", 32, {"layers": (1, 1, 1, 1)}),
    "ecaresnet": ("ecaresnet26t", 32, {"layers": (1, 1, 1, 1)}),
    "seresnet": ("seresnet18", 32, {"layers": (1, 1, 1, 1)}),
    "legacy_senet": (
        "timm.models.senet.SENet",
        32,
        {
            "block": "timm.models.senet.SEResNetBlock",
            "layers": (1, 1, 1, 1),
            "groups": 1,
            "reduction": 16,
        },
    ),
    "resnest": ("resnest14d", 32, {}),
    "dla": ("dla46_c", 32, {}),
}


def _resolve(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _timm(family: str) -> Callable[[], Case]:
    def build() -> Case:
        timm = pytest.importorskip("timm")
        torch.manual_seed(0)
        name, size, settings = _FAMILIES[family]
        if name.startswith("timm."):
            classes_of = {
                k: _resolve(v) if isinstance(v, str) and v.startswith("timm.") else v
                for k, v in settings.items()
            }
            return _image_case(_resolve(name)(num_classes=3, **classes_of), size)
        return _image_case(timm.create_model(name, num_classes=3, **settings), size)

    build.__name__ = f"timm_{family}"
    return build


for _family in _FAMILIES:
    case(_timm(_family))


def _torchvision(name: str, size: int, **settings: object) -> Case:
    torch.manual_seed(0)
    return _image_case(
        getattr(pytest.importorskip("torchvision.models"), name)(num_classes=3, **settings), size
    )


@case
def torchvision_densenet() -> Case:
    return _torchvision("DenseNet", 32, growth_rate=4, block_config=(2, 2), num_init_features=8)


@case
def torchvision_densenet_checkpointed() -> Case:
    return _torchvision(
        "DenseNet",
        32,
        growth_rate=4,
        block_config=(2, 2),
        num_init_features=8,
        memory_efficient=True,
    )


@case
def torchvision_efficientnet() -> Case:
    pytest.importorskip("torchvision")
    from torchvision.models.efficientnet import MBConvConfig

    setting = [MBConvConfig(1, 3, 1, 8, 8, 1), MBConvConfig(4, 5, 2, 8, 12, 2)]
    return _torchvision("EfficientNet", 32, inverted_residual_setting=setting, dropout=0.0)


@case
def torchvision_vgg() -> Case:
    pytest.importorskip("torchvision")
    from torchvision.models.vgg import make_layers

    features = make_layers([8, "M", 16, "M", 16])
    head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 3))
    return _image_case(nn.Sequential(features, head), 16)


@case
def torchvision_swin_v2() -> Case:
    pytest.importorskip("torchvision")
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

    return _torchvision(
        "SwinTransformer", 32, patch_size=[4, 4], embed_dim=16, depths=[2, 1], num_heads=[2, 2],
        window_size=[4, 4], block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2,
    )  # fmt: skip


@case
def torchvision_convnext() -> Case:
    pytest.importorskip("torchvision")
    from torchvision.models.convnext import CNBlockConfig

    return _torchvision(
        "ConvNeXt", 32, block_setting=[CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)]
    )


@case
def torchvision_maxvit() -> Case:
    return _torchvision(
        "MaxVit", 64, input_size=(64, 64), stem_channels=8, partition_size=2, block_channels=[8, 8],
        block_layers=[1, 1], head_dim=4, stochastic_depth_prob=0.0,
    )  # fmt: skip
