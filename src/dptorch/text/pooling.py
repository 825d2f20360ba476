"""Classify texts by means of a model's hidden states, instead of by the head of its own class."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dptorch.errors import ConfigurationError

__all__ = ["POOLS", "PooledClassifier"]

#: What a classifier's head is given, as ``--pool`` says.
POOLS: Final = {
    "model": "what the model's own class for classification gives its head",
    "mean": "the means of a text's hidden states after a middle and the last layer, standardised",
}


class PooledClassifier(nn.Module):
    """A pretrained body and a linear layer on means of its hidden states: logits [B, K].

    The layer begins at zero: before the first step every class is as likely. It is given the means
    after two thirds of the layers and after the last, together brought to mean 0 and variance 1 over
    their own 2 D features, so that no text has a larger gradient for its length or its words alone.

    Args:
        model: returns hidden states [B, T, D].
        classes: K.

    Attributes:
        waits: whether the body rests in the coming step: then the head alone has a gradient.

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
        self.waits: Callable[[], bool] = lambda: False
        self.head = nn.Linear(2 * model.config.hidden_size, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **more: Tensor) -> Tensor:
        """Return logits [B, K]."""
        with torch.no_grad() if self.waits() else nullcontext():
            found = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                output_hidden_states=True,
                **more,
            )
            states = found.hidden_states
            last = len(states) - 1
            # What an empty batch is made of has no token at all.
            mask_BT1 = attention_mask[:, :, None].to(states[last].dtype)
            tokens_B1 = mask_BT1.sum(1).clamp(min=1)
            chosen = states[round(2 * last / 3)], states[last]
            means_BE = torch.cat([(h * mask_BT1).sum(1) / tokens_B1 for h in chosen], 1)
            features_BE = F.layer_norm(means_BE, means_BE.shape[1:])
        logits: Tensor = self.head(features_BE)
        return logits
