"""Handlers for ``loss.backward()``, ``x.grad`` and ``torch.autograd.grad``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dptorch.errors import ConfigurationError, ExamplesMixError, NotCoveredError
from dptorch.tape.provenance.calls import each_tensor
from dptorch.tape.provenance.tags import ONE_EXAMPLE, PER_EXAMPLE, Mixed, Reduced, Tag
from dptorch.tape.recording.backward_pass import run_backward
from dptorch.tape.recording.handlers import handler
from dptorch.tape.recording.loss_factors import factors_of
from dptorch.tape.recording.parameter_graph import marked_for_hooks, note_trained_beside
from dptorch.tape.recording.read_numbers import read_numbers
from dptorch.tape.recording.tensor_states import TRAINED, batch_of
from dptorch.tape.recording.unknown_rows import warn_of_array
from dptorch.tape.rules.recorder import Recorder

__all__ = ["backward", "differentiate", "gradient", "retain"]

Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]

_OWN_ROW = (
    "Compute each example's loss from its own row and from constants. Shapes that broadcast ([B, 1] "
    "against [B]), statistics of the batch and pairs of examples mix them. A mean over masked "
    "values is each example's own: (l * mask).sum(1) / mask.sum(1), then mean()."
)


@handler("grad")
def differentiate(
    recording: Recorder, func: Callable[..., Any], name: str, args: Args, kwargs: Kwargs
) -> Any:
    """``torch.autograd.grad`` inside a recorded model, of a loss in its inputs (an attack, a score).

    The gradient of what each example contributes in that example's rows is that example's own.

    Raises:
        NotCoveredError: for create_graph=True, and for gradients in parameters.
    """
    outputs = each_tensor(args[:1], {"outputs": kwargs.get("outputs")})
    inputs = each_tensor(args[1:2], {"inputs": kwargs.get("inputs")})
    states = [recording.state(t) for t in outputs]
    if not any(isinstance(s, (Tag, Reduced, Mixed)) for s in states):
        return func(*args, **kwargs)
    if not recording.strict:
        found = func(*args, **kwargs)
        mark_gradients(recording, found, inputs, states)
        return found
    create = args[4] if len(args) > 4 else kwargs.get("create_graph", False)
    own = [recording.state(t) for t in inputs]
    if create:
        raise NotCoveredError(
            f"{recording.module_path()}: torch.autograd.grad(create_graph=True) makes the loss "
            "depend on a second derivative, which the tape does not follow. For a gradient penalty "
            "take a finite difference, (model(x + h * u) - model(x)) / h."
        )
    if any(not isinstance(s, Tag) for s in own):
        raise NotCoveredError(
            f"{recording.module_path()}: torch.autograd.grad with respect to something else than "
            "the examples (a parameter?) inside a recorded forward pass."
        )
    if any(isinstance(s, Mixed) for s in states):
        raise ExamplesMixError(next(s.reason for s in states if isinstance(s, Mixed)))
    with recording.tape.set_aside():
        found = func(*args, **kwargs)
    for g, state in zip(found, own, strict=True):
        if g is not None:
            recording.mark(g, state)
    return found


def mark_gradients(
    recording: Recorder, found: Sequence[Tensor | None], inputs: Sequence[Tensor], states: Any
) -> None:
    """Mark the gradients of a loss of the batch that no private model is in.

    Args:
        found: one for each of `inputs`.
        states: of the losses.
    """
    lost = next((s for s in states if isinstance(s, Mixed)), None)
    for g, t in zip(found, inputs, strict=True):
        own = recording.state(t)
        if g is not None:
            recording.mark(g, (lost or own) if isinstance(own, Tag) else lost or TRAINED)


@handler(".grad")
def gradient(
    recording: Recorder, func: Callable[..., Any], name: str, args: Args, kwargs: Kwargs
) -> Any:
    """``x.grad``: row i of it is of row i of `x`, where the loss had the examples apart."""
    found, state = func(*args, **kwargs), recording.state(args[0])
    batch = batch_of(args[0])
    if isinstance(state, Tag) and batch is not None and batch.gradients is not None:
        state = batch.gradients
    if found is not None and isinstance(state, (Tag, Mixed)) and recording.state(found) is None:
        recording.mark(found, state)
    return found


@handler("retain_grad")
def retain(
    recording: Recorder, func: Callable[..., Any], name: str, args: Args, kwargs: Kwargs
) -> Any:
    """Note an activation whose gradient is wanted, so that it is followed out of the model."""
    func(*args, **kwargs)
    if type(args[0]) is Tensor:  # and is not followed already
        recording.retained.append(args[0])


@handler("backward")
def backward(
    recording: Recorder, func: Callable[..., Any], name: str, args: Args, kwargs: Kwargs
) -> Any:
    """``loss.backward()``: look at what kind of loss it is first.

    Raises:
        ConfigurationError: if the loss is neither a scalar nor one value for each example.
        ExamplesMixError: if it mixes examples.
    """
    loss = args[0]
    if not isinstance(loss, Tensor) or not recording.strict:
        beside: list[Tensor] = []
        for t in [] if recording.strict else each_tensor(args[:1], {}):
            state, batch = recording.state(t), batch_of(t)
            if t.grad_fn is not None and state is not None:
                beside += note_trained_beside(t, recording)
                if isinstance(state, Mixed) and batch is not None:
                    batch.gradients = state
        with marked_for_hooks(beside, recording):
            return func(*args, **kwargs)
    state = recording.state(loss)
    if isinstance(state, Mixed):
        raise ExamplesMixError(f"{state.reason} {_OWN_ROW}")
    weights = args[1] if len(args) > 1 else kwargs.get("gradient")
    mixed = recording.state(weights) if isinstance(weights, Tensor) else None
    if isinstance(mixed, (Mixed, Reduced)):
        reason = mixed.reason if isinstance(mixed, Mixed) else "They are reduced over the examples."
        raise ExamplesMixError(f"the weights given to backward() mix examples. {reason} {_OWN_ROW}")
    if isinstance(weights, Tensor) and mixed is None and read_numbers.filled(weights) is not None:
        raise ExamplesMixError(
            "the weights given to backward() are a number that was read from the batch (item(), "
            f"float()), or a function of it. {_OWN_ROW}"
        )
    if isinstance(state, (Tag, Reduced)):
        if args[3:4] == (True,) or kwargs.get("create_graph"):
            raise NotCoveredError(
                "backward(create_graph=True): the tape does not follow second derivatives."
            )
        batch = batch_of(loss)
        if batch is not None and batch.left:
            batch.refuse_written()
            if isinstance(weights, Tensor) and mixed is None:
                warn_of_array(weights)
        recording.spend_batch()
        for tape in (recording.tape, *recording.joined):
            tape.note_loss(_reduction(loss, state, None if isinstance(mixed, Tag) else weights))
        per_example = isinstance(state, Tag) and loss.shape == (recording.batch_size,)
        if loss.numel() != 1 and not per_example:
            raise ConfigurationError(
                f"the loss has shape {tuple(loss.shape)}; expected a scalar, or one value for "
                f"each of the {recording.batch_size} examples. Reduce it over positions first, for "
                "example loss.flatten(1).mean(1)."
            )
        if loss.numel() != 1 and len(args) < 2 and kwargs.get("gradient") is None:
            kwargs = {**kwargs, "gradient": torch.ones_like(loss)}
        return run_backward([recording.tape, *recording.joined], func, args, kwargs)
    return func(*args, **kwargs)


def _reduction(loss: Tensor, state: Tag | Reduced, weights: Any) -> Reduced:
    """How a loss is reduced; one value for each example also has factors, if they are known.

    Weights of no example are constants, and count as the largest of them.
    """
    if isinstance(state, Reduced):
        factors: tuple[float, ...] = state.factors
    else:
        factors = factors_of(loss) or ()
    if isinstance(weights, Tensor) and weights.numel():
        factors = tuple(f * float(weights.max()) for f in factors)
    if isinstance(state, Reduced):
        return Reduced(state.kind, factors)
    of_one = state.dim is None and loss.numel() == 1
    return Reduced(ONE_EXAMPLE if of_one else PER_EXAMPLE, factors)
