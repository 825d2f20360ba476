"""Scales and shifts of layer, group, instance, RMS and (frozen) batch normalisation.

The gradient of the scale is the output gradient times the normalised input, summed over whatever
the scale is broadcast over. The normalised input is not kept: layer and group norms save each row's
mean and inverse deviation, which is all it takes; the others normalise again in the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dptorch.errors import ExamplesMixError
from dptorch.tape.gradients import Dense, PerExampleGradient
from dptorch.tape.provenance.calls import Call
from dptorch.tape.provenance.tags import Tag, rows
from dptorch.tape.rules.recorder import Recorder
from dptorch.tape.rules.registry import detached, rule


def _record(
    call: Call,
    recording: Recorder,
    x: Tensor,
    tag: Tag,
    weight: Tensor | None,
    bias: Tensor | None,
    normalise: Callable[[Tensor], Tensor],
    per_example: Callable[[Tensor], Tensor],
) -> Any:
    """Tap a normalisation that does not return its statistics.

    `normalise` and `per_example` live as long as the graph: they must not hold `call`, whose arguments
    would live as long.
    """
    out = call.run({id(t): t.detach() for t in call.parameters})
    want_w = weight is not None and call.is_parameter(weight)
    want_b = bias is not None and call.is_parameter(bias)

    def gradients(
        grads: Sequence[Tensor | None], saved: Sequence[Tensor]
    ) -> Iterator[tuple[Tensor, PerExampleGradient]]:
        g = grads[0]
        assert g is not None
        if want_w:
            assert weight is not None
            yield weight, Dense(per_example(g * normalise(saved[0])))
        if want_b:
            assert bias is not None
            yield bias, Dense(per_example(g))

    return recording.tap(call, out, [tag], (x.detach(),) if want_w else (), gradients)


def _saves_statistics(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the native op, which returns its statistics, does what the functional one does: autocast
    and mixed precision are left to the latter."""
    if torch.is_autocast_enabled(x.device.type):
        return False
    return all(t is None or t.dtype == x.dtype for t in others) and x.dtype in _FULL


_FULL = (torch.float32, torch.float64)


@rule("layer_norm rms_norm")
def last_dims(call: Call, recording: Recorder) -> Any:
    """LayerNorm and RMSNorm: the scale has the shape of the last dimensions."""
    x, shape, weight = call.arg("input"), call.arg("normalized_shape"), call.arg("weight")
    layer = call.name == "layer_norm"
    bias = call.arg("bias") if layer else None
    eps = call.arg("eps", 1e-5 if layer else None)
    tag, n = call.tag_of(x), call.batch_size
    inner = len(shape)
    if tag is None or len(call.tagged) > 1:
        return NotImplemented
    if tag.dim is not None and tag.dim >= x.dim() - inner:
        return NotImplemented

    if layer and weight is not None and inner == 1 and _saves_statistics(x, weight, bias):
        return _layer_norm(call, recording, x, tag, weight, bias, shape, eps)

    def normalise(a: Tensor) -> Tensor:
        return F.layer_norm(a, shape, None, None, eps) if layer else F.rms_norm(a, shape, None, eps)

    def per_example(t: Tensor) -> Tensor:
        return rows(t, tag, n).flatten(1, -1 - inner).sum(1)

    return _record(call, recording, x, tag, weight, bias, normalise, per_example)


def _layer_norm(
    call: Call,
    recording: Recorder,
    x: Tensor,
    tag: Tag,
    weight: Tensor,
    bias: Tensor | None,
    shape: Sequence[int],
    eps: float,
) -> Any:
    n = call.batch_size
    want_w, want_b = call.is_parameter(weight), bias is not None and call.is_parameter(bias)
    out, mean, rstd = torch.native_layer_norm(x, shape, detached(weight), detached(bias), eps)

    def gradients(
        grads: Sequence[Tensor | None], saved: Sequence[Tensor]
    ) -> Iterator[tuple[Tensor, PerExampleGradient]]:
        assert grads[0] is not None
        g_BTD = rows(grads[0], tag, n).flatten(1, -2)
        if want_w:
            from dptorch.tape.gradients.norm_sums import norm_sums

            shift, scale = norm_sums(g_BTD, *(rows(t, tag, n).flatten(1, -2) for t in saved))
            yield weight, Dense(scale)
        if want_b:
            assert bias is not None
            yield bias, Dense(shift if want_w else g_BTD.sum(1))

    saved = (x.detach(), mean.detach(), rstd.detach()) if want_w else ()
    return recording.tap(call, out, [tag], saved, gradients)


def _channels(t: Tensor, tag: Tag, n: int) -> Tensor:
    """Sum [B*m, C, ...] to [B, C]."""
    by_example = rows(t, tag, n)  # [B, m, C, ...]
    return by_example.sum([1, *range(3, by_example.dim())])


@rule("group_norm")
def group_norm(call: Call, recording: Recorder) -> Any:
    """GroupNorm: the scale has one value a channel."""
    x, groups = call.arg("input"), call.arg("num_groups")
    weight, bias, eps = call.arg("weight"), call.arg("bias"), call.arg("eps", 1e-5)
    tag, n = call.tag_of(x), call.batch_size
    if tag is None or tag.dim != 0 or len(call.tagged) > 1:
        return NotImplemented
    if weight is not None and x.dim() > 2 and _saves_statistics(x, weight, bias):
        return _group_norm(call, recording, x, tag, groups, weight, bias, eps)
    return _record(
        call,
        recording,
        x,
        tag,
        weight,
        bias,
        lambda a: F.group_norm(a, groups, None, None, eps),
        lambda t: _channels(t, tag, n),
    )


def _group_norm(
    call: Call,
    recording: Recorder,
    x: Tensor,
    tag: Tag,
    groups: int,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
) -> Any:
    n, (images, channels) = call.batch_size, x.shape[:2]
    want_w, want_b = call.is_parameter(weight), bias is not None and call.is_parameter(bias)
    out, mean, rstd = torch.native_group_norm(
        x, detached(weight), detached(bias), images, channels, x[0, 0].numel(), groups, eps
    )

    def gradients(
        grads: Sequence[Tensor | None], saved: Sequence[Tensor]
    ) -> Iterator[tuple[Tensor, PerExampleGradient]]:
        assert grads[0] is not None
        g = grads[0].flatten(2)  # [B * m, C, positions]
        if want_w and _one_pass(g, saved):
            scaled, total = _scale_and_shift(g, groups, *saved)
        else:
            total = g.sum(2)
            if want_w:
                # rstd * (sum g x - mean * sum g), of each channel
                x, mean, rstd = saved
                mean, rstd = (t.repeat_interleave(channels // groups, 1) for t in (mean, rstd))
                scaled = rstd * ((g * x.flatten(2)).sum(2) - mean * total)
        if want_w:
            yield weight, Dense(rows(scaled, tag, n).sum(1))
        if want_b:
            assert bias is not None
            yield bias, Dense(rows(total, tag, n).sum(1))

    saved = (x.detach(), mean.detach(), rstd.detach()) if want_w else ()
    return recording.tap(call, out, [tag], saved, gradients)


def _one_pass(g: Tensor, saved: Sequence[Tensor]) -> bool:
    """Whether the native backward can be asked; on other devices it has not been tried."""
    if g.device.type != "cpu" or g.dtype not in (torch.float32, torch.float64):
        return False
    return all(t.dtype == g.dtype for t in saved)


def _scale_and_shift(
    g: Tensor, groups: int, x: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of scale and shift of each image, [images, C] each, without products of their size.

    By the native backward, which adds up over images; so it is told that all of their channels belong
    to one image.
    """
    images, channels, positions = g.shape
    g, x, mean, rstd = (t.contiguous().view(1, -1) for t in (g, x, mean, rstd))
    shape = (1, images * channels, positions)
    _, scale, shift = torch.ops.aten.native_group_norm_backward(
        g.view(shape),
        x.view(shape),
        mean,
        rstd,
        g.new_ones(1).expand(images * channels),  # only that it is there matters
        *shape,
        images * groups,
        [False, True, True],
    )
    return scale.view(images, channels), shift.view(images, channels)


@rule("instance_norm")
def instance_norm(call: Call, recording: Recorder) -> Any:
    """InstanceNorm without running statistics.

    Raises:
        ExamplesMixError: if it tracks running statistics, which average over the batch.
    """
    x, mean, var = call.arg("input"), call.arg("running_mean"), call.arg("running_var")
    weight, bias = call.arg("weight"), call.arg("bias")
    from_input, eps = call.arg("use_input_stats", True), call.arg("eps", 1e-5)
    if mean is not None and from_input:
        raise ExamplesMixError(
            f"{recording.module_path()}: InstanceNorm updates running statistics from the whole "
            "batch. Set track_running_stats=False."
        )
    tag, n = call.tag_of(x), call.batch_size
    if tag is None or tag.dim != 0 or len(call.tagged) > 1:
        return NotImplemented
    return _record(
        call,
        recording,
        x,
        tag,
        weight,
        bias,
        lambda a: F.instance_norm(a, mean, var, None, None, from_input, 0.0, eps),
        lambda t: _channels(t, tag, n),
    )


@rule("batch_norm")
def batch_norm(call: Call, recording: Recorder) -> Any:
    """BatchNorm in eval mode: a fixed affine map.

    Raises:
        ExamplesMixError: in training mode, naming the module.
    """
    refuse_batch_statistics(call, recording)
    x, mean, var = call.arg("input"), call.arg("running_mean"), call.arg("running_var")
    weight, bias, eps = call.arg("weight"), call.arg("bias"), call.arg("eps", 1e-5)
    tag, n = call.tag_of(x), call.batch_size
    if tag is None or tag.dim != 0 or len(call.tagged) > 1:
        return NotImplemented

    def normalise(a: Tensor) -> Tensor:
        return F.batch_norm(a, mean, var, None, None, False, 0.0, eps)

    return _record(
        call,
        recording,
        x,
        tag,
        weight,
        bias,
        normalise,
        lambda t: _channels(t, tag, n),
    )


def refuse_batch_statistics(call: Call, recording: Recorder) -> None:
    """Raise if this BatchNorm would take its statistics from the batch."""
    if call.arg("training", False) or call.arg("running_mean") is None:
        raise ExamplesMixError(
            f"{recording.module_path()}: BatchNorm in training mode normalises each example with "
            "statistics of the whole batch, so no per-example gradient exists. Convert the model "
            "with dptorch.prepare(model) (BatchNorm becomes GroupNorm), or put this module in eval "
            "mode to use its running statistics."
        )
