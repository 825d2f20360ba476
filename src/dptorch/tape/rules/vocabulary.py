"""The cross-entropy of a layer over many classes, such as the words of a language model.

Logits are [B, T, V]. Here some columns of them are in memory at once, in the forward, in the backward,
for norms and for the clipped sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from dptorch.errors import NotCoveredError
from dptorch.tape.gradients import Dense, PerExampleGradient
from dptorch.tape.provenance.calls import Call
from dptorch.tape.provenance.tags import Tag
from dptorch.tape.rules.recorder import Recorder
from dptorch.tape.rules.registry import rule

if TYPE_CHECKING:
    from dptorch.tape.gradients.softmax_outer import Logits, SoftmaxOuter

__all__ = ["summed_cross_entropy"]

_IGNORED = -100


def summed_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, columns: int
) -> Tensor:
    """Return each row's cross-entropy of ``hidden @ weight.T + bias``, summed over positions, [B].

    Args:
        hidden: [B, T, H].
        weight, bias: of the layer, [V, H] and [V].
        labels: int64 [B, T]; -100 does not count.
        columns: how many of the V classes have their logits in memory at once.

    Raises:
        IndexError: a label is neither a class nor -100.

    Guarantees:
        Under the tape every row's gradients of `weight`, `bias` and `hidden` are those of
        `torch.nn.functional.cross_entropy` on all logits.
        Held by `test_a_trained_head_is_the_loop_over_single_examples`.

    Example:
        >>> hidden, weight = torch.ones(1, 3, 2), torch.zeros(4, 2)
        >>> summed_cross_entropy(hidden, weight, None, torch.tensor([[0, 1, -100]]), 3)
        tensor([2.7726])
    """
    given = (hidden, weight, bias, labels)
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    if trained and has_torch_function(given):
        found: Tensor = handle_torch_function(
            summed_cross_entropy, given, hidden, weight, bias, labels, columns
        )
        return found
    # Without a recording, or a layer that is trained: plain operations on all logits.
    logits = torch.nn.functional.linear(hidden.to(weight.dtype), weight, bias)
    return torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), labels, reduction="none", ignore_index=_IGNORED
    ).sum(1)


@dataclass(frozen=True, eq=False)
class _Written:
    """Forward and backward, as `dptorch.tape.rules.recorder.WrittenOut`."""

    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    columns: int
    want_bias: bool

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def _logits(self, hidden: Tensor) -> Logits:
        from dptorch.tape.gradients.softmax_outer import Logits

        # In half precision a sum of exponentials over many classes would stop growing.
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        counts = self.labels != _IGNORED
        return Logits(
            hidden.to(dtype),
            self.weight.to(dtype),
            None if self.bias is None else self.bias.to(dtype),
            self.labels.clamp(min=0),
            counts.to(dtype),
            hidden.new_full(hidden.shape[:2], float("-inf"), dtype=dtype),
            self.columns,
        )

    def forward(self, *inputs: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        logits = self._logits(inputs[0])
        normaliser = logits.normaliser
        at_label = torch.zeros_like(normaliser)
        for start in logits.starts():
            part = logits.part(start)
            # It begins at log 0, and is joined in logarithms: logits of any size do not overflow.
            normaliser = torch.logaddexp(normaliser, part.logsumexp(2))
            at = logits.labels - start
            inside = (at >= 0) & (at < part.shape[2])
            picked = part.gather(2, at.clamp(0, part.shape[2] - 1)[..., None])[..., 0]
            at_label = torch.where(inside, picked, at_label)
        losses = torch.where(logits.scale > 0, normaliser - at_label, 0.0).sum(1)
        return (losses,), (inputs[0], normaliser)

    def backward(
        self, grads: Sequence[Tensor | None], saved: tuple[Tensor, ...], *, wants_inputs: bool
    ) -> tuple[tuple[Tensor | None, ...], tuple[SoftmaxOuter, Tensor | None]]:
        from dptorch.tape.gradients.softmax_outer import SoftmaxOuter

        assert grads[0] is not None
        hidden, normaliser = (t.detach() for t in saved)
        # The logits are computed again, from what takes H + 1 numbers a position instead of V.
        logits = self._logits(hidden)
        logits = replace(
            logits,
            normaliser=normaliser,
            scale=logits.scale * grads[0].to(normaliser.dtype)[:, None],
        )
        at_hidden = torch.zeros_like(logits.hidden)
        squares = torch.zeros_like(normaliser)
        biases = []
        for start, left in logits.gradients():
            at_hidden += left @ logits.weight[start : start + left.shape[2]]
            # Taken while the factor is in memory: the form would compute all logits again for them.
            squares += left.square().sum(2)
            if self.want_bias:
                biases.append(left.sum(1))
        at_bias = torch.cat(biases, 1) if biases else None
        form = SoftmaxOuter(logits, squares.sqrt())
        return (at_hidden.to(hidden.dtype) if wants_inputs else None,), (form, at_bias)


@rule(f"{__name__}.{summed_cross_entropy.__qualname__}")
def trained_layer(call: Call, recording: Recorder) -> Any:
    """Of a layer that is trained."""
    hidden, weight, bias = call.arg("hidden"), call.arg("weight"), call.arg("bias")
    labels = call.arg("labels")
    rows_first = Tag(0)
    if call.tag_of(hidden) != rows_first or call.tag_of(labels) not in (rows_first, None):
        raise NotCoveredError(
            "summed_cross_entropy: expected hidden states [B, T, H] and labels [B, T] with an example "
            "in each row."
        )
    classes = weight.shape[0]
    outside = labels[(labels != _IGNORED) & ((labels < 0) | (labels >= classes))]
    if outside.numel():  # as torch does: below, it would be trained as another class or as none
        raise IndexError(
            f"labels hold {int(outside[0])}: expected classes from 0 to {classes - 1}, or {_IGNORED} "
            "at positions that do not count."
        )
    want_weight = call.is_parameter(weight)
    want_bias = bias is not None and call.is_parameter(bias)
    op = _Written(
        weight.detach(),
        None if bias is None else bias.detach(),
        labels.detach(),
        call.arg("columns"),
        want_bias,
    )

    def gradients(
        inner: tuple[SoftmaxOuter, Tensor | None],
    ) -> Iterator[tuple[Tensor, PerExampleGradient]]:
        form, at_bias = inner
        if want_weight:
            yield weight, form
        if at_bias is not None:
            assert bias is not None
            yield bias, Dense(at_bias)

    losses = recording.tap_inside(op, [hidden], gradients)[0]
    recording.mark(losses, rows_first)
    return losses
