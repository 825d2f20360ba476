"""Find modules that mix examples, by experiment: change one example and look at the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dptorch.errors import ExamplesMixError
from dptorch.tape.batch import BatchDims, map_batched
from dptorch.tape.invisible import visible
from dptorch.tape.provenance import Tag, owners
from dptorch.tape.recording import Recording

__all__ = ["find_mixing", "refuse_mixing"]

_EXAMPLES = 4
# Rows of other examples come from the same kernels on the same values; only a kernel that picks its
# blocking by value could move them, by rounding.
_RELATIVE = 1e-4


def refuse_mixing(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], batch_dims: BatchDims
) -> bool:
    """Raise if changing one example of a batch changes the model's outputs for another.

    Two forward passes on at most four examples, without gradients; random numbers, buffers and the
    model's mode are left as they were.

    Returns:
        False if the batch held too few different examples to tell.

    Raises:
        ExamplesMixError: naming the first module at fault.
    """
    outcome = find_mixing(model, args, kwargs, batch_dims)
    if outcome:
        raise ExamplesMixError(
            f"{outcome}: changing one example changed its output for another, so no per-example "
            "gradient exists. Make it treat examples independently (BatchNorm: "
            "dptorch.prepare(model)), or, if this finding is wrong, pass self_check=False."
        )
    return outcome is not None


def find_mixing(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], batch_dims: BatchDims = 0
) -> str | None:
    """The first module whose output mixes examples, "" if none does, None if it cannot be told."""
    sizes: list[int] = []

    def note(t: Tensor, dim: int) -> Tensor:
        sizes.append(t.shape[dim])
        return t

    map_batched(note, model, args, kwargs, batch_dims)
    count = min(max(sizes, default=0), _EXAMPLES)
    if count < 2:
        return None
    changed = False

    def keep(t: Tensor, dim: int) -> Tensor:
        return t.detach().narrow(dim, 0, count).clone()

    def change(t: Tensor, dim: int) -> Tensor:
        nonlocal changed
        t = keep(t, dim)
        first, second = t.select(dim, 0), t.select(dim, 1)
        changed = changed or not torch.equal(first, second)
        first.copy_(second)
        return t

    plain = map_batched(keep, model, args, kwargs, batch_dims)
    other = map_batched(change, model, args, kwargs, batch_dims)
    if not changed:
        return None
    with torch.no_grad(), _undisturbed(model):
        before = _outputs(model, *plain, batch_dims)
    with torch.no_grad(), _undisturbed(model):
        after = _outputs(model, *other, batch_dims)
    for name, tensors in before.items():
        for (t, tag), (u, _) in zip(tensors, after.get(name, []), strict=False):
            if t.shape == u.shape and _others_moved(t, u, tag, count):
                kind = type(model.get_submodule(name)).__name__
                return f"module '{name}' ({kind})" if name else f"the model ({kind})"
    return ""


def _outputs(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batch_dims: BatchDims
) -> dict[str, list[tuple[Tensor, Tag]]]:
    """Outputs of every module in the order they finish, with the place of the examples in each.

    An output whose examples cannot be followed is taken to hold them in dimension 0, where that has
    their number: here a wrong guess costs a false alarm at worst.
    """
    recording = Recording(model, {})
    found: dict[str, list[tuple[Tensor, Tag]]] = {}

    def hook(name: str) -> Any:
        def note(module: nn.Module, _: Any, output: Any) -> None:
            for t in tree_leaves(output):
                if isinstance(t, Tensor) and t.is_floating_point() and t.dim() > 0:
                    state = recording.state(t)
                    if not isinstance(state, Tag) and t.shape[0] == recording.batch_size:
                        state = Tag(0)
                    if isinstance(state, Tag) and state.dim is not None:
                        found.setdefault(name, []).append((t.detach().clone(), state))

        return note

    handles = [m.register_forward_hook(hook(n)) for n, m in model.named_modules()]
    try:
        args, kwargs = map_batched(recording.tag_batch, model, args, kwargs, batch_dims)
        with visible(), recording:
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _others_moved(before: Tensor, after: Tensor, tag: Tag, count: int) -> bool:
    assert tag.dim is not None
    owner = owners(tag, before.shape[tag.dim], count, before.device)
    kept = (owner != 0).nonzero().flatten()
    a = before.index_select(tag.dim, kept).double().nan_to_num()
    b = after.index_select(tag.dim, kept).double().nan_to_num()
    scale = a.abs().max().clamp(min=1e-12) if a.numel() else 1.0
    return bool(((a - b).abs() > _RELATIVE * scale).any())


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Random state and buffers are restored on the way out."""
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng([d.index for d in devices if d.index is not None]):
            yield
    finally:
        for buffer, value in buffers:
            buffer.copy_(value)
