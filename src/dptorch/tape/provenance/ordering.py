"""Sorting whole examples by length and putting them back, as packed sequences do.

An order depends on every example, so it could carry one example's data to another (its rank, say).
It is therefore a state of its own (`provenance.Order`): sorting integers along the examples makes
one, few ops accept one, and anything else mixes.
"""

from __future__ import annotations

from dptorch.tape.provenance.calls import Call, words
from dptorch.tape.provenance.tags import Order, State

__all__ = ["KEEP_ORDER", "USE_ORDER", "order_of"]

# Ops on an order alone that give an order: copies, and the scatter that inverts a permutation.
KEEP_ORDER = words(
    """cpu cuda to long int clone detach contiguous empty_like scatter argsort tolist"""
)
# Ops that put whole examples in order, or run them in it.
USE_ORDER = words(
    """index_select _pack_padded_sequence _pad_packed_sequence lstm gru rnn_tanh rnn_relu"""
)


def order_of(call: Call) -> list[State] | None:
    """The states of what sorting a vector of whole numbers, one an example, gives; else None."""
    if call.name not in ("sort", "argsort") or call.batch_size == 1:
        return None
    x, tag = call.tagged[0]
    if x.dim() != 1 or x.is_floating_point() or tag.dim != 0 or not tag.regular:
        return None
    return [Order()] * (2 if call.name == "sort" else 1)
