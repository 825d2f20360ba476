"""Opacus's DPRNN, DPGRU and DPLSTM, as aliases of torch's layers."""

from __future__ import annotations

from torch import nn

__all__ = ["DPGRU", "DPLSTM", "DPRNN"]

DPRNN = nn.RNN
DPGRU = nn.GRU
DPLSTM = nn.LSTM
