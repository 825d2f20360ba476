"""Find modules that mix examples, by experiment: change one example and look at the others."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dptorch.errors import ConfigurationError, ExamplesMixError, PrivacyError, warn
from dptorch.tape.provenance.tags import Tag, owners
from dptorch.tape.recording.batch_dims import BatchDims, is_ragged, map_batched, tag_inputs
from dptorch.tape.recording.compiled import uncompiled
from dptorch.tape.recording.patches import patched
from dptorch.tape.recording.recording import Recording
from dptorch.validation.backward_mixing import find_backward_mixing
from dptorch.validation.placing import find_place_dependence
from dptorch.validation.reruns import (
    is_plain,
    perturbed,
    preserving_state,
    sampling_modules,
    unwrapped,
)

__all__ = [
    "MIXES",
    "WAY_OUT",
    "find_mixing",
    "first_batch_checks",
    "refuse_backward_mixing",
    "refuse_mixing",
    "refuse_places",
]

MIXES = "changing one example changed its values for another, so no per-example gradient exists."
WAY_OUT = "Make it treat examples independently; dptorch.prepare(model) converts BatchNorm."

_EXAMPLES = 3
_LARGE = 1e4  # what the last example is multiplied by, once
_SAMPLES = 4096  # values of a tensor that are compared; a mixture moves whole rows
_STRIDE = 1_000_003  # a prime: samples of a large tensor fall on all its channels and positions
# What rounding may move. Rows of other examples come from the same kernels on the same values, but a
# mixture of experts groups its tokens anew, and so picks other kernels, when one token changes.
_RELATIVE = {torch.float64: 1e-9, torch.float32: 1e-4}
_RELATIVE_HALF = 3e-2


def refuse_mixing(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    batch_dims: BatchDims,
) -> bool:
    """Raise if changing one example of a batch changes what the model computes for another.

    Five forward passes on at most three examples, without gradients; see `find_mixing`. Where the
    model cannot be run so, warn.

    Returns:
        False if the batch held too few different examples to tell.

    Raises:
        ExamplesMixError: naming the first module at fault.
    """
    if is_ragged(args, kwargs, batch_dims):
        return True  # its examples cannot be exchanged one for another
    try:
        where = find_mixing(model, args, kwargs, batch_dims)
    except (PrivacyError, ConfigurationError):
        return True  # the recording of the real forward pass, next, raises it in its own words
    except Exception as error:
        warn(
            f"whether the model mixes examples was not checked: running it a second time failed "
            f"({type(error).__name__}: {error}). What a recording sees is checked all the same."
        )
        return True
    if where and not _is_refused(model, args, kwargs, batch_dims):
        raise ExamplesMixError(
            f"{where}: {MIXES} {WAY_OUT} If this finding is wrong, pass self_check=False."
        )
    return where is not None


def _is_refused(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], batch_dims: BatchDims
) -> bool:
    """Whether the recording of the real forward pass, next, raises it and can name the line."""
    model = unwrapped(model)
    plain, _, _ = perturbed(model, args, kwargs, batch_dims, 2)
    try:
        with torch.no_grad(), preserving_state(model):
            _watch(model, *plain, batch_dims, is_probe=True)
    except PrivacyError:
        return True
    except Exception:
        return False
    return False


def refuse_backward_mixing(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    batch_dims: BatchDims,
    parameters: Mapping[str, Tensor],
) -> bool:
    """Raise if the model's backward computes one example's gradient from others.

    Three forward and backward passes on at most three examples; see `find_backward_mixing`.

    Returns:
        False if the batch held too few examples to tell.

    Raises:
        ExamplesMixError: if it does.
    """
    try:
        found = find_backward_mixing(model, args, kwargs, batch_dims, parameters)
    except Exception:
        return True  # the forward pass, next, raises it or has been warned of
    if found:
        raise ExamplesMixError(
            "changing what one example sends backwards through the model, or the number of examples, "
            "changed the gradient of another. A hook, a custom autograd.Function or a factor mixes "
            "them, so no per-example gradient exists. Remove it, or make it treat examples "
            "independently. If this finding is wrong, pass self_check=False."
        )
    return found is not None


def refuse_places(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    batch_dims: BatchDims,
) -> bool:
    """Raise if what the model computes for an example depends on its place or the number of examples.

    Four forward passes without gradients, three of them on the whole batch; see
    `dptorch.validation.placing.find_place_dependence`.

    Returns:
        False if the batch held too few examples to tell.

    Raises:
        ExamplesMixError: naming the first module at fault.
    """
    if is_ragged(args, kwargs, batch_dims):
        return True
    try:
        found = find_place_dependence(model, args, kwargs, batch_dims)
    except Exception:
        return True  # the forward pass, next, raises it or has been warned of
    if found and not _is_refused(model, args, kwargs, batch_dims):
        raise ExamplesMixError(
            f"{found} It then depends on the other examples, and no gradient shows it. Compute each "
            "example from its own row alone. If this finding is wrong, pass self_check=False."
        )
    return found is not None


def first_batch_checks(
    model: nn.Module, batch_dims: BatchDims, parameters: Mapping[str, Tensor]
) -> list[Callable[[tuple[Any, ...], dict[str, Any]], bool]]:
    """What an engine asks of the arguments of its model's first forward passes, until it is True."""
    from dptorch.validation.widths import WidthCheck

    return [
        partial(refuse_mixing, model, batch_dims=batch_dims),
        partial(refuse_places, model, batch_dims=batch_dims),
        partial(refuse_backward_mixing, model, batch_dims=batch_dims, parameters=parameters),
        WidthCheck(model, batch_dims),
    ]


def find_mixing(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], batch_dims: BatchDims = 0
) -> str | None:
    """The first module that mixes examples, "" if none does, None if the batch is too small to tell.

    The model runs on a few examples, and again with the first, and with the last, of them replaced
    by a copy of its neighbour, and with the last ten thousand times as large. Inputs and outputs of
    every module are compared for the other examples, in the order in which they arise: a moved input
    is the fault of the module that passed it on, a moved output that of the module itself. A finding
    counts only if an exact repetition does not show it too.

    Guarantees:
        Random states, buffers, attributes of modules and the model's mode are as before. User hooks
        do run, and what a module appends to a list of its own stays there.
        Held by `test_state_and_random_numbers_are_restored_and_raise_no_alarm`.

    Raises:
        ConfigurationError, PrivacyError: where the recording refuses the inputs.
    """
    model = unwrapped(model)
    sizes: set[int] = set()

    def note(t: Tensor, dim: int) -> Tensor:
        sizes.add(t.shape[dim])
        return t

    map_batched(note, model, args, kwargs, batch_dims)
    if len(sizes) != 1:
        return "" if sizes else None  # not one batch: the recording says what is wrong
    size = sizes.pop()
    # Fewer examples fail where an argument that is no tensor speaks of all of them (a list of
    # lengths), a run without gradients where the model itself differentiates.
    few = min(size, _EXAMPLES)
    first: Exception | None = None
    for count, grad in [(few, False), (few, True), (size, False), (size, True)]:
        try:
            return _compare(model, args, kwargs, batch_dims, count, grad)
        except Exception as error:
            first = first or error
    assert first is not None
    raise first


def _compare(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    batch_dims: BatchDims,
    count: int,
    grad: bool,
) -> str | None:
    found = None
    for row in dict.fromkeys((0, count - 1)):
        here = _compare_row(model, args, kwargs, batch_dims, count, grad, row)
        if here:
            return here
        found = here if found is None else found
    return found


def _compare_row(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    batch_dims: BatchDims,
    count: int,
    grad: bool,
    row: int,
) -> str | None:
    """`find_mixing` for changes of one row; None if there is nothing to change it to."""
    plain, other, changed = perturbed(model, args, kwargs, batch_dims, count, row)
    if not changed:
        return None

    def run(inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> list[_Seen]:
        with torch.set_grad_enabled(grad), preserving_state(model), _frozen(model):
            return _watch(model, *inputs, batch_dims, row)

    before = run(plain)
    place = _first_moved(before, run(other))
    if place is None and row:  # one of the two is enough for what only a large example sets off
        _, large, changed = perturbed(model, args, kwargs, batch_dims, count, row, _LARGE)
        with suppress(Exception):  # a model may refuse it
            place = _first_moved(before, run(large)) if changed else None
    if place is None:
        return ""
    again, _, _ = perturbed(model, args, kwargs, batch_dims, count, row)
    noise = _first_moved(before, run(again))
    if noise is not None and noise <= place:
        return ""  # the model does not repeat itself: no evidence of mixing
    return before[place].blame


class _Seen(NamedTuple):
    """Values of the unchanged examples in one tensor that went into or came out of a module.

    Where it is not known which dimension holds the examples there is one alternative for each that
    could; all must have moved.
    """

    blame: str
    alternatives: list[Tensor]
    relative: float


def _watch(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    batch_dims: BatchDims,
    row: int = 0,
    *,
    is_probe: bool = False,
) -> list[_Seen]:
    """Run the model and sample what goes in and out of every module; `is_probe`: refuse its reads."""
    recording = Recording(model, {}, is_probe=is_probe)
    seen: list[_Seen] = []

    def sample(value: Any, blame: str) -> None:
        for t in tree_leaves(value):
            if isinstance(t, Tensor) and t.is_floating_point() and is_plain(t) and t.numel():
                alternatives = _samples(t, recording, row)
                if alternatives:
                    relative = _RELATIVE.get(t.dtype, _RELATIVE_HALF)
                    seen.append(_Seen(blame, alternatives, relative))

    with ExitStack() as stack:
        stack.enter_context(sampling_modules(model, sample))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # the real forward pass gives them again
        stack.enter_context(uncompiled())
        args, kwargs = tag_inputs(recording, recording.tag_batch, model, args, kwargs, batch_dims)
        stack.enter_context(patched())
        stack.enter_context(recording)
        model(*args, **kwargs)
    return seen


def _samples(t: Tensor, recording: Recording, row: int) -> list[Tensor]:
    state = recording.state(t)
    count = recording.batch_size
    with torch._C.DisableTorchFunction():
        if isinstance(state, Tag):
            if state.dim is None:
                return [_sample(t, 0, None, row)] if state.step != row else []
            own = owners(state, t.shape[state.dim], count, t.device)
            return [_sample(t, state.dim, own, row)]
        plain = torch.arange(count, device=t.device)
        return [_sample(t, d, plain, row) for d in range(t.dim()) if t.shape[d] == count]


def _sample(t: Tensor, dim: int, owner: Tensor | None, row: int) -> Tensor:
    """Up to `_SAMPLES` values that do not belong to example `row`, in float64 on the CPU."""
    flat = t.detach().reshape(-1)
    n = flat.numel()
    index = torch.arange(min(n, _SAMPLES), device=t.device)
    if n > _SAMPLES:
        index = index * _STRIDE % n
    if owner is not None:
        inner = 1
        for size in t.shape[dim + 1 :]:
            inner *= size
        index = index[owner[index // inner % t.shape[dim]] != row]
    return flat[index].double().cpu()


def _first_moved(before: list[_Seen], after: list[_Seen]) -> int | None:
    for i, (a, b) in enumerate(zip(before, after, strict=False)):
        if a.blame != b.blame or len(a.alternatives) != len(b.alternatives):
            return None  # the model took another path: what follows cannot be compared
        pairs = zip(a.alternatives, b.alternatives, strict=True)
        if all(_moved(x, y, a.relative) for x, y in pairs):
            return i
    return None


def _moved(a: Tensor, b: Tensor, relative: float) -> bool:
    if a.shape != b.shape or not a.numel():
        return False
    usual = a.isfinite() & (a.abs() < 1e30)  # masks are filled with the lowest number
    if bool((usual != (b.isfinite() & (b.abs() < 1e30))).any()):
        return True
    a, b = a[usual], b[usual]
    if not a.numel():
        return False
    return bool((a - b).abs().max() > relative * a.abs().max().clamp(min=1e-12))


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in trainable:
            p.requires_grad_(False)
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)
