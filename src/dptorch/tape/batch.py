"""Which inputs of a model are batched, and along which dimension."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dptorch.tape.recording import Recording

__all__ = ["BatchDims", "input_tagger"]

# One dimension for all inputs, or one for each named argument of forward; None: not batched.
BatchDims = int | Mapping[str, int | None]


def input_tagger(
    recording_of: Callable[[], Recording | None], batch_dims: BatchDims = 0
) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]] | None]:
    """A forward pre-hook (with_kwargs=True) that tags the batched inputs of a call.

    Without more said every tensor argument holds the examples in dimension 0. A scalar, or a tensor
    of size 1 there beside larger ones, is taken as shared by all examples. Any other tensor that is
    not batched must be named in `batch_dims` as None.

    Args:
        recording_of: returns the recording to tag for, or None to leave the call alone.
        batch_dims: see `BatchDims`; names that are not mentioned have dimension 0.
    """

    def dim_of(name: str) -> int | None:
        return batch_dims if isinstance(batch_dims, int) else batch_dims.get(name, 0)

    def tag(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        recording = recording_of()
        if recording is None:
            return None
        names = _argument_names(module, len(args))
        named = [*zip(names, args, strict=True), *kwargs.items()]
        largest = 0
        for name, value in named:
            dim = dim_of(name)
            if dim is not None:
                sizes: list[int] = []
                tree_map(lambda t, d=dim, s=sizes: _note_size(t, d, s), value)
                largest = max([largest, *sizes])

        def tag_leaf(t: Any, dim: int) -> Any:
            if not isinstance(t, Tensor) or t.dim() == 0:
                return t
            if t.shape[dim] == 1 and largest > 1:
                return t
            return recording.tag_batch(t, dim)

        def tag_value(name: str, value: Any) -> Any:
            dim = dim_of(name)
            return value if dim is None else tree_map(lambda t: tag_leaf(t, dim), value)

        new_args = tuple(tag_value(n, a) for n, a in zip(names, args, strict=True))
        return new_args, {n: tag_value(n, a) for n, a in kwargs.items()}

    return tag


def _note_size(t: Any, dim: int, sizes: list[int]) -> None:
    if isinstance(t, Tensor) and t.dim() > 0:
        sizes.append(t.shape[dim])


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
