"""Numbers that were read from a batch, and found again among the operands of an op.

``loss.item()`` is a number of Python, which nothing follows. Logging it is nobody's concern; but a
number that was read from several examples, or from another batch, must not enter what is computed
for one example. So what was read is remembered by its value. An operand of an op on the batch that
equals it, or a simple function of it, or a round number times or over it, is known for what it is:
values that were read have random digits, which a public constant does not share by chance. A tensor
that was filled with such a number is known as well, by its first, middle and last value. A number
that went through other arithmetic (a moving average, an average over a list), and a decision that was
made by one, are not recognised.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dptorch.tape.provenance.public_number import PublicNumber
from dptorch.tape.provenance.tags import Mixed, Reduced, Tag
from dptorch.tape.recording.batches import Batch
from dptorch.tape.recording.tensor_states import TensorStates

__all__ = ["ReadNumbers", "read_numbers"]

_REMEMBERED = 64  # values
_COMBINED = 4  # of them, the latest, are looked for as pairs too
_MOST = 4096  # functions of values that are kept
_BITS = 40  # of the mantissa that must agree
_RANDOM_BITS = 14  # a value with fewer is not told from a constant

_FUNCTIONS: tuple[Callable[[float], float], ...] = (
    lambda v: v,
    lambda v: 1 / v,
    lambda v: v * v,
    lambda v: 1 + v,
    lambda v: 1 - v,
    math.sqrt,
    lambda v: 1 / math.sqrt(v),
    math.exp,
    lambda v: math.exp(-v),
    math.log,
)
_PAIRS: tuple[Callable[[float, float], float], ...] = (
    lambda v, w: v / w,
    lambda v, w: w / v,
    lambda v, w: v * w,
    lambda v, w: v + w,
    lambda v, w: v - w,
)
_ROUND_DIGITS = 3
#: Of the latest values, those that are looked for in tensors of single precision, whose numbers have
#: fewer digits and could be the same by chance.
_IN_TENSORS = 4
_MET = "_dptorch_met"  # on a tensor: the version that was looked at


class _Read(NamedTuple):
    """A value, its batch, and the example it is of; None for a value of several."""

    value: float
    batch: weakref.ref[Batch]
    owner: int | None


class ReadNumbers:
    """The numbers that were read last, in all batches.

    Attributes:
        latest: what was read, the latest last.
    """

    def __init__(self) -> None:
        self.latest: deque[_Read] = deque(maxlen=_REMEMBERED)
        self._fresh: deque[_Read] = deque(maxlen=_REMEMBERED)  # not yet in `_known`
        self._known: dict[int, _Read] = {}
        self._looked_up: dict[float, _Read | None] = {}

    def note(self, value: Any, state: Any, batch: Batch) -> None:
        """Remember a value that was read from a tensor of this state."""
        if type(value) is not float or not isinstance(state, (Tag, Mixed, Reduced)):
            return
        if _has_random_digits(value):
            whose = state.step if isinstance(state, Tag) and state.dim is None else None
            read = _Read(value, weakref.ref(batch), whose)
            self.latest.append(read)
            self._fresh.append(read)

    def among(
        self,
        name: str,
        args: Iterable[Any],
        kwargs: Mapping[str, Any],
        tagged: Iterable[tuple[Tensor, Tag]],
        states: TensorStates,
    ) -> Mixed | None:
        """The state of what op `name` makes of an operand that was read from other examples than those
        of its operands `tagged`, or from another batch; None if there is none such."""
        for value in (*args, *kwargs.values()) if kwargs else args:
            if isinstance(value, Tensor):
                read = self.filled(value) if states.state(value) is None else None
            elif isinstance(value, float) and _has_random_digits(value):
                read = self._look_up(value)
            else:
                continue
            if read is not None and not _is_own(read, [t for _, t in tagged], states.batch):
                return Mixed(
                    f"{states.module_path()}: the number {read.value:.6g}, which '{name}' takes or a "
                    "function of it, was read from several examples, or from those of another step "
                    "(item(), float())."
                )
        return None

    def filled(self, t: Tensor) -> _Read | None:
        """What was read, if that number fills `t`, a tensor of no example; None for any other.

        A tensor that was met before the number was read does not hold it.
        """
        if not self.latest or t.requires_grad or not t.is_floating_point() or not t.numel():
            return None
        with torch._C.DisableTorchFunction():
            if getattr(t, _MET, None) == t._version:
                return None
            setattr(t, _MET, t._version)
            flat = t.detach().reshape(-1)
            some = {*flat[[0, len(flat) // 2, -1]].tolist()} - {0.0}  # one wait for a device
        value = some.pop() if len(some) == 1 else 0.0
        if not _has_random_digits(value):
            return None
        for read in list(self.latest)[-_IN_TENSORS:]:
            dtype = torch.float32 if t.dtype == torch.float64 else t.dtype
            if value in torch.tensor([read.value, 1 / read.value], dtype=dtype).tolist():
                return read
        return self._look_up(value) if t.dtype == torch.float64 else None

    def owner_of(self, value: object) -> tuple[Batch | None, int | None] | None:
        """The batch, if it is still there, and the example (None for several) that a number was read
        from; None for one that was not read."""
        if not isinstance(value, float) or not self.latest or not _has_random_digits(value):
            return None
        read = self._look_up(value)
        return None if read is None else (read.batch(), read.owner)

    def _look_up(self, value: float) -> _Read | None:
        """What was read, if `value` is that, a function of it, or a round number times or over it."""
        if self._fresh:
            self._derive()
            self._looked_up.clear()
        if value not in self._looked_up:
            found = self._known.get(_key(value))
            if found is None:
                for read in self.latest:
                    if _is_round(value / read.value) or _is_round(value * read.value):
                        found = read
            self._looked_up[value] = found
        return self._looked_up[value]

    def _derive(self) -> None:
        """Work out the functions of what was read since the last call."""
        latest = list(self.latest)[-_COMBINED:]
        fresh, self._fresh = list(self._fresh), deque(maxlen=_REMEMBERED)
        if len(self._known) > _MOST:
            self._known.clear()
            fresh = list(self.latest)
        for read in fresh:
            for other in latest:
                if other is not read:
                    for combine in _PAIRS:
                        self._add(combine, read._replace(owner=None), read.value, other.value)
        for read in fresh:  # of equal values the last: an example is in many steps
            for function in _FUNCTIONS:
                self._add(function, read, read.value)

    def _add(self, function: Callable[..., float], read: _Read, *values: float) -> None:
        try:
            value = function(*values)
        except (ArithmeticError, ValueError):
            return
        if _has_random_digits(value):
            self._known[_key(value)] = read


read_numbers = ReadNumbers()


def _has_random_digits(value: float) -> bool:
    """Whether a value has more digits than a constant that a person writes in binary."""
    if isinstance(value, PublicNumber) or not math.isfinite(value):
        return False
    shifted = math.frexp(value)[0] * 2.0**_RANDOM_BITS
    return shifted != int(shifted)


def _is_round(value: float) -> bool:
    """Whether a person writes a value with at most three decimal digits and an exponent."""
    if not math.isfinite(value) or not value:
        return False
    nearest = float(f"{value:.{_ROUND_DIGITS - 1}e}")
    # What is written is a product of doubles. Less strict, and a constant is mistaken in a long run.
    return abs(value - nearest) < 1e-14 * abs(value)


def _key(value: float) -> int:
    """The leading bits of a value, without its sign."""
    mantissa, exponent = math.frexp(abs(value))
    return round(mantissa * 2.0**_BITS) * 4096 + exponent


def _is_own(read: _Read, tags: Iterable[Tag], batch: Batch) -> bool:
    """Whether the value was read from the one example that all operands are of."""
    if read.owner is None or read.batch() is not batch:
        return False
    return all(tag.dim is None and tag.step == read.owner for tag in tags)
