"""Reductions, and ops that work along one dimension."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dptorch.tape.propagation.elementwise import elementwise
from dptorch.tape.propagation.table import FAMILIES, Found, family, named_dims, only_tag
from dptorch.tape.provenance.calls import Call
from dptorch.tape.provenance.tags import Lost, Reduced, Tag

__all__ = ["MIXING", "along_dim", "reduction"]


@family(
    """sum mean nansum nanmean amax amin max min var std argmax argmin all any logsumexp prod
    var_mean std_mean median nanmedian count_nonzero linalg_vector_norm norm mode
    kthvalue aminmax _aminmax special_logsumexp cosine_similarity pairwise_distance"""
)
def reduction(call: Call, outputs: Sequence[Any]) -> Found:
    """Reductions over named dimensions; over the examples only sum and mean can be followed."""
    name = call.name
    if name in ("max", "min") and isinstance(call.arg("other"), Tensor):
        return elementwise(call, outputs)
    if name in ("cosine_similarity", "pairwise_distance"):
        a, b = call.operands()[:2]
        x = torch.empty(torch.broadcast_shapes(a.shape, b.shape), device="meta")
        tag = elementwise(call, [x])
        last = [x.dim() - 1]
        dims = last if name == "pairwise_distance" else named_dims(call, x, 1)
    else:
        x = call.first
        tag = only_tag(call, x)
        default = -1 if name in ("mode", "kthvalue") else None
        dims = named_dims(call, x, default)
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


@family(
    """softmax log_softmax softmin _softmax _log_softmax _safe_softmax cumsum cumprod cummax cummin
    logcumsumexp _logcumsumexp sort argsort topk glu diff fft_fft fft_ifft fft_rfft fft_irfft
    _fft_c2c _fft_r2c _fft_c2r msort _sample_dirichlet"""
)
def along_dim(call: Call, outputs: Sequence[Any]) -> Any:
    """Ops that work along one dimension and keep the others."""
    x = call.first
    if call.name == "diff" and len(call.tagged) > 1:
        return NotImplemented  # what is put before or behind carries examples too
    tag = only_tag(call, x)
    default = -1
    if call.name == "msort" or (
        # without a dim these take dimension 0 of tensors of rank 0, 1 and 3, otherwise 1
        call.func in (F.softmax, F.log_softmax, F.softmin) and x.dim() in (0, 1, 3)
    ):
        default = 0
    elif call.func in (F.softmax, F.log_softmax, F.softmin):
        default = 1
    if tag.dim in named_dims(call, x, default):
        raise Lost("the op works along the examples")
    if call.name == "diff" and tag.explicit is not None and isinstance(call.arg("prepend"), Tensor):
        raise Lost("a constant with one row for each meets irregularly ordered examples")
    return tag


@family("cross linalg_cross linalg_vecdot")
def with_each_other(call: Call, outputs: Sequence[Any]) -> Found:
    """Two operands, broadcast, and one dimension along which they meet."""
    a, b = call.operands()[:2]
    shape = torch.broadcast_shapes(a.shape, b.shape)
    tag = elementwise(call, [torch.empty(shape, device="meta")])
    assert isinstance(tag, Tag)
    assert tag.dim is not None
    dim = call.arg("dim", None if call.name == "cross" else -1)
    if dim is None:  # torch.cross: the first dimension of size three
        dim = list(shape).index(3)
    if tag.dim == dim % len(shape):
        raise Lost("the op works along the examples")
    return tag.at(tag.dim - (call.name == "linalg_vecdot" and dim % len(shape) < tag.dim))


@family("renorm")
def renorm(call: Call, outputs: Sequence[Any]) -> Found:
    """Each slice along a dimension is scaled by its own norm."""
    x = call.first
    tag = only_tag(call, x)
    if tag.dim != call.arg("dim") % x.dim():
        raise Lost("norms are taken over the examples")
    return tag


# Why no row of the result belongs to one example.
MIXING = {
    "bincount": "it counts over the examples",
    "histc": "it counts over the examples",
    "histogram": "it counts over the examples",
    "histogramdd": "it counts over the examples",
    "_histogramdd_bin_edges": "it takes the extremes of the examples",
    "_histogramdd_from_bin_cts": "it counts over the examples",
    "_histogramdd_from_bin_tensors": "it counts over the examples",
    "unique": "it compares the examples with each other",
    "_unique": "it compares the examples with each other",
    "_unique2": "it compares the examples with each other",
    "unique_dim": "it compares the examples with each other",
    "unique_consecutive": "it compares the examples with each other",
    "unique_dim_consecutive": "it compares the examples with each other",
    "dist": "it is one number of all examples",
    "trace": "it is one number of all examples",
    "hash_tensor": "it is one number of all examples",
    "pdist": "it compares the examples with each other",
    "_pdist_forward": "it compares the examples with each other",
    "cov": "it is a statistic over the examples",
    "corrcoef": "it is a statistic over the examples",
    "put": "it writes into the flattened batch",
    "as_strided_scatter": "it writes into memory by strides",
    "segment_reduce": "the segments are counted over the batch",
}


def _mixes(call: Call, outputs: Sequence[Any]) -> Found:
    raise Lost(MIXING[call.name.removesuffix("_copy")])


for _name in MIXING:
    FAMILIES[_name] = _mixes
