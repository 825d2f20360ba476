"""Layers without a trainable parameter of their own, and frozen ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dptorch.tape.propagation.elementwise import along_broadcast, refuse_positions
from dptorch.tape.propagation.table import Found, agree, family
from dptorch.tape.provenance.calls import Call
from dptorch.tape.provenance.tags import Lost, Tag

__all__: list[str] = []


@family("layer_norm native_layer_norm rms_norm")
def last_dims(call: Call, outputs: Sequence[Any]) -> Found:
    """Normalisation over the last dimensions."""
    x, shape = call.arg(0, "input"), call.arg(1, "normalized_shape")
    tag = call.tag_of(x)
    if tag is None or len(call.tagged) > 1:
        raise Lost("the scale carries examples")
    assert tag.dim is not None
    if tag.dim >= x.dim() - len(shape):
        raise Lost("normalisation over the examples")
    return tag


# Ranks at which dimension 0 is a batch dimension, where another rank would mean something else.
_RANKS = {"im2col": (4,), "fold": (3,), "col2im": (3,), "group_norm": range(2, 9)}


@family(
    """conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d max_pool1d max_pool2d
    max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d lp_pool1d
    lp_pool2d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices
    adaptive_max_pool2d_with_indices group_norm native_group_norm interpolate upsample fold im2col
    pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle affine_grid prelu
    local_response_norm"""
)
def rows_of_input(call: Call, outputs: Sequence[Any]) -> Found:
    """Ops that treat the rows of dimension 0 of their first operand independently."""
    x = call.arg(0, "input", call.kwargs.get("theta"))
    tag = call.tag_of(x)
    if tag is None or len(call.tagged) > 1:
        raise Lost("a weight or a size carries examples")
    if tag.dim != 0:
        raise Lost("the op takes its rows from dimension 0, where the examples are not")
    if call.name.startswith("conv") and x.dim() != call.arg(1, "weight").dim():
        raise Lost("an unbatched convolution over the examples")
    if "pixel" in call.name and x.dim() < 4:
        raise Lost("an unbatched image")
    if x.dim() not in _RANKS.get(call.name, range(9)):
        raise Lost("an unbatched input")
    if call.name in ("prelu", "channel_shuffle", "local_response_norm") and x.dim() < 2:
        raise Lost("an unbatched input")
    return tag


@family(
    "grid_sample max_unpool1d max_unpool2d max_unpool3d lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell"
)
def rows_of_inputs(call: Call, outputs: Sequence[Any]) -> Found:
    """The same for ops with several inputs; weights come after the first two."""
    inputs = [*call.args[:2], *(call.args[1] if isinstance(call.args[1], (list, tuple)) else ())]
    for t, tag in call.tagged:
        if not any(t is other for other in inputs):
            raise Lost("a weight carries examples")
        if tag.dim != 0 or t.dim() < 2:
            raise Lost("the op takes its rows from dimension 0, where the examples are not")
    return agree([tag for _, tag in call.tagged])


@family("embedding_bag")
def embedding_bag(call: Call, outputs: Sequence[Any]) -> Found:
    """Bags of a frozen table: rows of ids, or ids in a row and offsets."""
    ids, offsets = call.arg(0, "input"), call.arg(2, "offsets")
    table = call.arg(1, "weight")
    if call.tag_of(table) is not None or (offsets is not None and call.tag_of(ids) is not None):
        raise Lost("the table, or ids without rows, carry examples")
    if any(tag.dim != 0 for _, tag in call.tagged):
        raise Lost("bags are rows of dimension 0, where the examples are not")
    return agree([tag for _, tag in call.tagged])


@family("instance_norm")
def instance_norm(call: Call, outputs: Sequence[Any]) -> Found:
    """Each example by itself, unless running statistics are kept."""
    if call.arg(1, "running_mean") is not None and call.arg(5, "use_input_stats", True):
        raise Lost("InstanceNorm updates running statistics from the whole batch")
    return rows_of_input(call, outputs)


@family("batch_norm native_batch_norm")
def batch_norm(call: Call, outputs: Sequence[Any]) -> Found:
    """Fixed statistics only: in training mode BatchNorm mixes the examples."""
    if call.arg(5, "training", False) or call.arg(1, "running_mean") is None:
        raise Lost("BatchNorm in training mode takes its statistics from the whole batch")
    x = call.arg(0, "input")
    tag = call.tag_of(x)
    if tag is None or len(call.tagged) > 1:
        raise Lost("the statistics carry examples")
    if tag.dim == 1:
        raise Lost("the channels are the examples")
    return tag


@family("pad constant_pad_nd")
def padding(call: Call, outputs: Sequence[Any]) -> Found:
    """F.pad works on the last dimensions."""
    x, tag = call.tagged[0]
    assert tag.dim is not None
    amounts = call.arg(1, "pad")
    if tag.dim >= x.dim() - len(amounts) // 2:
        slot = x.dim() - 1 - tag.dim
        if any(amounts[2 * slot : 2 * slot + 2]):
            raise Lost("padding along the examples")
    return tag


@family("scaled_dot_product_attention bilinear")
def leading_dims(call: Call, outputs: Sequence[Any]) -> Found:
    """Ops whose leading dimensions are all batch dimensions, aligned from the last one."""
    out = outputs[0]
    attention = call.name == "scaled_dot_product_attention"
    inner = 2 if attention else 1
    found = []
    for t, tag in call.tagged:
        if not attention and not any(t is other for other in call.args[:2]):
            raise Lost("a weight carries examples")
        assert tag.dim is not None
        if tag.dim >= t.dim() - inner:
            raise Lost("attention across the examples")
        found.append(along_broadcast(t, tag, out.shape))
    agreed = agree(found)
    if agreed.explicit is not None:
        refuse_positions(call, agreed, out.shape)
    return agreed


@family("one_hot")
def one_hot(call: Call, outputs: Sequence[Any]) -> Found:
    """A new last dimension."""
    return call.tagged[0][1]


@family("embedding")
def embedding(call: Call, outputs: Sequence[Any]) -> Found:
    """A frozen table looked up by ids that carry the examples."""
    if any(t.is_floating_point() for t, _ in call.tagged):
        raise Lost("the embedding table carries examples")
    return call.tagged[0][1]


@family("_pack_padded_sequence")
def pack(call: Call, outputs: Sequence[Any]) -> list[Found]:
    """Sequences sorted by length, their positions one after another: [sum of lengths, ...]."""
    x, batch_first = call.args[0], call.args[2]
    tag = call.tag_of(x)
    if tag is None or tag.dim != (0 if batch_first else 1):
        raise Lost("the packed sequences are not the examples")
    owner = _owner_list(tag, x.shape[tag.dim], call.batch_size)
    packed = [owner[i] for count in outputs[1].tolist() for i in range(count)]
    return [Tag(0, 1, tuple(packed)), None]


@family("_pad_packed_sequence")
def unpack(call: Call, outputs: Sequence[Any]) -> list[Found]:
    """The inverse of `pack`."""
    data, counts, batch_first = call.args[:3]
    tag = call.tag_of(data)
    if tag is None or tag.dim != 0:
        raise Lost("the packed sequences are not the examples")
    first = _packed_owners(tag, data, counts, call.batch_size)
    return [_from_list(first, 0 if batch_first else 1, call.batch_size), None]


@family("lstm gru rnn_tanh rnn_relu")
def recurrent(call: Call, outputs: Sequence[Any]) -> list[Found]:
    """Sequences [T, B, D] or [B, T, D], or packed; the states are [layers, B, H]."""
    x = call.args[0]
    tag = call.tag_of(x)
    if tag is None or tag.dim is None:
        raise Lost("the input of the recurrent layer carries no examples")
    sizes = call.args[1]
    if isinstance(sizes, torch.Tensor) and sizes.dtype == torch.int64 and x.dim() == 2:
        first = _packed_owners(tag, x, sizes, call.batch_size)
        state = _from_list(first, 1, call.batch_size)
    elif x.dim() == 3:
        if tag.dim != (0 if call.args[-1] is True else 1):
            raise Lost("the recurrent layer runs along the examples")
        state = tag.at(1)
    else:
        raise Lost("an unbatched recurrent layer")
    for t, g in call.tagged:
        if t is not x and g != state:
            raise Lost("the initial state carries the examples elsewhere")
    return [tag, *[state] * (len(outputs) - 1)]


def _owner_list(tag: Tag, size: int, batch_size: int) -> list[int]:
    if tag.explicit is not None:
        return list(tag.explicit)
    return [(i // tag.step) % batch_size for i in range(size)]


def _packed_owners(
    tag: Tag, data: torch.Tensor, counts: torch.Tensor, batch_size: int
) -> list[int]:
    """The owner of each packed sequence."""
    if tag.dim != 0:
        raise Lost("the packed sequences are not the examples")
    owner = _owner_list(tag, data.shape[0], batch_size)
    sizes = counts.tolist()
    first = owner[: sizes[0]]
    if owner != [first[i] for count in sizes for i in range(count)]:
        raise Lost("a packed sequence holds several examples")
    return first


def _from_list(owner: list[int], dim: int, batch_size: int) -> Tag:
    if owner == list(range(batch_size)):
        return Tag(dim)
    return Tag(dim, 1, tuple(owner))
