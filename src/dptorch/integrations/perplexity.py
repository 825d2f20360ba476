"""Perplexity of a causal language model on texts."""

from __future__ import annotations

import math
from typing import Any, Final

from torch import nn

from dptorch.audit.membership.records import texts_of
from dptorch.audit.scores import token_statistics, tokenize
from dptorch.errors import DataError

__all__ = ["perplexity"]

_BLOCK: Final = 1024  # texts whose statistics are in memory together
_LARGEST: Final = 700.0  # e to a larger number is no float


def perplexity(
    model: nn.Module,
    dataset: Any,
    tokenizer: Any,
    *,
    text_column: str = "text",
    max_length: int = 512,
    batch_size: int = 16,
) -> float:
    """Return e to the mean loss of a token, every predicted token of all texts counting the same.

    Padding does not count, and no text sees another. The model's mode is left as it was. This is an
    exact function of the texts: on private ones it is not covered by any ε.

    Args:
        model: ``model(input_ids=..., attention_mask=...)`` gives logits [B, T, V].
        dataset: a list of strings, or a data set with a text column.
        tokenizer: of the model.
        text_column: where the data set is of mappings.
        max_length: tokens of a text that are read; what comes after is left out.
        batch_size: texts that go through the model together; the value does not depend on it.

    Raises:
        DataError: there is no text of two tokens, so that no token is predicted.
        ConfigurationError: the model returns no logits.
    """
    rows = tokenize(texts_of(dataset, text_column), tokenizer, max_length=max_length)
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise DataError("no text has two tokens or more, so there is no next token to predict.")
    loss, tokens = 0.0, 0
    for start in range(0, len(rows), _BLOCK):
        for found in token_statistics(model, rows[start : start + _BLOCK], batch_size=batch_size):
            loss -= float(found.log_p.sum())
            tokens += len(found)
    return math.exp(min(loss / tokens, _LARGEST))
