"""Vector-Jacobian products through a recorded graph, for every example of a batch at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dptorch.errors import PrivacyError

__all__ = ["batched_vjp"]

# Separated gradients are made for as many examples at once as fit in this many elements: on a CPU few,
# which is no slower, on a GPU many.
_CHUNK_ELEMENTS, _CHUNK_ELEMENTS_CUDA = 1 << 20, 1 << 24


def batched_vjp(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Any,
    batch_size: int,
    elements: int,
) -> list[Tensor | None]:
    """Vector-Jacobian products for B cotangents at once.

    Args:
        outputs, inputs: of the recorded graph, which is kept.
        cotangents: function (start, stop) -> cotangents [stop - start, *output.shape] of outputs.
        batch_size: number of cotangents B.
        elements: size of one cotangent, for chunking.

    Returns:
        For each input [B, *input.shape], or None if no output depends on it.
    """
    most = _CHUNK_ELEMENTS_CUDA if outputs[0].is_cuda else _CHUNK_ELEMENTS
    width = max(1, min(batch_size, most // max(1, elements)))
    found: list[Tensor | None] = []
    for start in range(0, batch_size, width):
        vectors = cotangents(start, min(batch_size, start + width))
        found = _collected(found, _vjp(outputs, inputs, vectors), start, batch_size)
    return found


def _collected(
    found: list[Tensor | None], part: Sequence[Tensor | None], start: int, batch_size: int
) -> list[Tensor | None]:
    """Copy the results [b, ...] for examples from `start` on to their place in those for all.

    None, which a custom autograd.Function may return for some examples and not for others, is zero.
    """
    if any(t is not None and len(t) == batch_size for t in part):
        return list(part)
    found = found or [None] * len(part)
    for i, t in enumerate(part):
        if t is None:
            continue
        whole = found[i]
        if whole is None:
            whole = found[i] = t.new_zeros(batch_size, *t.shape[1:])
        whole[start : start + len(t)] = t
    return found


@torch.enable_grad()
def _vjp(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    try:
        return torch.autograd.grad(
            outputs, inputs, vectors, is_grads_batched=True, retain_graph=True, allow_unused=True
        )
    except PrivacyError:  # of what reads parameters, on ranks
        raise
    except RuntimeError:  # an op that vmap does not know: one example at a time
        found: list[Tensor | None] = []
        n = vectors[0].shape[0]
        for i in range(n):
            each = torch.autograd.grad(
                outputs, inputs, [v[i] for v in vectors], retain_graph=True, allow_unused=True
            )
            part = [None if g is None else g[None] for g in each]
            found = _collected(found, part, i, n)
        return tuple(found)
