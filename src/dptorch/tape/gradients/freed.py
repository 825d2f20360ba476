"""Find whether a graph has to read tensors whose memory was given back, as fully_shard does with
parameters between a backward and the next forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

__all__ = ["is_freed", "needs_freed_values"]


def is_freed(t: Tensor) -> bool:
    """Whether a tensor with elements has no memory."""
    return bool(t.numel()) and not t.untyped_storage().nbytes()


def needs_freed_values(tensors: Sequence[Tensor]) -> bool:
    """Whether a backward from `tensors` reads a saved tensor that has no memory any more."""
    todo: list[Any] = [t.grad_fn for t in tensors if t.grad_fn is not None]
    seen = set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if any(map(is_freed, _saved_by(node))):
            return True
        todo += [function for function, _ in node.next_functions if function is not None]
    return False


def _saved_by(node: Any) -> list[Tensor]:
    names = [n for n in dir(node) if n.startswith("_saved_") or n == "saved_tensors"]
    found = [getattr(node, name) for name in names]
    found += [t for several in found if isinstance(several, list | tuple) for t in several]
    return [t for t in found if isinstance(t, Tensor)]
