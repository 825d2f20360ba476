"""Text from language models that were fine-tuned without privacy: each token is one answer."""

from __future__ import annotations

import torch
from torch import Tensor

from dptorch.accounting.arguments import positive_int
from dptorch.errors import ConfigurationError
from dptorch.prediction.predictor import PrivatePredictor

__all__ = ["generate"]


def generate(
    predictor: PrivatePredictor, prompt: Tensor, max_new_tokens: int, *, end: int | None = None
) -> Tensor:
    """Go on with a prompt, one charged token after the other.

    The models of the predictor map token ids [N, T] to logits of the next token [N, V]. Under "mixing"
    a token is drawn from them; a prompt that was gone on with before gets the same tokens, at no cost.

    Args:
        predictor: with any mechanism; "mixing" is the one for text.
        prompt: int64 [T] token ids.
        max_new_tokens: most tokens to add.
        end: a token that ends the text.

    Returns:
        int64 [T + new], the prompt and what follows.

    Raises:
        BudgetExhausted: a token cannot be paid for. What was drawn before it is charged, and free when
            the same prompt is asked again: ask for no more tokens than `predictor.remaining`.
        ConfigurationError: the prompt is not a row of token ids.
    """
    positive_int("max_new_tokens", max_new_tokens)
    if prompt.ndim != 1 or prompt.dtype != torch.int64 or not len(prompt):
        raise ConfigurationError(
            f"prompt ({list(prompt.shape)}, {prompt.dtype}) must be int64 token ids [T], T >= 1."
        )
    text = prompt
    for _ in range(max_new_tokens):
        token = predictor.predict(text[None]).labels
        text = torch.cat([text, token])
        if end is not None and int(token) == end:
            break
    return text
