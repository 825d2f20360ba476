"""Find modules that mix examples, by experiment: change one example and look at the others."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dptorch.errors import ConfigurationError, ExamplesMixError, PrivacyError, warn
from dptorch.tape.provenance.tags import Tag, owners
from dptorch.tape.recording.batch_dims import BatchDims, is_ragged, map_batched, tag_inputs
from dptorch.tape.recording.patches import patched
from dptorch.tape.recording.recording import Recording

__all__ = ["MIXES", "WAY_OUT", "find_mixing", "perturbed", "preserving_state", "refuse_mixing"]

MIXES = "changing one example changed its values for another, so no per-example gradient exists."
WAY_OUT = "Make it treat examples independently; dptorch.prepare(model) converts BatchNorm."

_EXAMPLES = 3
_SAMPLES = 4096  # values of a tensor that are compared; a mixture moves whole rows
_STRIDE = 1_000_003  # a prime: samples of a large tensor fall on all its channels and positions
# What rounding may move. Rows of other examples come from the same kernels on the same values, but a
# mixture of experts groups its tokens anew, and so picks other kernels, when one token changes.
_RELATIVE = {torch.float64: 1e-9, torch.float32: 1e-4}
_RELATIVE_HALF = 3e-2


def refuse_mixing(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], batch_dims: BatchDims
) -> bool:
    """Raise if changing one example of a batch changes what the model computes for another.

    Two forward passes on at most three examples, without gradients; see `find_mixing`. Where the
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
    if where:
        raise ExamplesMixError(
            f"{where}: {MIXES} {WAY_OUT} If this finding is wrong, pass self_check=False."
        )
    return where is not None


def find_mixing(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], batch_dims: BatchDims = 0
) -> str | None:
    """The first module that mixes examples, "" if none does, None if the batch is too small to tell.

    The model runs on a few examples, and again with the first of them replaced by a copy of the
    second. Inputs and outputs of every module are compared for the other examples, in the order in
    which they arise: a moved input is the fault of the module that passed it on, a moved output
    that of the module itself. A finding counts only if an exact repetition does not show it too.

    Guarantees:
        Random states, buffers, attributes of modules and the model's mode are as before. User hooks
        do run, and what a module appends to a list of its own stays there.

    Raises:
        ConfigurationError, PrivacyError: where the recording refuses the inputs.
    """
    model = _unwrapped(model)
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
    plain, other, changed = perturbed(model, args, kwargs, batch_dims, count)
    if not changed:
        return None

    def run(inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> list[_Seen]:
        with torch.set_grad_enabled(grad), preserving_state(model), _frozen(model):
            return _watch(model, *inputs, batch_dims)

    before = run(plain)
    place = _first_moved(before, run(other))
    if place is None:
        return ""
    again, _, _ = perturbed(model, args, kwargs, batch_dims, count)
    noise = _first_moved(before, run(again))
    if noise is not None and noise <= place:
        return ""  # the model does not repeat itself: no evidence of mixing
    return before[place].blame


def perturbed(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    batch_dims: BatchDims,
    count: int,
) -> tuple[tuple[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]], bool]:
    """The first `count` examples; the same with the first replaced by the second; do they differ?"""
    changed = False

    def keep(t: Tensor, dim: int) -> Tensor:
        return t.detach().narrow(dim, 0, count).clone()

    def change(t: Tensor, dim: int) -> Tensor:
        nonlocal changed
        t = keep(t, dim)
        if count > 1:
            first, second = t.select(dim, 0), t.select(dim, 1)
            changed = changed or not torch.equal(first, second)
            first.copy_(second)
        return t

    plain = map_batched(keep, model, args, kwargs, batch_dims)
    return plain, map_batched(change, model, args, kwargs, batch_dims), changed


class _Seen(NamedTuple):
    """Values of examples other than the first in one tensor that went into or came out of a module.

    Where it is not known which dimension holds the examples there is one alternative for each that
    could; all must have moved.
    """

    blame: str
    alternatives: list[Tensor]
    relative: float


def _watch(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batch_dims: BatchDims
) -> list[_Seen]:
    """Run the model and sample what goes in and out of every module."""
    recording = Recording(model, {})
    seen: list[_Seen] = []
    running: list[str] = []

    def sample(value: Any, blame: str) -> None:
        for t in tree_leaves(value):
            if isinstance(t, Tensor) and t.is_floating_point() and _is_plain(t) and t.numel():
                alternatives = _samples(t, recording)
                if alternatives:
                    relative = _RELATIVE.get(t.dtype, _RELATIVE_HALF)
                    seen.append(_Seen(blame, alternatives, relative))

    def before(label: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            sample((args, kwargs), running[-1] if running else label)
            running.append(label)

        return hook

    def after(label: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            running.pop()
            sample(output, label)

        return hook

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            label = _label(name, module)
            for handle in (
                module.register_forward_pre_hook(before(label), with_kwargs=True),
                module.register_forward_hook(after(label)),
            ):
                stack.callback(handle.remove)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # the real forward pass gives them again
        if any(_is_compiled(m) for m in model.modules()):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        args, kwargs = tag_inputs(recording, recording.tag_batch, model, args, kwargs, batch_dims)
        stack.enter_context(patched())
        stack.enter_context(recording)
        model(*args, **kwargs)
    return seen


def _label(name: str, module: nn.Module) -> str:
    name = name.removeprefix("_orig_mod.").replace("._orig_mod", "")
    kind = type(getattr(module, "_orig_mod", module)).__name__
    return f"module '{name}' ({kind})" if name not in ("", "_orig_mod") else f"the model ({kind})"


def _samples(t: Tensor, recording: Recording) -> list[Tensor]:
    state = recording.state(t)
    count = recording.batch_size
    with torch._C.DisableTorchFunction():
        if isinstance(state, Tag):
            if state.dim is None:
                return [_sample(t, 0, None)] if state.step != 0 else []
            return [_sample(t, state.dim, owners(state, t.shape[state.dim], count, t.device))]
        plain = torch.arange(count, device=t.device)
        return [_sample(t, d, plain) for d in range(t.dim()) if t.shape[d] == count]


def _sample(t: Tensor, dim: int, owner: Tensor | None) -> Tensor:
    """Up to `_SAMPLES` values that do not belong to example 0, in float64 on the CPU."""
    flat = t.detach().reshape(-1)
    n = flat.numel()
    index = torch.arange(min(n, _SAMPLES), device=t.device)
    if n > _SAMPLES:
        index = index * _STRIDE % n
    if owner is not None:
        inner = 1
        for size in t.shape[dim + 1 :]:
            inner *= size
        index = index[owner[index // inner % t.shape[dim]] != 0]
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


def _unwrapped(model: nn.Module) -> nn.Module:
    """Without DataParallel and DDP: ranks differ in their number of examples, and a rank that has
    too few to check must not leave the others waiting in a collective."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return model.module if isinstance(model, parallel) else model


def _is_compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def _is_plain(t: Tensor) -> bool:
    return t.layout == torch.strided and not t.is_nested and not t.is_quantized


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


@contextmanager
def preserving_state(model: nn.Module) -> Iterator[None]:
    """Random states, buffers and attributes of the model's modules are restored on the way out."""
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    tables = [m.__dict__ for m in modules]
    tables += [m.__dict__[k] for m in modules for k in ("_parameters", "_buffers", "_modules")]
    contents = [dict(table) for table in tables]
    values = [v for table in contents for v in table.values()]
    tensors = [
        (t, t.detach().clone())
        for t in {id(v): v for v in values if isinstance(v, Tensor)}.values()
        if not isinstance(t, nn.Parameter) and _is_plain(t)
    ]
    generators = [(g, g.get_state()) for g in values if isinstance(g, torch.Generator)]
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    everything = [*model.parameters(), *model.buffers()]
    cuda = {t.device.index for t in everything if t.device.type == "cuda"}
    try:
        with torch.random.fork_rng(sorted(i for i in cuda if i is not None)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        for generator, state in generators:
            generator.set_state(state)
        for table, content in zip(tables, contents, strict=True):
            table.clear()
            table.update(content)
        with torch.no_grad(), torch._C.DisableTorchFunction():
            for t, value in tensors:
                if not torch.equal(t, value):  # unchanged ones keep their version
                    t.copy_(value)
