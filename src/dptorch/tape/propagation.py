"""Where the examples are in the result of an op that touches no parameter.

One function a family of ops, in a table by canonical name. There is no default: an op that is not
in the table loses its examples, and a result that has lost them may not meet a parameter or a
loss. `rowwise` adds an op of your own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dptorch.tape.calls import Call
from dptorch.tape.provenance import (
    Lost,
    Reduced,
    Tag,
    owners,
    read_shadow,
    regular_or_explicit,
    shadow,
    tag_after_view,
)

__all__ = ["FAMILIES", "infer", "rowwise"]

Found = Tag | Reduced | None
Family = Callable[[Call, Sequence[Any]], "Found | list[Found]"]

FAMILIES: dict[str, Family] = {}


def _family(names: str) -> Callable[[Family], Family]:
    def add(function: Family) -> Family:
        for name in names.split():
            FAMILIES[name] = function
        return function

    return add


def infer(call: Call, outputs: Sequence[Any]) -> list[Found]:
    """The tag (or reduction) of each output.

    Raises:
        Lost: if the examples meet, or the op has no rule.
    """
    whole = [tag for _, tag in call.tagged if tag.dim is None]
    if whole and (call.batch_size == 1 or call.name not in ("stack", "cat")):
        if len(whole) != len(call.tagged) or len(set(whole)) > 1:
            raise Lost("different examples meet")
        return [whole[0]] * len(outputs)
    family = FAMILIES.get(call.name)
    if family is None:
        raise Lost("the op has no provenance rule; declare it with dptorch.tape.rowwise if it is one")
    found = family(call, outputs)
    return found if isinstance(found, list) else [found] * len(outputs)


def rowwise(name: str) -> None:
    """Declare that the op called `name` treats the rows of dimension 0 independently.

    Use it for a custom op whose result keeps the batch in dimension 0 and whose row i depends on
    row i of its operands alone. This is a promise: a wrong one voids the privacy guarantee.

    Example:
        >>> rowwise("my_fused_op")
    """
    FAMILIES[name] = batch_first


def _agree(tags: Sequence[Tag]) -> Tag:
    if not tags or any(t != tags[0] for t in tags):
        raise Lost("operands carry the examples in different places")
    return tags[0]


def _dims(call: Call, x: Tensor, position: int, default: Any = None) -> list[int]:
    """The reduced or scanned dimensions, non-negative; all of them when none is named."""
    dim = call.kwargs.get("dim", call.kwargs.get("axis"))
    if dim is None and len(call.args) > position:
        candidate = call.args[position]
        if isinstance(candidate, int) and not isinstance(candidate, bool):
            # sum(x, 0, 1) as a method takes several dimensions.
            rest = call.args[position:]
            many = [a for a in rest if isinstance(a, int) and not isinstance(a, bool)]
            dim = many if call.name in ("permute",) else candidate
        elif isinstance(candidate, (tuple, list)):
            dim = candidate
    if dim is None:
        dim = default
    if dim is None or (isinstance(dim, (tuple, list)) and not dim):
        return list(range(x.dim()))
    return [d % max(x.dim(), 1) for d in ((dim,) if isinstance(dim, int) else dim)]


# -- elementwise -----------------------------------------------------------------------------------

_ELEMENTWISE = """
add sub mul div pow neg abs exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square reciprocal sin cos
tan asin acos atan atan2 sinh cosh tanh asinh acosh atanh sigmoid erf erfc erfinv lgamma digamma
floor ceil round trunc frac sign sgn clamp clip clamp_min clamp_max maximum minimum fmax fmin fmod
remainder floor_divide where masked_fill lerp addcmul addcdiv hypot logaddexp nan_to_num copysign
relu relu6 gelu silu mish elu selu celu leaky_relu rrelu hardtanh hardswish hardsigmoid hardshrink
softshrink tanhshrink softplus softsign logsigmoid threshold logit sinc xlogy heaviside rsub
dropout alpha_dropout feature_dropout feature_alpha_dropout dropout1d dropout2d dropout3d
native_dropout bernoulli normal uniform exponential rand_like randn_like zeros_like ones_like
empty_like full_like randint_like eq ne lt le gt ge equal isnan isinf isfinite isclose logical_and
logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_xor bitwise_not lshift rshift
clone contiguous detach float double half bfloat16 long int short bool char byte cpu cuda cfloat
copy fill zero tril triu pos positive alias real imag conj angle pin_memory
polygamma i0 ldexp nextafter
float_power .data .real .imag
""".split()


def elementwise(call: Call, outputs: Sequence[Any]) -> Found:
    """Broadcasting ops: the examples stay where they are, counted from the last dimension."""
    out = outputs[0]
    if not isinstance(out, Tensor) or (call.name == "where" and len(call.args) == 1):
        return None
    found = []
    for t, tag in call.tagged:
        assert tag.dim is not None
        dim = tag.dim - t.dim() + out.dim()
        if dim < 0 or t.shape[tag.dim] != out.shape[dim]:
            raise Lost("an operand is broadcast along its examples")
        found.append(tag.at(dim))
    return _agree(found)


for _name in _ELEMENTWISE:
    FAMILIES[_name] = elementwise


@_family("to type type_as")
def first_operand(call: Call, outputs: Sequence[Any]) -> Found:
    """Casts: only the first operand's examples count."""
    return call.tag_of(call.args[0])


# -- losses ----------------------------------------------------------------------------------------


# Where `reduction` stands when it is given by position.
_REDUCTION_POSITION = {
    "cross_entropy": 6,
    "nll_loss": 6,
    "binary_cross_entropy": 5,
    "binary_cross_entropy_with_logits": 5,
    "huber_loss": 2,
    "gaussian_nll_loss": 5,
    "poisson_nll_loss": 7,
    "ctc_loss": 5,
}


def reduction_of(call: Call) -> str:
    """The reduction a loss function was called with.

    Raises:
        Lost: for the deprecated arguments size_average and reduce.
    """
    if call.kwargs.get("size_average") is not None or call.kwargs.get("reduce") is not None:
        raise Lost("size_average and reduce are deprecated; use reduction=")
    position = _REDUCTION_POSITION.get(call.name, 4)
    return str(call.arg(position, "reduction", "mean"))


def _reduced_or(call: Call, outputs: Sequence[Any], unreduced: Callable[[], Found]) -> Found:
    reduction = reduction_of(call)
    if reduction not in ("none", "sum", "mean", "batchmean"):
        raise Lost(f"reduction={reduction!r} is not known")
    if reduction == "none":
        return unreduced()
    if not all(tag.regular for _, tag in call.tagged) and reduction != "sum":
        raise Lost("a mean over examples of unequal sizes")
    if reduction == "batchmean" and any(tag.dim != 0 for _, tag in call.tagged):
        raise Lost("batchmean divides by dimension 0, where the examples are not")
    return Reduced(1.0 if reduction == "sum" else 1.0 / call.batch_size)


@_family(
    """mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy kl_div poisson_nll_loss
    binary_cross_entropy_with_logits gaussian_nll_loss soft_margin_loss"""
)
def elementwise_loss(call: Call, outputs: Sequence[Any]) -> Found:
    """Losses over elements: without reduction elementwise."""
    shape = torch.broadcast_shapes(
        *[a.shape for a in call.args[:2] if isinstance(a, Tensor)]
        or [call.tagged[0][0].shape]
    )
    probe = torch.empty(shape, device="meta")
    elementwise(call, [probe])  # the operands must agree, reduced or not
    return _reduced_or(call, outputs, lambda: elementwise(call, outputs))


@_family(
    "multi_margin_loss multilabel_margin_loss ctc_loss"
)
def row_loss(call: Call, outputs: Sequence[Any]) -> Found:
    """Losses with one value a row of dimension 0 (ctc_loss: of dimension 1 of its scores)."""
    dim = 1 if call.name == "ctc_loss" else 0
    for t, tag in call.tagged:
        if tag.dim != (dim if t is call.args[0] else 0):
            raise Lost("the rows of the loss are not the examples")
    return _reduced_or(call, outputs, lambda: Tag(0, _agree([g.at(0) for _, g in call.tagged]).step))


@_family("cross_entropy nll_loss")
def class_loss(call: Call, outputs: Sequence[Any]) -> Found:
    """Class scores [N, C, ...] against classes [N, ...]."""
    found = []
    for t, tag in call.tagged:
        assert tag.dim is not None
        if t is call.args[0] or t.dim() == call.args[0].dim():
            if tag.dim == 1:
                raise Lost("the classes lie where the examples are")
            found.append(tag.at(tag.dim - (tag.dim > 1)))
        else:
            found.append(tag)
    tag = _agree(found)
    target = call.arg(1, "target")
    if reduction_of(call) == "mean" and not target.is_floating_point():
        # rules.loss makes this exact; what it declines divides by a count over the whole batch.
        raise Lost("a mean loss whose divisor depends on the whole batch")
    return _reduced_or(call, outputs, lambda: tag)


# -- reductions ------------------------------------------------------------------------------------


@_family(
    """sum mean nansum nanmean amax amin max min var std argmax argmin all any logsumexp prod
    var_mean std_mean median nanmedian count_nonzero linalg_vector_norm vector_norm quantile mode
    kthvalue aminmax special_logsumexp trace dist cosine_similarity pairwise_distance"""
)
def reduction(call: Call, outputs: Sequence[Any]) -> Found:
    """Reductions over named dimensions; over the examples only sum and mean can be followed."""
    x = call.args[0] if call.args else call.tagged[0][0]
    name = call.name
    if name in ("max", "min") and len(call.args) > 1 and isinstance(call.args[1], Tensor):
        return elementwise(call, outputs)
    if name in ("cosine_similarity", "pairwise_distance"):
        shape = torch.broadcast_shapes(call.args[0].shape, call.args[1].shape)
        x = torch.empty(shape, device="meta")
        tag = elementwise(call, [x])
        default: Any = 1 if name == "cosine_similarity" else -1
        dims = _dims(call, x, 2 if name == "cosine_similarity" else 99, default)
    else:
        tag = call.tag_of(x)
        if tag is None or len(call.tagged) > 1:
            raise Lost("several operands carry examples")
        position = 2 if name in ("linalg_vector_norm", "vector_norm", "quantile", "kthvalue") else 1
        default = -1 if name in ("mode", "kthvalue") else None
        dims = _dims(call, x, position, default)
    assert isinstance(tag, Tag)
    assert tag.dim is not None
    if tag.dim in dims:
        if name == "sum" or (name == "mean" and tag.regular):
            return Reduced(1.0 if name == "sum" else 1.0 / call.batch_size)
        raise Lost("a statistic over the examples")
    out = next(o for o in outputs if isinstance(o, Tensor))
    kept = out.dim() == x.dim()
    return tag if kept else tag.at(tag.dim - sum(d < tag.dim for d in dims))


# -- along one dimension ---------------------------------------------------------------------------

_SCAN_POSITION = {"topk": 2, "renorm": 2}


@_family(
    """softmax log_softmax softmin cumsum cumprod cummax cummin logcumsumexp sort argsort topk glu
    diff fft_fft fft_ifft fft_rfft fft_irfft fft_hfft msort"""
)
def along_dim(call: Call, outputs: Sequence[Any]) -> Found:
    """Ops that work along one dimension and keep the others."""
    x, tag = call.tagged[0]
    assert tag.dim is not None
    position = _SCAN_POSITION.get(call.name, 3 if call.name.startswith("fft") else 1)
    default = -1 if call.name not in ("msort",) else 0
    dims = _dims(call, x, position, default)
    if tag.dim in dims or len(call.tagged) > 1:
        raise Lost("the op works along the examples")
    return tag


@_family("layer_norm native_layer_norm rms_norm")
def last_dims(call: Call, outputs: Sequence[Any]) -> Found:
    """Normalisation over the last dimensions."""
    x, shape = call.args[0], call.arg(1, "normalized_shape")
    tag = call.tag_of(x)
    if tag is None or len(call.tagged) > 1:
        raise Lost("the scale carries examples")
    assert tag.dim is not None
    if tag.dim >= x.dim() - len(shape):
        raise Lost("normalisation over the examples")
    return tag


@_family(
    """conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d max_pool1d max_pool2d
    max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d lp_pool1d
    lp_pool2d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices
    adaptive_max_pool2d_with_indices group_norm instance_norm interpolate upsample pixel_shuffle
    pixel_unshuffle fold grid_sample affine_grid channel_shuffle native_channel_shuffle
    lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell prelu local_response_norm max_unpool2d
    native_group_norm embedding_bag"""
)
def batch_first(call: Call, outputs: Sequence[Any]) -> Found:
    """Ops that treat the rows of dimension 0 independently."""
    for t, tag in call.tagged:
        if tag.dim != 0:
            raise Lost("the op takes its rows from dimension 0, where the examples are not")
        if call.name.startswith("conv") and t.dim() != call.args[1].dim():
            raise Lost("an unbatched convolution over the examples")
    return _agree([tag for _, tag in call.tagged])


@_family("im2col")
def _im2col(call: Call, outputs: Sequence[Any]) -> Found:
    return batch_first(call, outputs)


@_family("batch_norm native_batch_norm")
def batch_norm(call: Call, outputs: Sequence[Any]) -> Found:
    """Fixed statistics only: in training mode BatchNorm mixes the examples."""
    if call.arg(5, "training", False) or call.arg(1, "running_mean") is None:
        raise Lost("BatchNorm in training mode takes its statistics from the whole batch")
    return batch_first(call, outputs)


@_family("pad constant_pad_nd")
def padding(call: Call, outputs: Sequence[Any]) -> Found:
    """F.pad works on the last dimensions."""
    x, tag = call.tagged[0]
    assert tag.dim is not None
    touched = len(call.arg(1, "pad")) // 2
    if tag.dim >= x.dim() - touched:
        amounts = call.arg(1, "pad")
        slot = x.dim() - 1 - tag.dim
        if any(amounts[2 * slot : 2 * slot + 2]):
            raise Lost("padding along the examples")
    return tag


@_family("scaled_dot_product_attention bilinear")
def leading_dims(call: Call, outputs: Sequence[Any]) -> Found:
    """Ops whose leading dimensions are all batch dimensions, aligned from the last one."""
    out = outputs[0]
    inner = 2 if call.name == "scaled_dot_product_attention" else 1
    found = []
    for t, tag in call.tagged:
        assert tag.dim is not None
        dim = tag.dim - t.dim() + out.dim()
        if tag.dim >= t.dim() - inner or t.shape[tag.dim] != out.shape[dim]:
            raise Lost("attention across the examples")
        found.append(tag.at(dim))
    return _agree(found)


# -- products --------------------------------------------------------------------------------------


@_family("matmul mm bmm mv __rmatmul__ baddbmm addmm addbmm linear cdist dot inner")
def product(call: Call, outputs: Sequence[Any]) -> Found:
    """Matrix products: free dimensions keep the examples, the contracted one may not hold them."""
    out, name = outputs[0], call.name
    operands = list(call.args)
    found = []
    if name == "__rmatmul__":
        operands = [operands[1], operands[0]]
    elif name in ("baddbmm", "addmm", "addbmm"):
        added, operands = operands[0], operands[1:]
        tag = call.tag_of(added)
        if tag is not None and tag.dim is not None:
            found.append(tag.at(tag.dim - added.dim() + out.dim()))
    elif name in ("dot", "inner", "addbmm"):
        raise Lost("the op contracts the examples")
    elif name == "linear":
        bias = call.arg(2, "bias")
        if call.tag_of(bias) is not None or call.tag_of(call.arg(1, "weight")) is not None:
            raise Lost("the weight of a linear layer carries examples")
        operands = [call.arg(0, "input")]
    a = operands[0]
    b = operands[1] if len(operands) > 1 else None
    tag = call.tag_of(a)
    if tag is not None:
        assert tag.dim is not None
        if tag.dim == a.dim() - 1:
            raise Lost("the product contracts the examples")
        vector = b is not None and b.dim() == 1
        found.append(tag.at(tag.dim - a.dim() + out.dim() + (1 if vector else 0)))
    tag = call.tag_of(b)
    if b is not None and tag is not None:
        assert tag.dim is not None
        contracted = b.dim() - (1 if name == "cdist" else 2)
        if b.dim() == 1 or tag.dim == contracted:
            raise Lost("the product contracts the examples")
        dim = tag.dim - b.dim() + out.dim() + (1 if a.dim() == 1 and tag.dim < contracted else 0)
        if name == "cdist" and tag.dim == b.dim() - 2:
            dim = out.dim() - 1
        found.append(tag.at(dim))
    return _agree(found)


@_family("einsum")
def einsum(call: Call, outputs: Sequence[Any]) -> Found:
    """The examples follow their letter."""
    equation, operands = einsum_operands(call)
    left, right = expand_einsum(equation, operands)
    found = []
    for letters, t in zip(left, operands, strict=True):
        tag = call.tag_of(t)
        if tag is not None:
            assert tag.dim is not None
            letter = letters[tag.dim]
            if letter not in right:
                raise Lost("einsum sums over the examples")
            found.append(tag.at(right.index(letter)))
    return _agree(found)


def einsum_operands(call: Call) -> tuple[str, list[Tensor]]:
    """The equation and the operands of an einsum call in either of its spellings."""
    equation = call.args[0]
    if not isinstance(equation, str):
        raise Lost("einsum with sublists")
    rest = call.args[1:]
    if len(rest) == 1 and isinstance(rest[0], (list, tuple)):
        rest = tuple(rest[0])
    return equation.replace(" ", ""), list(rest)


def expand_einsum(equation: str, operands: Sequence[Tensor]) -> tuple[list[str], str]:
    """Index letters of each operand and of the result, ellipses replaced by capital letters.

    Example:
        >>> expand_einsum("...d,pd->...p", [torch.zeros(2, 3, 4), torch.zeros(5, 4)])
        (['ABd', 'pd'], 'ABp')
    """
    lhs, arrow, rhs = equation.partition("->")
    terms = lhs.split(",")
    free = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation]
    longest = max(
        (t.dim() - len(s) + 3 for s, t in zip(terms, operands, strict=True) if "..." in s),
        default=0,
    )
    ellipsis = "".join(free[:longest])
    left = []
    for s, t in zip(terms, operands, strict=True):
        own = t.dim() - len(s) + 3
        left.append(s.replace("...", ellipsis[longest - own :]) if "..." in s else s)
    if not arrow:
        counted = "".join(terms).replace(".", "")
        rhs = ("..." if "..." in lhs else "") + "".join(
            sorted(c for c in set(counted) if counted.count(c) == 1)
        )
    return left, rhs.replace("...", ellipsis)


# -- data movement ---------------------------------------------------------------------------------


@_family(
    """view reshape flatten unflatten squeeze unsqueeze view_as reshape_as ravel _reshape_alias
    atleast_1d atleast_2d atleast_3d"""
)
def view(call: Call, outputs: Sequence[Any]) -> Found:
    """Reshapes."""
    x = call.args[0]
    tag = call.tag_of(x)
    if tag is None:  # only the shape of the other operand was used
        return None
    if call.name == "view" and len(call.args) > 1 and isinstance(call.args[1], torch.dtype):
        return tag
    return tag_after_view(x.shape, tag, outputs[0].shape, call.batch_size)


@_family(
    """permute transpose movedim t .T .mT .H .mH adjoint select narrow unbind split chunk
    split_with_sizes tensor_split hsplit vsplit dsplit flip index_select roll diagonal unfold rot90
    masked_select take __iter__ broadcast_to fliplr flipud"""
)
def movement(call: Call, outputs: Sequence[Any]) -> list[Found]:
    """Data movement of one operand: run the op on owner indices and read the tag off."""
    x = call.args[0]
    tag = call.tag_of(x)
    if tag is None:
        raise Lost("an index carries examples and the data does not")
    assert tag.dim is not None
    index = shadow(x.shape, tag.dim, x.device)
    if call.name.startswith("."):
        moved = getattr(index, call.name[1:])
    else:
        moved = call.func(index, *call.args[1:], **call.kwargs)
    parts = moved if isinstance(moved, (list, tuple)) else (moved,)
    size = x.shape[tag.dim]
    return [read_shadow(part, tag, size, call.batch_size) for part in parts]


@_family("expand expand_as")
def expand(call: Call, outputs: Sequence[Any]) -> Found:
    """New dimensions come in front."""
    x = call.args[0]
    tag = call.tag_of(x)
    if tag is None:
        return None
    assert tag.dim is not None
    return tag.at(outputs[0].dim() - x.dim() + tag.dim)


@_family("__getitem__")
def getitem(call: Call, outputs: Sequence[Any]) -> Found:
    """Indexing: the data, the index tensors, or both may carry the examples."""
    x, index = call.args
    found: list[Tag] = []
    tag = call.tag_of(x)
    if tag is not None:
        assert tag.dim is not None
        moved = shadow(x.shape, tag.dim, x.device)[index]
        found.append(read_shadow(moved, tag, x.shape[tag.dim], call.batch_size))
    parts = index if isinstance(index, tuple) else (index,)
    tensors = [p for p in parts if isinstance(p, Tensor)]
    with_tags = [(p, call.tag_of(p)) for p in tensors]
    if any(g is not None for _, g in with_tags):
        if any(p.dtype in (torch.bool, torch.uint8) for p in tensors):
            if tag is None:
                raise Lost("a mask that carries examples selects from data that does not")
            return found[0]  # the shadow already tells which example each selected element is from
        first = next(i for i, p in enumerate(parts) if isinstance(p, Tensor))
        last = max(i for i, p in enumerate(parts) if isinstance(p, Tensor))
        adjacent = all(isinstance(p, (Tensor, int)) for p in parts[first : last + 1])
        broadcast = max(p.dim() for p in tensors)
        offset = sum(1 for p in parts[:first] if not isinstance(p, int)) if adjacent else 0
        for p, g in with_tags:
            if g is not None and g.dim is not None:
                found.append(g.at(offset + g.dim - p.dim() + broadcast))
    return _agree(found)


@_family("cat")
def cat(call: Call, outputs: Sequence[Any]) -> Found:
    """Concatenation, along the examples or across them."""
    parts = [t for t in call.args[0] if t.numel() or t.dim() > 1]
    dim = int(call.arg(1, "dim", call.kwargs.get("axis", 0))) % outputs[0].dim()
    tags = [call.tag_of(t) for t in parts]
    known = [g for g in tags if g is not None]
    if all(g is not None and g.dim in (dim, None) for g in tags):
        device = outputs[0].device
        owner = torch.cat(
            [
                owners(g, t.shape[dim], call.batch_size, device)
                if g.dim is not None
                else torch.full((t.shape[dim],), g.step, device=device)
                for t, g in zip(parts, tags, strict=True)
                if g is not None
            ]
        )
        return regular_or_explicit(owner, dim, call.batch_size, known[0].step)
    if any(g.dim is None or g.dim == dim for g in known):
        raise Lost("rows that belong to no example join the batch")
    return _agree(known)


@_family("stack")
def stack(call: Call, outputs: Sequence[Any]) -> Found:
    """Stacking makes a new dimension."""
    parts = list(call.args[0])
    dim = int(call.arg(1, "dim", 0)) % outputs[0].dim()
    tags = [call.tag_of(t) for t in parts]
    known = [g for g in tags if g is not None]
    if all(g is not None and g.dim is None for g in tags):
        owner = torch.tensor([g.step for g in known], device=outputs[0].device)
        return regular_or_explicit(owner, dim, call.batch_size)
    tag = _agree(known)
    if tag.dim is None:
        raise Lost("rows that belong to no example join the batch")
    return tag.at(tag.dim + (dim <= tag.dim))


@_family("repeat tile")
def repeat(call: Call, outputs: Sequence[Any]) -> Found:
    """Periodic owners stay periodic."""
    x, tag = call.tagged[0]
    assert tag.dim is not None
    dim = tag.dim + outputs[0].dim() - x.dim()
    if tag.explicit is not None:
        times = outputs[0].shape[dim] // x.shape[tag.dim]
        return Tag(dim, 1, tag.explicit * times)
    return tag.at(dim)


@_family("repeat_interleave")
def repeat_interleave(call: Call, outputs: Sequence[Any]) -> Found:
    """Each index several times in a row."""
    x = call.args[0]
    tag = call.tag_of(x)
    times = call.arg(1, "repeats")
    dim = call.arg(2, "dim")
    if tag is None or not isinstance(times, int):
        raise Lost("the number of repeats carries examples")
    if dim is None:
        inner = math.prod(x.shape[(tag.dim or 0) :]) // x.shape[tag.dim or 0]
        if tag.dim != 0 or tag.explicit is not None:
            raise Lost("repeat_interleave folds examples together")
        return Tag(0, tag.step * times * inner)
    if dim % x.dim() != tag.dim:
        return tag
    if tag.explicit is not None:
        return Tag(tag.dim, 1, tuple(o for o in tag.explicit for _ in range(times)))
    return Tag(tag.dim, tag.step * times)


@_family("gather take_along_dim scatter scatter_add scatter_reduce index_add index_copy index_fill")
def along_index(call: Call, outputs: Sequence[Any]) -> Found:
    """Gathers and scatters along a dimension that does not hold the examples."""
    name = call.name
    position = 2 if name == "take_along_dim" else 1
    dim = call.arg(position, "dim")
    x = call.args[0]
    if dim is None:
        raise Lost("indices into the flattened batch")
    dim = dim % x.dim()
    if name in ("gather", "take_along_dim") and call.tag_of(x) is None:
        return _agree([tag for _, tag in call.tagged])  # looking up in a constant table
    if name.startswith("index_"):
        moved = [x] + [t for t in call.args[3:] if isinstance(t, Tensor)]
        tags = [g for g in map(call.tag_of, moved) if g is not None]
        if call.tag_of(call.args[2]) is not None and tags and tags[0].dim != dim:
            raise Lost("an index that carries examples moves other dimensions")
        if name == "index_add" and tags and all(g.dim == dim for g in tags) and len(tags) == 2:
            into = owners(tags[0], x.shape[dim], call.batch_size, x.device)
            source = owners(tags[1], moved[1].shape[dim], call.batch_size, x.device)
            if torch.equal(into[call.args[2]], source):
                return tags[0]
            raise Lost("rows are added to another example")
    else:
        tags = [tag for _, tag in call.tagged]
    if any(g.dim == dim for g in tags):
        raise Lost("rows move between examples")
    return _agree(tags)


@_family("one_hot")
def one_hot(call: Call, outputs: Sequence[Any]) -> Found:
    """A new last dimension."""
    return call.tagged[0][1]


@_family("embedding")
def embedding(call: Call, outputs: Sequence[Any]) -> Found:
    """A frozen table looked up by ids that carry the examples."""
    tables = [t for t, tag in call.tagged if t.is_floating_point()]
    if tables:
        raise Lost("the embedding table carries examples")
    return call.tagged[0][1]


@_family("lstm gru rnn_tanh rnn_relu")
def recurrent(call: Call, outputs: Sequence[Any]) -> list[Found]:
    """Sequences [T, B, D] or [B, T, D]; the states are [layers, B, H]."""
    x = call.args[0]
    tag = call.tag_of(x)
    if tag is None or tag.dim is None or x.dim() != 3:
        raise Lost("a packed or unbatched recurrent layer")
    if tag.dim != (0 if call.args[-1] is True else 1) or not tag.regular:
        raise Lost("the recurrent layer runs along the examples")
    for t, g in call.tagged:
        if t is not x and g != tag.at(1):
            raise Lost("the initial state carries the examples elsewhere")
    return [tag] + [tag.at(1)] * (len(outputs) - 1)
