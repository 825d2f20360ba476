"""Cut a batch of any structure into the examples that a check needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dptorch.errors import ConfigurationError
from dptorch.tape.recording.batch_dims import BatchDims, is_ragged, map_batched

__all__ = ["Call", "Cutter", "calls_of"]

Call = tuple[tuple[Any, ...], dict[str, Any]]


def calls_of(model: nn.Module, run: Callable[[], Any]) -> list[Call]:
    """The arguments of every call of `model` that ``run()`` makes."""
    calls: list[Call] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    return calls


class Cutter:
    """Selects examples of a batch.

    Tensors hold the examples in dimension 0. With other `batch_dims` the dimension is that of the
    model's argument which the tensor is handed on to, unchanged; tensors that the model never gets,
    such as labels, keep dimension 0. Scalars, and tensors of size 1 there beside larger ones, are
    shared by all examples. A list of numbers or texts, as long as there are examples, is cut too.

    Args:
        batch: tensors in tuples, lists and mappings.
        batch_dims: see `dptorch.tape.recording.batch_dims.BatchDims`.
        calls: of the model on this batch, see `calls_of`.

    Attributes:
        size: the number of examples.

    Raises:
        ConfigurationError: if the tensors disagree on the number of examples.
    """

    def __init__(
        self, model: nn.Module, batch: Any, batch_dims: BatchDims, calls: Sequence[Call]
    ) -> None:
        self._dims: dict[int, int] = {}

        def note(t: Tensor, dim: int) -> Tensor:
            self._dims[id(t)] = dim
            return t

        for args, kwargs in calls:
            if is_ragged(args, kwargs, batch_dims):
                raise ConfigurationError(
                    "the batch holds the rows of all examples one after another, so single examples "
                    "cannot be cut out of it. Check the model on inputs with one row an example "
                    "(padded sequences, one graph), or compare dptorch.record with a loop of your "
                    "own."
                )
            map_batched(note, model, args, kwargs, batch_dims)
            for t in tree_leaves((args, kwargs)):
                if isinstance(t, Tensor):
                    self._dims.setdefault(id(t), -1)  # shared by all examples
        self._batch = batch
        sizes = {s for t in _tensors(batch) if (s := self._size(t)) is not None}
        sizes = sizes - {1} if len(sizes) > 1 else sizes
        if len(sizes) != 1:
            found = ", ".join(str(tuple(t.shape)) for t in _tensors(batch))
            raise ConfigurationError(
                f"the batch holds tensors of shapes {found or '(none)'}, which do not agree on one "
                "number of examples. Put the examples into dimension 0 of each, or name the "
                "dimensions of the model's arguments with batch_dims=."
            )
        self.size = sizes.pop()

    def _size(self, t: Tensor) -> int | None:
        dim = self._dims.get(id(t), 0)
        return t.shape[dim] if t.dim() > 0 and self._dims.get(id(t), 0) != -1 else None

    def select(self, index: Sequence[int], dtype: torch.dtype | None = None) -> Any:
        """The batch with the examples of these indices, copied; floating tensors as `dtype`."""
        return self._select(self._batch, list(index), dtype)

    def _select(self, value: Any, index: list[int], dtype: torch.dtype | None) -> Any:
        if isinstance(value, Tensor):
            t = value.detach()
            if self._size(value) == self.size:
                dim = self._dims.get(id(value), 0)
                t = t.index_select(dim, torch.tensor(index, device=t.device))
            else:
                t = t.clone()
            return t.to(dtype) if dtype is not None and t.is_floating_point() else t
        if isinstance(value, Mapping):
            return {k: self._select(v, index, dtype) for k, v in value.items()}
        if isinstance(value, (tuple, list)):
            plain = all(isinstance(v, (int, float, str)) for v in value)
            if plain and len(value) == self.size:
                return type(value)(value[i] for i in index)
            new = [self._select(v, index, dtype) for v in value]
            return type(value)(*new) if hasattr(value, "_fields") else type(value)(new)
        return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for v in value.values():
            yield from _tensors(v)
    elif isinstance(value, (tuple, list)):
        for v in value:
            yield from _tensors(v)
