"""The identity of a physical batch, which every tensor computed from it carries."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dptorch.errors import ExamplesMixError
from dptorch.tape.provenance.aliases import Aliases
from dptorch.tape.provenance.tags import Mixed, Tag
from dptorch.tape.recording.padding import Padding

__all__ = ["Batch", "latest_batch", "own_batch"]


_LEFT = 16
_COLUMNS = 8  # of a tensor that came back, whose scales are looked at
_ERROR = 1e-6  # relative, of constants that are worked out from values in float32
_WHOLE = (-2.0, -1.0, 1.0, 2.0)
_SMALL = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)
_LEVELS = (127.5, 255.0, 256.0, 65535.0)  # of images


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
        made: what code that a recording sees has made of it since the last such code ended.
        gradients: what gradients of its rows are, once a loss beside the model that mixes them had a
            backward.
        padding: the sizes that follow the longest example of the batch, if its collation is known.
    """

    __slots__ = (
        "__weakref__",
        "aliases",
        "beside",
        "cut_from",
        "gradients",
        "handed_out",
        "left",
        "made",
        "padding",
        "size",
        "spent",
    )

    def __init__(self, size: int = 0, *, handed_out: bool = False) -> None:
        self.size = size
        self.handed_out = handed_out
        self.aliases = Aliases()
        self.spent = False
        self.gradients: Mixed | None = None
        self.padding: Padding | None = None
        self.beside: Any = None
        self.cut_from: tuple[Batch, tuple[int, ...]] | None = None
        self.left: deque[_Left] = deque(maxlen=_LEFT)
        self.made: list[weakref.ref[Tensor]] = []

    def kept(self) -> Iterator[Tensor]:
        """What somebody still holds of what was made; empties `made`."""
        made, self.made = self.made, []
        for reference in made:
            if (t := reference()) is not None:
                yield t

    def note_leaving(self, t: Tensor, state: object) -> None:
        """Note that values of `t`, of this state, go where nothing is followed."""
        if t.dim() and t.shape[0] == self.size and isinstance(state, (Tag, Mixed)):
            with torch._C.DisableTorchFunction():  # a plain tensor, which keeps no recording alive
                memory = t.detach()
                self.left.append(_Left(memory.clone(), state, memory, memory._version))

    def refuse_written(self) -> None:
        """Raise if memory that left was written to by others than torch.

        Raises:
            ExamplesMixError: nobody knows what was written.
        """
        for i, (values, state, memory, version) in enumerate(self.left):
            if memory is not None and memory._version == version:
                with torch._C.DisableTorchFunction():
                    if bool(((memory != values) & (values == values)).any()):
                        raise ExamplesMixError(
                            f"memory of a tensor of shape {tuple(memory.shape)} that holds values of "
                            "the batch was written to through NumPy, where nothing is followed. "
                            "Compute with torch, or write to a copy, t.numpy().copy()."
                        )
            self.left[i] = _Left(values, state, None, 0)

    def came_back(self, t: Tensor) -> Tag | Mixed | None:
        """What `t` was when it left, of the tensors that did; None if it is none of them.

        A tensor that was scaled or shifted by constants that look public is what it was. One that was
        scaled by anything else (``y / y.max()``) is mixed.
        """
        mixed = None
        for other, state, *_ in self.left:
            if other.numel() != t.numel():
                continue
            whole = _line(other, t)
            lines = _lines_of_columns(other, t) if whole is None else [whole]
            if not lines:
                continue
            public = isinstance(state, Tag) and all(line.is_public for line in lines)
            if lines[0].is_equal or public:
                return state
            line = next((line for line in lines if not line.is_public), lines[0])
            mixed = Mixed(
                f"a tensor of shape {tuple(t.shape)} holds values of the batch that left for where "
                f"nothing is followed (NumPy, lists), times {line.slope:.6g} plus {line.shift:.6g}, "
                "which may be statistics of the batch. Scale by constants of few digits, or compute "
                "with tensors of torch, which are followed."
            )
        return mixed

    def origin(self) -> tuple[Batch, tuple[int, ...]]:
        """The batch that this one was cut from in the end (itself if from none), and the rows of it."""
        if self.cut_from is None:
            return self, tuple(range(self.size))
        base, rows = self.cut_from[0].origin()
        return base, tuple(rows[i] for i in self.cut_from[1])


class _Left(NamedTuple):
    """A tensor that left: its values and what they were; the memory that it left, which others may
    write to, and torch's count of writes to it."""

    values: Tensor
    state: Tag | Mixed
    memory: Tensor | None
    version: int


class _Line(NamedTuple):
    """The line that the values of one tensor are on over those of another."""

    slope: float
    shift: float
    is_equal: bool
    is_public: bool


def _line(a: Tensor, b: Tensor) -> _Line | None:
    """How b is a multiple of a plus a number; None if it is not."""
    with torch._C.DisableTorchFunction():
        x, y = (v.detach().reshape(-1).to("cpu", torch.float64) for v in (a, b))
        if torch.allclose(x, y):
            return _Line(1.0, 0.0, True, True)
        if len(x) < 4:  # any few points are nearly on one
            return None
        from_mean, size = x - x.mean(), (y - y.mean()).abs().max()
        slope = (from_mean @ y) / (from_mean @ from_mean)
        off = (slope * from_mean - (y - y.mean())).abs().max()
        if not bool(size > 0) or not bool(off <= 1e-5 * size):
            return None
        by, shift = float(slope), float(y.mean() - slope * x.mean())
        return _Line(by, shift, False, _is_public(by, shift, y))


def _lines_of_columns(a: Tensor, b: Tensor) -> list[_Line]:
    """How each column of b [rows, ...] is a multiple of that of a plus a number, of the first columns
    that vary; none if one column is not."""
    if a.shape != b.shape or a.dim() < 2 or len(a) < 4:
        return []
    with torch._C.DisableTorchFunction():
        x, y = (v.detach().flatten(1).to("cpu", torch.float64) for v in (a, b))
        from_mean, away = x - x.mean(0), y - y.mean(0)
        squares = from_mean.square().sum(0)
        slopes = (from_mean * away).sum(0) / squares.clamp(min=1e-300)
        off, size = (slopes * from_mean - away).abs().amax(0), away.abs().amax(0)
        varies = ((squares > 0) & (size > 0)).nonzero()[:, 0]
        if not len(varies) or not bool((off <= 1e-5 * size).all()):
            return []
        found = []
        for i in varies[:_COLUMNS].tolist():
            by = float(slopes[i])
            shift = float(y[:, i].mean() - by * x[:, i].mean())
            found.append(_Line(by, shift, False, _is_public(by, shift, y[:, i])))
        return found


def _is_public(slope: float, shift: float, y: Tensor) -> bool:
    """Whether the multiple and the number are ones that a person writes, and do not make of the values
    `y` ones with a mean of 0, a sum or largest value of 1, or a range from 0 to 1."""
    low, high = float(y.min()), float(y.max())
    error = _ERROR * max(-low, high)
    loss_of_digits = _ERROR * max(1.0, max(-low, high) / (high - low))
    if abs(shift) <= error:
        shift = 0.0
    if _is_near(slope, _WHOLE, loss_of_digits) and _is_near(shift, _SMALL, loss_of_digits):
        return True
    if _is_near(1 / slope, _LEVELS, loss_of_digits) and _is_near(shift, _SMALL, loss_of_digits):
        return True
    if abs(float(y.mean())) <= error or abs(abs(float(y.sum())) - 1) <= error * len(y):
        return False
    if abs(max(-low, high) - 1) <= error and (not shift or abs(low) <= error):
        return False
    return _is_short(slope, loss_of_digits) and (
        _is_short(shift, loss_of_digits) or _is_short(shift / slope, loss_of_digits)
    )


def _is_near(value: float, known: Iterable[float], error: float) -> bool:
    return any(abs(value - k) <= error * max(1.0, abs(k)) for k in known)


def _is_short(value: float, error: float) -> bool:
    """Whether a value, or one over it, has at most three decimal digits."""
    return not value or any(
        abs(float(f"{v:.3g}") - v) <= error * abs(v) for v in (value, 1 / value)
    )


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
