"""Reductions, and ops that work along one dimension."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dptorch.tape.propagation.elementwise import elementwise
from dptorch.tape.propagation.table import Found, family, named_dims
from dptorch.tape.provenance.calls import Call
from dptorch.tape.provenance.tags import Lost, Reduced, Tag

__all__ = ["along_dim", "reduction"]

_BY_POSITION_2 = ("linalg_vector_norm", "vector_norm", "kthvalue")


@family(
    """sum mean nansum nanmean amax amin max min var std argmax argmin all any logsumexp prod
    var_mean std_mean median nanmedian count_nonzero linalg_vector_norm vector_norm mode kthvalue
    aminmax special_logsumexp cosine_similarity pairwise_distance"""
)
def reduction(call: Call, outputs: Sequence[Any]) -> Found:
    """Reductions over named dimensions; over the examples only sum and mean can be followed."""
    x = call.args[0] if call.args else call.tagged[0][0]
    name = call.name
    if name in ("max", "min") and isinstance(call.arg(1, "other"), Tensor):
        return elementwise(call, outputs)
    if name in ("cosine_similarity", "pairwise_distance"):
        second = call.arg(1, "x2")
        x = torch.empty(torch.broadcast_shapes(x.shape, second.shape), device="meta")
        tag = elementwise(call, [x])
        last = [x.dim() - 1]
        dims = last if name == "pairwise_distance" else named_dims(call, x, 2, 1)
    else:
        tag = call.tag_of(x)
        if tag is None or len(call.tagged) > 1:
            raise Lost("several operands carry examples")
        default = -1 if name in ("mode", "kthvalue") else None
        dims = named_dims(call, x, 2 if name in _BY_POSITION_2 else 1, default)
    assert isinstance(tag, Tag)
    assert tag.dim is not None
    if tag.dim in dims:
        if name == "sum" or (name == "mean" and tag.regular):
            return Reduced(name)
        raise Lost("a statistic over the examples")
    out = next(o for o in outputs if isinstance(o, Tensor))
    if out.dim() == x.dim():
        return tag
    return tag.at(tag.dim - sum(d < tag.dim for d in dims))


# Where `dim` stands when it is given by position.
_DIM_POSITION = {"topk": 2, "diff": 2, "fft_fft": 2, "fft_ifft": 2, "fft_rfft": 2, "fft_irfft": 2}


@family(
    """softmax log_softmax softmin cumsum cumprod cummax cummin logcumsumexp sort argsort topk glu
    diff fft_fft fft_ifft fft_rfft fft_irfft msort"""
)
def along_dim(call: Call, outputs: Sequence[Any]) -> Found:
    """Ops that work along one dimension and keep the others."""
    x = call.arg(0, "input")
    tag = call.tag_of(x)
    if tag is None or len(call.tagged) > 1:
        raise Lost("several operands carry examples")
    assert tag.dim is not None
    default = -1
    if call.name == "msort" or (
        # without a dim these take dimension 0 of tensors of rank 0, 1 and 3, otherwise 1
        call.func in (F.softmax, F.log_softmax, F.softmin) and x.dim() in (0, 1, 3)
    ):
        default = 0
    elif call.func in (F.softmax, F.log_softmax, F.softmin):
        default = 1
    if tag.dim in named_dims(call, x, _DIM_POSITION.get(call.name, 1), default):
        raise Lost("the op works along the examples")
    return tag
