"""Handlers for torch functions that are not tensor ops: host reads, constructors, `Tensor.data`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from dptorch.errors import NotCoveredError
from dptorch.tape.provenance.calls import each_tensor
from dptorch.tape.provenance.tags import Mixed, Order, ParamOnly, Reduced, Tag
from dptorch.tape.recording.finite_checks import is_check, is_usual
from dptorch.tape.recording.read_numbers import read_numbers
from dptorch.tape.recording.reads import note_decision, note_read
from dptorch.tape.recording.tensor_states import batch_of
from dptorch.tape.rules.recorder import Recorder

__all__ = ["SPECIAL", "Special", "handler", "reorder"]

Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]
Special = Callable[["Recorder", Callable[..., Any], str, Args, Kwargs], Any]

SPECIAL: dict[str, Special] = {}


def handler(names: str) -> Callable[[Special], Special]:
    """Register a handler under one or more names, separated by spaces."""

    def add(function: Special) -> Special:
        for name in names.split():
            SPECIAL[name] = function
        return function

    return add


@handler(
    """item tolist numpy __float__ __array__ __bool__ __int__ __index__ __complex__ is_nonzero equal
    allclose __contains__ _local_scalar_dense __format__ __repr__ __str__
    __dlpack__ untyped_storage storage _typed_storage data_ptr __reduce_ex__ __reduce__ share_memory
    .__cuda_array_interface__ _nnz _dimI _dimV apply map map2"""
)
def read(
    recording: Recorder, func: Callable[..., Any], name: str, args: Args, kwargs: Kwargs
) -> Any:
    """Values leave for Python, where nothing can be followed: as numbers, texts or memory.

    Raises:
        ExamplesMixError: inside a forward pass or a hook; see `dptorch.tape.recording.reads`.
    """
    states = [recording.state(t) for t in each_tensor(args, kwargs)]
    usual = bool(args) and is_usual(name, args[0])
    if not usual:
        note_read(recording, name, states)
    out = func(*args, **kwargs)
    if not usual and isinstance(out, (bool, float)) and not recording.refuses_reads:
        note_decision(name, states, out, of_finiteness=is_check(args[0]))
    batch = batch_of(args[0]) if args and isinstance(args[0], Tensor) else None
    if batch is not None and isinstance(out, float):
        read_numbers.note(out, states[0], batch)
    elif batch is not None and name in _LEAVING:
        batch.note_leaving(args[0], states[0])
    return out


_LEAVING = ("numpy", "tolist", "__array__", "__dlpack__")


@handler("_assert_async")
def assertion(
    recording: Recorder, func: Callable[..., Any], name: str, args: Args, kwargs: Kwargs
) -> Any:
    """It returns nothing; that it failed is noted as any other error."""
    return func(*args, **kwargs)


@handler("tensor as_tensor asarray scalar_tensor new_tensor full new_full")
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
    recording.note_own_leaf(out)
    return out


@handler(".data= set")
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
        if args[0].requires_grad and args[0].is_leaf and recording.strict:
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


def reorder(
    recording: Recorder, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Run an op of `KEEP_ORDER`."""
    out = func(*args, **kwargs)
    if isinstance(out, Tensor):
        recording.mark(out, Order())
    return out
