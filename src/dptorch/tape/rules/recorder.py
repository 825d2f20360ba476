"""What rules and handlers may ask of the recording that calls them.

`dptorch.tape.Recording` is the one implementation. Rules are written against this protocol:
they know nothing of dispatch and can be tested against a small stand-in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from dptorch.tape.gradients import PerExampleGradient
from dptorch.tape.gradients.tape import Tape
from dptorch.tape.provenance.calls import Call
from dptorch.tape.provenance.tags import Mixed, State, Tag

__all__ = ["Gradients", "Inside", "Recorder", "WrittenOut"]

#: (gradients of the outputs, saved tensors) -> (parameter, its per-example gradient), in the backward.
Gradients = Callable[
    [Sequence[Tensor | None], Sequence[Tensor]], Iterable[tuple[Tensor, PerExampleGradient]]
]

#: what `WrittenOut.backward` found inside -> (parameter, its per-example gradient).
Inside = Callable[[Any], Iterable[tuple[Tensor, PerExampleGradient]]]


class WrittenOut(Protocol):
    """An op whose backward is written out, because gradients of parameters are taken inside it.

    Attributes:
        tensors: the weights, which must not be written to before the backward.
    """

    @property
    def tensors(self) -> tuple[Tensor, ...]: ...

    def forward(self, *inputs: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return (outputs, what is kept for the backward)."""

    def backward(
        self, grads: Sequence[Tensor | None], saved: tuple[Tensor, ...], *, wants_inputs: bool
    ) -> tuple[tuple[Tensor | None, ...], Any]:
        """Return (the gradient of each input, what the gradients of parameters are made of).

        Args:
            grads: of the outputs.
            saved: what `forward` kept.
            wants_inputs: whether the gradient of the first input is wanted.
        """


class Recorder(AbstractContextManager[Any], Protocol):
    """One recorded forward pass, as a rule sees it; entering it records what runs inside.

    Attributes:
        batch_size: number of examples B.
        tape: filled when gradients arrive.
        joined: tapes of other models whose outputs entered the same loss.
        escaped: how often trusted code read values of the batch into Python, by op and module.
        retained: activations that keep their gradient, until the model returns.
        error: the first that the forward pass met, which the model may have caught.
        strict: whether a model that is trained privately is recorded.
        refuses_reads: whether a read of a statistic of the batch is refused now.
    """

    @property
    def batch_size(self) -> int: ...

    tape: Tape
    joined: list[Tape]
    escaped: Counter[str]
    retained: list[Tensor]
    error: Exception | None
    strict: bool

    @property
    def refuses_reads(self) -> bool: ...

    def tap(
        self, call: Call, out: Any, tags: list[Tag], saved: Sequence[Tensor], gradients: Gradients
    ) -> Any:
        """Record a site with one output."""

    def tap_many(
        self,
        outputs: Sequence[Tensor],
        tags: Sequence[Tag],
        saved: Sequence[Tensor],
        gradients: Gradients,
    ) -> tuple[Tensor, ...]:
        """Record a site: `gradients` gets the outputs' gradients and `saved`, in the backward."""

    def tap_inside(
        self, op: WrittenOut, inputs: Sequence[Tensor], gradients: Inside
    ) -> tuple[Tensor, ...]:
        """Run an op with gradients inside it, whose outputs the rule marks."""

    def lift(self, p: Tensor, shape: Sequence[int], tag: Tag) -> Tensor:
        """Replace a parameter by a copy of `shape`, whose batch dimension is given by `tag`."""

    def untransposed(self, p: Tensor) -> tuple[Tensor, bool]:
        """(the parameter that `p` is the transpose of, True), or (p, False)."""

    def spend_batch(self) -> None:
        """Note that a backward goes through the forward pass."""

    def note_generic(self, call: Call) -> None:
        """Note that an op has no rule of its own."""

    def state(self, t: Tensor) -> State | None:
        """What is known of a tensor, or None for a constant."""

    def mark(self, t: Any, state: State | None) -> None:
        """Say what a tensor is."""

    def mark_written(self, t: Tensor, before: State | None, after: State | None) -> None:
        """Say what a tensor is after it was written to in place."""

    def note_trained(self, t: Tensor) -> None:
        """Say that a leaf gets the gradient of a loss of the batch and no noise."""

    def note_own_leaf(self, t: Any) -> None:
        """Note a constant that the forward pass made and lets require grad."""

    def statistic(self, name: str) -> Mixed:
        """The state of a statistic over the examples."""

    def describe(self, p: Tensor) -> str:
        """A parameter's name, for messages."""

    def module_path(self) -> str:
        """The module whose forward is running, for messages."""
