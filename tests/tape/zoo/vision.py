"""Image models."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tests.oracles.torchvision_on_cpu  # noqa: F401  (transformers imports torchvision)
from tests.tape.zoo.base import B, Case, case, labels

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


