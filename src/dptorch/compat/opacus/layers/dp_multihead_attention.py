"""Opacus's DPMultiheadAttention, as an alias of torch's layer, and its SequenceBias."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["DPMultiheadAttention", "SequenceBias"]

DPMultiheadAttention = nn.MultiheadAttention


class SequenceBias(nn.Module):
    """Appends one learned element to every sequence: [L, N, E] -> [L + 1, N, E].

    Shape legend: L positions, N examples, E channels.

    Args:
        embed_dim: E.
        batch_first: whether inputs are [N, L, E].

    Example:
        >>> SequenceBias(16)(torch.randn(20, 4, 16)).shape
        torch.Size([21, 4, 16])
    """

    def __init__(self, embed_dim: int, batch_first: bool = False) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.bias = nn.Parameter(torch.randn(embed_dim))

    def forward(self, x: Tensor) -> Tensor:
        """Append the bias."""
        if self.batch_first:
            return torch.cat([x, self.bias.repeat(x.shape[0], 1, 1)], 1)
        return torch.cat([x, self.bias.repeat(1, x.shape[1], 1)])
