"""Opacus' replacements of layers are torch's own here, which need none."""

from __future__ import annotations

from torch import nn

__all__ = ["DPGRU", "DPLSTM", "DPRNN", "DPMultiheadAttention"]

DPRNN = nn.RNN
DPGRU = nn.GRU
DPLSTM = nn.LSTM
DPMultiheadAttention = nn.MultiheadAttention
