"""Find a model whose backward mixes examples, by experiment: change what one example sends back.

Hooks on gradients and the backward of custom Functions are followed where they can be seen
(`dptorch.tape.recording.backward_code`). Hooks on the nodes of autograd's graph, and code that no
recording sees, are not; this is for them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dptorch.tape.provenance.tags import Reduced, Tag, owners
from dptorch.tape.recording.batch_dims import BatchDims, map_batched
from dptorch.tape.recording.compiled import uncompiled
from dptorch.tape.recording.patches import patched
from dptorch.tape.recording.recording import Recording
from dptorch.validation.reruns import perturbed, preserving_state, unwrapped

__all__ = ["find_backward_mixing"]

_EXAMPLES = 3
_LOUDER = 100.0  # what the changed example sends back, against the others
_RELATIVE = {torch.float64: 1e-7, torch.float32: 1e-3}
_RELATIVE_HALF = 5e-2


def find_backward_mixing(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    batch_dims: BatchDims,
    parameters: Mapping[str, Tensor],
) -> bool | None:
    """Whether what one example sends back moves the gradient of another, or their number does.

    None if there are too few examples to tell.

    The model runs on a few examples. Random gradients go back from its outputs, then the same with
    those of the first example a hundred times as large, then without the last example. The norms of
    the other examples' gradients are compared, parameter by parameter. Where the model returns
    nothing but losses over all examples, the first example itself is another in the second run.

    Guarantees:
        As `dptorch.validation.mixing.find_mixing`; no parameter's ``.grad`` is written.
        Held by `test_probing_the_backward_leaves_everything_as_it_was`.
    """
    model = unwrapped(model)
    sizes: set[int] = set()
    map_batched(lambda t, d: sizes.add(t.shape[d]), model, args, kwargs, batch_dims)
    if len(sizes) != 1:
        return False
    count = min(sizes.pop(), _EXAMPLES)
    if count < 2:
        return None
    half = any(
        p.dtype not in _RELATIVE or torch.is_autocast_enabled(p.device.type)
        for p in parameters.values()
    )

    def run(count: int, louder: float) -> tuple[_Norms, bool] | None:
        inputs, _, _ = perturbed(model, args, kwargs, batch_dims, count)
        if louder != 1 and quiet is not None and quiet[0].reduced:
            inputs = _with_a_loud_example(model, args, kwargs, batch_dims, count)
        with preserving_state(model), torch.enable_grad():
            before = torch.get_rng_state()
            found = _norms(model, *inputs, batch_dims, parameters, louder)
            drew = not torch.equal(before, torch.get_rng_state())
        return None if found is None else (found, drew)

    def moved(before: _Norms, after: _Norms, rows: slice) -> bool:
        return any(
            _moved(norms[rows], after.of[name][rows], half)
            for name, norms in before.of.items()
            if name in after.of
        )

    quiet: tuple[_Norms, bool] | None = None
    quiet = run(count, 1.0)
    if quiet is None:
        return False
    loud = run(count, _LOUDER)
    if loud is not None and moved(quiet[0], loud[0], slice(1, count)):
        again = run(count, 1.0)
        return again is not None and not moved(quiet[0], again[0], slice(0, count))
    if quiet[1] or count < 3:  # with fewer rows, other random numbers would be drawn
        return False
    try:
        fewer = run(count - 1, 1.0)
    except Exception:  # an argument that is no tensor speaks of all rows
        return False
    return fewer is not None and moved(quiet[0], fewer[0], slice(0, count - 1))


class _Norms(NamedTuple):
    """Norms of each example's gradient, {name: [B]}, and whether losses over all examples went back."""

    of: dict[str, Tensor]
    reduced: bool


def _with_a_loud_example(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    batch_dims: BatchDims,
    count: int,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The first examples, the very first of them a hundred times as large, or like its neighbour."""
    for factor in (_LOUDER, None):
        _, other, changed = perturbed(model, args, kwargs, batch_dims, count, factor=factor)
        if changed:
            break
    return other


def _norms(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    batch_dims: BatchDims,
    parameters: Mapping[str, Tensor],
    louder: float,
) -> _Norms | None:
    """None where no output has its examples apart, or is a loss over them."""
    recording = Recording(model, parameters)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the real forward pass gives them again
        args, kwargs = map_batched(recording.tag_batch, model, args, kwargs, batch_dims)
        with uncompiled(), patched(), recording:
            output = model(*args, **kwargs)
        outputs, grads = [], []
        losses, seeds = [], []
        for t in tree_leaves(output):
            if not isinstance(t, Tensor) or not t.requires_grad or not t.is_floating_point():
                continue
            state = recording.state(t)
            if isinstance(state, Reduced) and t.numel() == 1:
                size = recording.batch_size if state.kind == "mean" else 1
                losses.append(t)
                seeds.append(torch.full_like(t, size))
            if not isinstance(state, Tag) or state.dim is None:
                continue
            owner = owners(state, t.shape[state.dim], recording.batch_size).tolist()
            rows = [
                _row(t, state.dim, i) * (louder if o == 0 else 1.0) for i, o in enumerate(owner)
            ]
            outputs.append(t)
            grads.append(torch.stack(rows, state.dim).to(t))
        reduced = not outputs
        if reduced:
            outputs, grads = losses, seeds
        if not outputs:
            return None
        torch.autograd.grad(outputs, [recording.handle_of_taps], grads, allow_unused=True)
    tape = recording.tape
    found = {n: s.sqrt() for n, s in tape.squared_norms().items()} if tape.fired else None
    tape.close()
    return None if found is None else _Norms(found, reduced)


def _row(t: Tensor, dim: int, i: int) -> Tensor:
    """What row i sends back: the same whatever the number of rows."""
    shape = [n for d, n in enumerate(t.shape) if d != dim]
    return torch.randn(shape, generator=torch.Generator().manual_seed(i))


def _moved(before: Tensor, after: Tensor, half: bool) -> bool:
    relative = _RELATIVE_HALF if half else _RELATIVE.get(before.dtype, _RELATIVE_HALF)
    usual = before.isfinite() & after.isfinite()
    far = (before - after).abs() > relative * before.clamp(min=1e-12)
    return bool(far[usual].any())
