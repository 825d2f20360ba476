"""Run a model once more, on changed examples, and leave no trace."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dptorch.tape.recording.batch_dims import BatchDims, map_batched

__all__ = ["is_plain", "perturbed", "preserving_state", "sampling_modules", "unwrapped"]

#: How the names of a module's tables of hooks end.
_HOOKS = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")


def perturbed(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    batch_dims: BatchDims,
    count: int,
    row: int = 0,
    factor: float | None = None,
) -> tuple[tuple[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]], bool]:
    """The first `count` examples; the same with one replaced by its neighbour, or multiplied by
    `factor` where it holds fractions; do they differ?"""
    changed = False

    def keep(t: Tensor, dim: int) -> Tensor:
        with torch._C.DisableTorchFunction():  # a plain tensor, whatever the loader handed out
            return t.detach().narrow(dim, 0, count).clone()

    def change(t: Tensor, dim: int) -> Tensor:
        nonlocal changed
        t = keep(t, dim)
        if count > 1:
            first, second = t.select(dim, row), t.select(dim, 1 if row == 0 else row - 1)
            if factor is not None:
                second = first * factor if t.is_floating_point() else first
            changed = changed or not torch.equal(first, second)
            first.copy_(second)
        return t

    plain = map_batched(keep, model, args, kwargs, batch_dims)
    return plain, map_batched(change, model, args, kwargs, batch_dims), changed


def unwrapped(model: nn.Module) -> nn.Module:
    """Without DataParallel and DDP: ranks differ in their number of examples, and a rank that has
    too few to check must not leave the others waiting in a collective."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return model.module if isinstance(model, parallel) else model


def is_plain(t: Tensor) -> bool:
    """Whether `t` is an ordinary dense tensor."""
    return t.layout == torch.strided and not t.is_nested and not t.is_quantized


@contextmanager
def preserving_state(model: nn.Module) -> Iterator[None]:
    """Random states, buffers and attributes of the model's modules are restored on the way out.

    Hooks that a module was given inside are taken off again. transformers' models register theirs when
    hidden states are first asked for, and note that in an attribute: without it they would register
    them once more at each run, and return every state as often.
    """
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    tables = [m.__dict__ for m in modules]
    tables += [m.__dict__[k] for m in modules for k in ("_parameters", "_buffers", "_modules")]
    contents = [dict(table) for table in tables]
    hooks = [(h, set(h)) for m in modules for k, h in m.__dict__.items() if k.endswith(_HOOKS)]
    values = [v for table in contents for v in table.values()]
    tensors = [
        (t, t.detach().clone())
        for t in {id(v): v for v in values if isinstance(v, Tensor)}.values()
        if not isinstance(t, nn.Parameter) and is_plain(t)
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
        for registered, before in hooks:
            for key in set(registered) - before:
                del registered[key]
        with torch.no_grad(), torch._C.DisableTorchFunction():
            for t, value in tensors:
                if not torch.equal(t, value):  # unchanged ones keep their version
                    t.copy_(value)


@contextmanager
def sampling_modules(model: nn.Module, sample: Callable[[Any, str], None]) -> Iterator[None]:
    """Inside, `sample(value, blame)` gets what goes in and out of every module that runs.

    What goes in is blamed on the module around, whose own code made it; what comes out on the module.
    """
    running: list[str] = []

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
            if not isinstance(module, torch.jit.ScriptModule):
                label = _label(name, module)
                for handle in (
                    module.register_forward_pre_hook(before(label), with_kwargs=True),
                    module.register_forward_hook(after(label)),
                ):
                    stack.callback(handle.remove)
        yield


def _label(name: str, module: nn.Module) -> str:
    name = name.removeprefix("_orig_mod.").replace("._orig_mod", "")
    kind = type(getattr(module, "_orig_mod", module)).__name__
    return f"module '{name}' ({kind})" if name not in ("", "_orig_mod") else f"the model ({kind})"
