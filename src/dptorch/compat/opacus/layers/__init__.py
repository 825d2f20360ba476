"""Names of ``opacus.layers``: torch's own layers, which need no replacement here."""

from dptorch.compat.opacus.layers.dp_multihead_attention import DPMultiheadAttention, SequenceBias
from dptorch.compat.opacus.layers.dp_rnn import DPGRU, DPLSTM, DPRNN

__all__ = ["DPGRU", "DPLSTM", "DPRNN", "DPMultiheadAttention", "SequenceBias"]
