"""Cross-entropy of a causal language model without the logits of all tokens in memory.

Logits are [B, T, V], which for a vocabulary of 150,000 is most of the memory of a step. Here the model
returns what it would give to its head, and the head and the loss are computed for some tokens of every
row at a time; the backward computes these logits again. Under the tape this is exact. A frozen head is
made of ordinary ops. A trained one is `dptorch.tape.summed_cross_entropy`, which takes as many
logits at once, but of some words and all tokens: the norm of a gradient is a sum over words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dptorch.errors import ConfigurationError
from dptorch.tape import summed_cross_entropy

__all__ = ["ChunkedLoss", "chunked_cross_entropy"]

_IGNORED = -100


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    tokens: int,
    *,
    trained: bool = False,
) -> Tensor:
    """Return the mean over rows of each one's mean loss over the labels that count.

    Args:
        hidden: [B, T, H], what a head is given, for the label at the same place.
        weight, bias: of the head, [V, H] and [V].
        labels: [B, T]; -100 does not count.
        tokens: how many places of every row have their logits in memory at once.
        trained: whether weight or bias is.

    Example:
        >>> hidden, weight = torch.ones(1, 3, 2), torch.zeros(4, 2)
        >>> chunked_cross_entropy(hidden, weight, None, torch.tensor([[0, 1, -100]]), 2)
        tensor(1.3863)
    """

    def part(h: Tensor, y: Tensor) -> Tensor:
        logits = F.linear(h.to(weight.dtype), weight, bias)
        wide = logits.float() if logits.dtype.itemsize < 4 else logits
        return F.cross_entropy(
            wide.transpose(1, 2), y, reduction="none", ignore_index=_IGNORED
        ).sum(1)

    if trained:
        columns = max(1, tokens * weight.shape[0] // hidden.shape[1])
        total = summed_cross_entropy(hidden, weight, bias, labels, columns)
    else:
        parts = zip(hidden.split(tokens, 1), labels.split(tokens, 1), strict=True)
        sums = [checkpoint(part, h, y, use_reentrant=False) for h, y in parts]
        total = sums[0]
        for each in sums[1:]:
            total = total + each
    return (total / (labels != _IGNORED).sum(1).clamp(min=1)).mean()


class ChunkedLoss:
    """The loss of a causal language model, some tokens at a time.

    Args:
        model: its head is one linear layer, frozen or trained, tied to the embedding or not.
        tokens: how many places of every row have their logits in memory at once.

    Raises:
        ConfigurationError: the model has no such head.
    """

    def __init__(self, model: Any, tokens: int) -> None:
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
            raise ConfigurationError(
                f"loss_chunk={tokens!r} must be a number of tokens, 1 or more."
            )
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if not isinstance(head, nn.Linear) or getattr(model.config, "is_encoder_decoder", False):
            raise ConfigurationError(
                f"loss_chunk={tokens}: {type(model).__name__} is no causal language model with a "
                "linear head. Leave loss_chunk out."
            )
        self.tokens = tokens
        self._head = head

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """Return the loss of a batch."""
        given = dict(inputs)
        labels = given.pop("labels")
        with self._head_passed_over():
            hidden = model(**given).logits
        head = self._head
        return chunked_cross_entropy(
            hidden[:, :-1],
            head.weight,
            head.bias,
            labels[:, 1:],
            self.tokens,
            trained=any(p.requires_grad for p in head.parameters()),
        )

    @contextmanager
    def _head_passed_over(self) -> Iterator[None]:
        """Within it the head returns what it is given."""
        head: Any = self._head
        before = head.__dict__.get("forward")
        head.forward = lambda hidden: hidden
        try:
            yield
        finally:
            if before is None:
                del head.forward
            else:
                head.forward = before

    def check(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        """Hold the loss against the model's own on a batch of one row.

        Raises:
            ConfigurationError: they differ: the model does more with logits than its head.
        """
        with torch.no_grad():
            own, mine = model(**batch).loss, self(model, batch)
        if not torch.allclose(own.double(), mine.double(), rtol=1e-3, atol=1e-4):
            raise ConfigurationError(
                f"loss_chunk={self.tokens}: {type(model).__name__} does more with its logits than its "
                "head (a scale, a soft cap), or has a loss of its own. Leave loss_chunk out."
            )
