"""Classify texts by the mean of a model's hidden states, instead of by the head of its own class."""

from __future__ import annotations

from typing import Any, Final

import torch.nn.functional as F
from torch import Tensor, nn

from dptorch.errors import ConfigurationError

__all__ = ["POOLS", "PooledClassifier"]

#: What a classifier's head is given, as ``--pool`` says.
POOLS: Final = {
    "model": "what the model's own class for classification gives its head",
    "mean": "the mean of the last hidden states of a text's tokens, standardised by itself",
}


class PooledClassifier(nn.Module):
    """A pretrained body and a linear layer on the mean of its last hidden states: logits [B, K].

    The layer begins at zero: before the first step every class is as likely. The mean is brought to
    mean 0 and variance 1 over its own features, so that no text has a larger gradient for its length
    or its words alone.

    Args:
        model: returns hidden states [B, T, D].
        classes: K.

    Raises:
        ConfigurationError: the body has a decoder, whose states are of another text.
    """

    def __init__(self, model: Any, classes: int) -> None:
        super().__init__()
        if getattr(model.config, "is_encoder_decoder", False):
            raise ConfigurationError(
                f"pool='mean': {type(model).__name__} has an encoder and a decoder, whose states are "
                "not those of the text. Give a model with one of both, or leave pool out."
            )
        self.model = model
        self.head = nn.Linear(model.config.hidden_size, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **more: Tensor) -> Tensor:
        """Return logits [B, K]."""
        found = self.model(input_ids=input_ids, attention_mask=attention_mask, **more)
        hidden_BTD = found.last_hidden_state
        mask_BT1 = attention_mask[:, :, None].to(hidden_BTD.dtype)
        # What an empty batch is made of has no token at all.
        mean_BD = (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1)
        logits: Tensor = self.head(F.layer_norm(mean_BD, mean_BD.shape[1:]))
        return logits
