"""Which inputs of a model are batched, and along which dimension."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["BatchDims", "map_batched"]

# One dimension for all inputs, or one for each named argument of forward; None: not batched.
BatchDims = int | Mapping[str, int | None]


def map_batched(
    function: Callable[[Tensor, int], Any],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    batch_dims: BatchDims = 0,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Apply ``function(tensor, batch dimension)`` to every batched tensor among a call's arguments.

    Without more said every tensor argument holds the examples in dimension 0. A scalar, or a tensor
    of size 1 there beside larger ones, is taken as shared by all examples. Any other tensor that is
    not batched must be named in `batch_dims` as None; names that are not mentioned have dimension 0.
    """

    def dim_of(name: str) -> int | None:
        return batch_dims if isinstance(batch_dims, int) else batch_dims.get(name, 0)

    # One dimension for all needs no names.
    names = [""] * len(args) if isinstance(batch_dims, int) else _argument_names(module, len(args))
    largest = 0
    for name, value in [*zip(names, args, strict=True), *kwargs.items()]:
        dim = dim_of(name)
        if dim is not None:
            leaves = (value,) if isinstance(value, Tensor) else tree_leaves(value)
            sizes = [t.shape[dim] for t in leaves if isinstance(t, Tensor) and t.dim()]
            largest = max([largest, *sizes])

    def apply(name: str, value: Any) -> Any:
        dim = dim_of(name)
        if dim is None:
            return value

        def on_leaf(t: Any) -> Any:
            shared = not isinstance(t, Tensor) or not t.dim() or (t.shape[dim] == 1 < largest)
            return t if shared else function(t, dim)

        return on_leaf(value) if isinstance(value, Tensor) else tree_map(on_leaf, value)

    new_args = tuple(apply(n, a) for n, a in zip(names, args, strict=True))
    return new_args, {n: apply(n, a) for n, a in kwargs.items()}


def _argument_names(module: nn.Module, count: int) -> list[str]:
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    names: list[str] = []
    for p in parameters:
        if p.kind is p.VAR_POSITIONAL:
            break
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD):
            names.append(p.name)
    return [names[i] if i < len(names) else str(i) for i in range(count)]
