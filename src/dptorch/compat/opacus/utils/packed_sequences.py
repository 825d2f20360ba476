"""Functions of ``opacus.utils.packed_sequences``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

__all__ = ["compute_seq_lengths"]


def compute_seq_lengths(batch_sizes: Tensor) -> list[int]:
    """Return the length of each sequence, longest first, from a PackedSequence's ``batch_sizes`` [T].

    Example:
        >>> compute_seq_lengths(torch.tensor([3, 2, 2, 1]))
        [4, 3, 1]
    """
    sizes = batch_sizes.tolist()
    return [sum(size > i for size in sizes) for i in range(sizes[0])]


def _gen_packed_data(
    minibatch_size: int,
    max_seq_length: int,
    input_dim: int,
    batch_first: bool,
    sorted_: bool | None = False,
) -> PackedSequence:
    """Return standard normal sequences of random lengths in 1..`max_seq_length`."""
    del batch_first  # the same packed data either way
    lengths = torch.randint(1, max_seq_length + 1, (minibatch_size,)).tolist()
    if sorted_:
        lengths.sort(reverse=True)
    rows = [torch.randn(length, input_dim) for length in lengths]
    return pack_sequence(rows, enforce_sorted=bool(sorted_))
