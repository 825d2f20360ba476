"""Layers without a trainable parameter of their own, and frozen ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dptorch.tape.propagation.elementwise import along_broadcast, refuse_positions
from dptorch.tape.propagation.table import Found, agree, family, only_tag
from dptorch.tape.provenance.calls import Call
from dptorch.tape.provenance.tags import Lost, Tag, owners, regular_or_explicit

__all__ = ["bag_owners"]


@family("layer_norm native_layer_norm rms_norm")
def last_dims(call: Call, outputs: Sequence[Any]) -> Found:
    """Normalisation over the last dimensions."""
    x, shape = call.arg("input"), call.arg("normalized_shape")
    tag = only_tag(call, x)
    assert tag.dim is not None
    if tag.dim >= x.dim() - len(shape):
        raise Lost("normalisation over the examples")
    return tag


# Ranks at which dimension 0 is a batch dimension, where another rank would mean something else.
_RANKS = {"im2col": (4,), "fold": (3,), "col2im": (3,), "group_norm": range(2, 9)}
# Pooling without a batch dimension takes inputs of one dimension less.
_RANKS |= {
    f"{kind}pool{n}d{more}": (n + 2,)
    for kind in ("max_", "avg_", "lp_", "adaptive_avg_", "adaptive_max_", "fractional_max_")
    for n in (1, 2, 3)
    for more in ("", "_with_indices")
}


@family(
    """conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d max_pool1d max_pool2d
    max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d lp_pool1d
    lp_pool2d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices
    adaptive_max_pool2d_with_indices group_norm native_group_norm interpolate upsample fold im2col
    pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle affine_grid
    affine_grid_generator prelu local_response_norm convolution _convolution col2im
    _adaptive_avg_pool2d _adaptive_avg_pool3d upsample_nearest1d upsample_nearest2d
    upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
    upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d
    _upsample_bilinear2d_aa _upsample_bicubic2d_aa _upsample_lanczos2d_aa upsample_nearest
    upsample_bilinear multinomial"""
)
def rows_of_input(call: Call, outputs: Sequence[Any]) -> Found:
    """Ops that treat the rows of dimension 0 of their first operand independently."""
    x = call.first
    tag = only_tag(call, x)
    if tag.dim != 0:
        raise Lost("the op takes its rows from dimension 0, where the examples are not")
    if "conv" in call.name and x.dim() != call.arg("weight").dim():
        raise Lost("an unbatched convolution over the examples")
    if "pixel" in call.name and x.dim() < 4:
        raise Lost("an unbatched image")
    if x.dim() not in _RANKS.get(call.name, range(9)):
        raise Lost("an unbatched input")
    if x.dim() < 2:
        raise Lost("an unbatched input")
    return tag


@family(
    """grid_sample grid_sampler grid_sampler_2d grid_sampler_3d max_unpool1d max_unpool2d max_unpool3d
    fractional_max_pool2d fractional_max_pool2d_with_indices fractional_max_pool3d
    fractional_max_pool3d_with_indices lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell"""
)
def rows_of_inputs(call: Call, outputs: Sequence[Any]) -> Found:
    """The same for ops with several inputs; weights come after the first two."""
    values = list(call.bound.values())
    if "fractional" in call.name:
        x, noise = values[0], call.arg("_random_samples", call.arg("random_samples"))
        inputs = [x, noise]
        if x.dim() not in _RANKS[call.name.removesuffix("_with_indices")]:
            raise Lost("an unbatched input")
    else:
        # The state of an LSTM cell is a pair in second place.
        inputs = [*values[:2], *(values[1] if isinstance(values[1], (list, tuple)) else ())]
        if "unpool" in call.name and values[0].dim() != int(call.name[-2]) + 2:
            raise Lost("an unbatched input")
    for t, tag in call.tagged:
        if not any(t is other for other in inputs):
            raise Lost("a weight carries examples")
        if tag.dim != 0 or t.dim() < 2:
            raise Lost("the op takes its rows from dimension 0, where the examples are not")
    agreed = agree([tag for _, tag in call.tagged])
    if agreed.explicit is not None and any(
        isinstance(t, torch.Tensor) and call.tag_of(t) is None for t in inputs
    ):
        raise Lost("a constant with one row for each meets irregularly ordered examples")
    return agreed


@family("embedding_bag _embedding_bag _embedding_bag_forward_only")
def embedding_bag(call: Call, outputs: Sequence[Any]) -> Found | list[Found]:
    """Bags of a frozen table: rows of ids, or ids in a row and where each bag begins."""
    ids, offsets = call.arg("input", call.arg("indices")), call.arg("offsets")
    if call.tag_of(call.arg("weight")) is not None:
        raise Lost("the table carries examples")
    if any(tag.dim != 0 for _, tag in call.tagged):
        raise Lost("bags are rows of dimension 0, where the examples are not")
    if ids.dim() == 1:
        bags = outputs[0].shape[0]
        found: Found = bag_owners(call, ids, offsets, bags)
    else:
        found = agree([tag for _, tag in call.tagged])
    return [found, *[None] * (len(outputs) - 1)]


def bag_owners(call: Call, ids: torch.Tensor, offsets: torch.Tensor, bags: int) -> Tag:
    """Whose each bag of ids in a row is: its ids', and an empty one's is whose place it is.

    Raises:
        Lost: if a bag holds ids of several examples, or places and ids disagree.
    """
    n = call.batch_size
    # With include_last_offset there is one offset more than bags.
    ends = [*offsets.tolist()[1:], ids.shape[0]][:bags]
    starts = offsets.tolist()[:bags]
    by, of = call.tag_of(offsets), call.tag_of(ids)
    weights = call.tag_of(call.arg("per_sample_weights"))
    of = weights if of is None else of
    if of is None:  # where one bag ends is where the next example's begins
        raise Lost(
            "ids in a row that are not the batch's; say whose they are with batch_dims= and "
            "dptorch.tape.Ragged"
        )
    if weights is not None and weights != of:
        raise Lost("ids and their weights are of different examples")
    places = owners(by, offsets.shape[0], n).tolist() if by is not None else None
    if places is None and bags == n:
        places = list(range(n))
    own = owners(of, ids.shape[0], n).tolist()
    found = []
    for i, (start, stop) in enumerate(zip(starts, ends, strict=True)):
        inside = set(own[start:stop])
        if places is not None:
            inside.add(places[i])
        if len(inside) != 1:
            raise Lost("a bag holds ids of several examples, or none whose it is")
        found.append(inside.pop())
    return regular_or_explicit(torch.tensor(found), 0, n)


@family("instance_norm")
def instance_norm(call: Call, outputs: Sequence[Any]) -> Found:
    """Each example by itself, unless running statistics are kept."""
    if call.arg("running_mean") is not None and call.arg("use_input_stats", True):
        raise Lost("InstanceNorm updates running statistics from the whole batch")
    return rows_of_input(call, outputs)


@family(
    """batch_norm native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training
    _batch_norm_no_update"""
)
def batch_norm(call: Call, outputs: Sequence[Any]) -> list[Found]:
    """Fixed statistics only: in training mode BatchNorm mixes the examples."""
    trains = call.arg("training", call.arg("train", False))
    if trains or call.arg("running_mean") is None:
        raise Lost("BatchNorm in training mode takes its statistics from the whole batch")
    x = call.arg("input")
    tag = call.tag_of(x)
    if tag is None or len(call.tagged) > 1:
        raise Lost("the statistics carry examples")
    # Each channel has statistics of its own, so an example's place would choose its scale.
    if tag.dim == 1:
        raise Lost("the channels are the examples")
    return [tag, *[None] * (len(outputs) - 1)]


@family(
    """pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d
    replication_pad2d replication_pad3d"""
)
def padding(call: Call, outputs: Sequence[Any]) -> Found:
    """F.pad works on the last dimensions."""
    x = call.first
    tag = only_tag(call, x)
    assert tag.dim is not None
    amounts = call.arg("pad", call.arg("padding"))
    if tag.dim >= x.dim() - len(amounts) // 2:
        # Amounts begin with those of the last dimension.
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
        if not attention and not any(t is other for other in call.operands()[:2]):
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
    """A new last dimension.

    Raises:
        Lost: without a number of classes, which is then one more than the largest class of the batch.
    """
    if call.arg("num_classes", -1) == -1:
        raise Lost("the number of classes is taken from the examples; say num_classes=")
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
    x, batch_first = call.first, call.arg("batch_first")
    tag = call.tag_of(x)
    if tag is None or tag.dim != (0 if batch_first else 1):
        raise Lost("the packed sequences are not the examples")
    owner = _owner_list(tag, x.shape[tag.dim], call.batch_size)
    # Step by step: step t has a row of each of the first counts[t] sequences, which are the longest.
    packed = [owner[i] for count in outputs[1].tolist() for i in range(count)]
    return [Tag(0, 1, tuple(packed)), None]


@family("_pad_packed_sequence")
def unpack(call: Call, outputs: Sequence[Any]) -> list[Found]:
    """The inverse of `pack`."""
    data, counts = call.first, call.arg("batch_sizes")
    batch_first = call.arg("batch_first")
    tag = call.tag_of(data)
    if tag is None or tag.dim != 0:
        raise Lost("the packed sequences are not the examples")
    first = _packed_owners(tag, data, counts, call.batch_size)
    return [_from_list(first, 0 if batch_first else 1, call.batch_size), None]


@family("lstm gru rnn_tanh rnn_relu")
def recurrent(call: Call, outputs: Sequence[Any]) -> list[Found]:
    """Sequences [T, B, D] or [B, T, D], or packed; the states are [layers, B, H]."""
    x, sizes, hx = call.first, call.arg("batch_sizes"), call.arg("hx")
    tag = call.tag_of(x)
    if tag is None or tag.dim is None:
        raise Lost("the input of the recurrent layer carries no examples")
    if sizes is not None:
        first = _packed_owners(tag, x, sizes, call.batch_size)
        state = _from_list(first, 1, call.batch_size)
    elif x.dim() == 3:
        if tag.dim != (0 if call.arg("batch_first") else 1):
            raise Lost("the recurrent layer runs along the examples")
        state = tag.at(1)
    else:
        raise Lost("an unbatched recurrent layer")
    states = [hx] if isinstance(hx, torch.Tensor) else list(hx)
    for t, g in call.tagged:
        if t is not x and (g != state or not any(t is s for s in states)):
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
