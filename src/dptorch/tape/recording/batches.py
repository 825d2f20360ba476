"""The identity of a physical batch, which every tensor computed from it carries."""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any

import torch
from torch import Tensor

from dptorch.tape.provenance.aliases import Aliases
from dptorch.tape.provenance.tags import Mixed, Tag

__all__ = ["Batch", "latest_batch", "own_batch"]


_LEFT = 16


class Batch:
    """One physical batch: states of tensors are good within it and refused outside.

    Forward passes on the same rows share it, so that what one of them computed may enter the
    other's loss. The rows of another batch are other records.

    Args:
        size: number of rows, padding included; 0 until it is known.
        handed_out: whether the engine's loader handed it out. Then every tensor that holds its rows
            is known, and none has to be guessed.

    Attributes:
        aliases: writes to shared memory.
        spent: whether a backward went through a forward pass on it. Inputs of unknown origin then
            belong to another batch.
        cut_from: an earlier batch of the user's own, and which of its rows these are.
        beside: the recording of what is computed from it outside of models.
        left: the last tensors of its rows that left for where nothing is followed (NumPy, lists,
            copies), and what they were.
    """

    __slots__ = (
        "__weakref__",
        "aliases",
        "beside",
        "cut_from",
        "handed_out",
        "left",
        "size",
        "spent",
    )

    def __init__(self, size: int = 0, *, handed_out: bool = False) -> None:
        self.size = size
        self.handed_out = handed_out
        self.aliases = Aliases()
        self.spent = False
        self.beside: Any = None
        self.cut_from: tuple[Batch, tuple[int, ...]] | None = None
        self.left: deque[tuple[Tensor, Tag | Mixed]] = deque(maxlen=_LEFT)

    def note_leaving(self, t: Tensor, state: object) -> None:
        """Note that values of `t`, of this state, go where nothing is followed."""
        if t.dim() and t.shape[0] == self.size and isinstance(state, (Tag, Mixed)):
            with torch._C.DisableTorchFunction():  # a plain tensor, which keeps no recording alive
                self.left.append((t.detach(), state))

    def came_back(self, t: Tensor) -> Tag | Mixed | None:
        """What `t` was when it left: of the tensors that did, one that it is equal to, or a line of."""
        for other, state in self.left:
            if other.numel() == t.numel() and _on_a_line(other, t):
                return state
        return None

    def origin(self) -> tuple[Batch, tuple[int, ...]]:
        """The batch that this one was cut from in the end (itself if from none), and the rows of it."""
        if self.cut_from is None:
            return self, tuple(range(self.size))
        base, rows = self.cut_from[0].origin()
        return base, tuple(rows[i] for i in self.cut_from[1])


def _on_a_line(a: Tensor, b: Tensor) -> bool:
    """Whether b is a multiple of a, plus a number."""
    with torch._C.DisableTorchFunction():
        x, y = (v.detach().reshape(-1).to("cpu", torch.float64) for v in (a, b))
        if len(x) < 4:  # any few points are nearly on one
            return torch.allclose(x, y)
        x, y = x - x.mean(), y - y.mean()
        slope = (x @ y) / (x @ x)
        size = y.abs().max()
        return bool(size > 0) and bool((slope * x - y).abs().max() <= 1e-5 * size)


_latest: weakref.ref[Batch] | None = None


def own_batch(size: int = 0, *, handed_out: bool = False) -> Batch:
    """A new batch; inputs of unknown origin join it until a backward goes through it."""
    global _latest
    batch = Batch(size, handed_out=handed_out)
    _latest = weakref.ref(batch)
    return batch


def latest_batch() -> Batch | None:
    """The batch that was begun last, if no backward went through it."""
    batch = _latest() if _latest is not None else None
    return None if batch is None or batch.spent else batch
