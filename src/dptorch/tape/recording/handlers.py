"""Torch functions that are no ops: reading into Python, copying from it, hooks, backwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dptorch.errors import ConfigurationError, ExamplesMixError, NotCoveredError
from dptorch.tape.provenance.calls import each_tensor
from dptorch.tape.provenance.tags import Mixed, Order, ParamOnly, Reduced, Tag
from dptorch.tape.recording.backward_pass import run_backward
from dptorch.tape.rules.recorder import Recorder

__all__ = ["SPECIAL", "Special"]

Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]
Special = Callable[["Recorder", Callable[..., Any], str, Args, Kwargs], Any]

SPECIAL: dict[str, Special] = {}


def _special(names: str) -> Callable[[Special], Special]:
    def add(function: Special) -> Special:
        for name in names.split():
            SPECIAL[name] = function
        return function

    return add


@_special("item tolist numpy __float__ __array__")
def read(
    recording: Recorder, func: Callable[..., Any], name: str, args: Args, kwargs: Kwargs
) -> Any:
    """Values leave for Python, where nothing can be followed; it is counted."""
    t = args[0] if args else None
    if isinstance(t, Tensor) and t.is_floating_point():
        state = recording.state(t)
        if isinstance(state, Mixed) or (isinstance(state, Tag) and recording.batch_size > 1):
            recording.escaped[name] += 1
    return func(*args, **kwargs)


@_special("tensor as_tensor asarray scalar_tensor new_tensor full new_full")
def make(
    recording: Recorder, func: Callable[..., Any], name: str, args: Args, kwargs: Kwargs
) -> Any:
    """A new tensor, usually from numbers; one made from a tensor keeps its examples."""
    out = func(*args, **kwargs)
    position = 1 if name in ("new_tensor", "full") else 2 if name == "new_full" else 0
    keyword = "fill_value" if "full" in name else "s" if name == "scalar_tensor" else "data"
    source = args[position] if len(args) > position else kwargs.get(keyword, kwargs.get("obj"))
    if isinstance(source, Tensor):
        state = recording.state(source)
        if isinstance(state, Tag) and out.shape != source.shape and state.dim is not None:
            state = Mixed(f"{recording.module_path()}: '{name}' copies values of the batch.")
        if isinstance(state, (Tag, Mixed)):
            recording.mark(out, state)
        elif isinstance(state, Reduced):
            recording.mark(out, recording.statistic(name))
        elif isinstance(state, ParamOnly) and out.requires_grad:
            recording.mark(out, state)
    elif isinstance(source, (list, tuple)):
        states = [recording.state(t) for t in each_tensor((source,), {})]
        if any(isinstance(s, (Tag, Mixed, Reduced)) for s in states):
            recording.mark(
                out, Mixed(f"{recording.module_path()}: '{name}' copies values of the batch.")
            )
    return out


@_special(".data= set")
def replace_data(
    recording: Recorder, func: Callable[..., Any], name: str, args: Args, kwargs: Kwargs
) -> Any:
    """``x.data = y`` and ``x.set_(y)``: x now holds y's examples."""
    source = next((t for t in args[1:] if isinstance(t, Tensor)), None)
    state = None if source is None else recording.state(source)
    before = recording.state(args[0])
    out = func(*args, **kwargs)
    if isinstance(state, Reduced):
        state = recording.statistic(name)
    if isinstance(state, (Tag, Mixed)) and state != before:
        if args[0].requires_grad and args[0].is_leaf:
            raise NotCoveredError(
                f"{recording.module_path()}: {recording.describe(args[0])} is overwritten with "
                "values of the batch, outside the noised step."
            )
        if args[0].requires_grad and before is not None and isinstance(state, Tag):
            state = Mixed(
                f"{recording.module_path()}: other examples are put into a tensor behind the back of "
                "autograd."
            )
        recording.mark_written(args[0], before, state)
    return out


@_special("register_hook")
def register_hook(
    recording: Recorder, func: Callable[..., Any], name: str, args: Args, kwargs: Kwargs
) -> Any:
    """A hook that changes a gradient must keep each example's to itself."""
    t, hook = args[0], args[1] if len(args) > 1 else kwargs["hook"]
    state = recording.state(t)
    if not isinstance(state, Tag) or recording.batch_size == 1:
        return func(*args, **kwargs)

    def watched(g: Tensor) -> Any:
        g = g.view_as(g)
        recording.mark(g, state)
        with recording:
            changed = hook(g)
        if isinstance(changed, Tensor) and recording.state(changed) not in (state, None):
            raise ExamplesMixError(
                "a hook on a tensor of the model computes one example's gradient from others. "
                "Make it treat the examples independently, or remove it."
            )
        return changed

    return func(t, watched)


@_special("grad")
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
    create = args[4] if len(args) > 4 else kwargs.get("create_graph", False)
    own = [recording.state(t) for t in inputs]
    if create:
        raise NotCoveredError(
            f"{recording.module_path()}: torch.autograd.grad(create_graph=True) makes the loss "
            "depend on a second derivative, which the tape does not follow. For a gradient penalty "
            "take a finite difference, (model(x + h * u) - model(x)) / h, in one forward of a wrapping "
            "module."
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


@_special("backward")
def backward(
    recording: Recorder, func: Callable[..., Any], name: str, args: Args, kwargs: Kwargs
) -> Any:
    """``loss.backward()``: look at what kind of loss it is first.

    Raises:
        ConfigurationError: if the loss is neither a scalar nor one value for each example.
        ExamplesMixError: if it mixes examples.
    """
    loss = args[0]
    if not isinstance(loss, Tensor):
        return func(*args, **kwargs)
    state = recording.state(loss)
    if isinstance(state, Mixed):
        raise ExamplesMixError(state.reason)
    if isinstance(state, (Tag, Reduced)):
        if args[3:4] == (True,) or kwargs.get("create_graph"):
            raise NotCoveredError(
                "backward(create_graph=True): the tape does not follow second derivatives."
            )
        for tape in (recording.tape, *recording.joined):
            tape.note_loss(state if isinstance(state, Reduced) else None)
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


def reorder(
    recording: Recorder, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Run an op of `KEEP_ORDER`."""
    out = func(*args, **kwargs)
    if isinstance(out, Tensor):
        recording.mark(out, Order())
    return out
