"""Memory that several tensors share, once examples were written into it through one of them.

A tag is kept with each tensor object. ``view.copy_(x)`` changes what every other tensor on that
memory holds, without any of them being touched. So an in-place write that changes the owners of
what it writes to is remembered with its memory, and a tensor that was looked at before that write
has its tag worked out again, element by element, when it is next used.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from dptorch.tape.provenance.tags import (
    NOBODY,
    Lost,
    Mixed,
    ParamOnly,
    State,
    Tag,
    owners,
    read_owners,
)

__all__ = ["Aliases", "is_shared", "others_on_memory_of", "owner_of_each", "storage_of"]

_UNKNOWN = -2  # an element that no remembered write touched
_MIXED = -3
_LARGEST = 1 << 26  # elements; a larger memory is not worked out


def storage_of(t: Tensor) -> int:
    """A number for the memory of `t`; unique while something holds it, weakly or not."""
    return int(t.untyped_storage()._cdata)


def is_shared(t: Tensor, tensors: int) -> bool:
    """Whether more than `tensors` tensors are on the memory of `t`."""
    if not torch._C._has_storage(t):
        return False
    memory = t.untyped_storage()  # counts too
    return bool(torch._C._storage_Use_Count(memory._cdata) > tensors + 1)


def others_on_memory_of(t: Tensor) -> list[Tensor]:
    """The tensors of Python that share the memory of `t`. Looks through all objects there are."""
    number = storage_of(t)
    kinds = (Tensor, nn.Parameter)
    found = [o for o in gc.get_objects() if type(o) in kinds and o is not t]
    return [o for o in found if torch._C._has_storage(o) and storage_of(o) == number]


def owner_of_each(t: Tensor, state: State | None, batch_size: int) -> Tensor:
    """The owner of each element of `t`, int32, broadcast to its shape."""
    if state is None:
        value = torch.tensor(NOBODY)
    elif not isinstance(state, Tag):
        value = torch.tensor(_MIXED)
    elif state.dim is None:
        value = torch.tensor(state.step)
    else:
        own = owners(state, t.shape[state.dim], batch_size)
        value = own.view([-1 if i == state.dim else 1 for i in range(t.dim())])
    return value.to(torch.int32).expand(t.shape)


@dataclass
class _Write:
    clock: int
    place: tuple[torch.Size, tuple[int, ...], int, int]  # sizes, strides, offset, bytes an element
    before: Tensor
    after: Tensor


@dataclass
class _Memory:
    alive: StorageWeakRef  # keeps the number of this memory from being used again
    writes: list[_Write] = field(default_factory=list)


def _place(t: Tensor) -> tuple[torch.Size, tuple[int, ...], int, int]:
    return t.shape, t.stride(), int(t.storage_offset()), t.element_size()


class Aliases:
    """The writes of one recording that changed whose values a piece of memory holds.

    Attributes:
        clock: number of such writes so far. A tensor's tag is noted together with the clock; only
            later writes can have overtaken it.
    """

    def __init__(self) -> None:
        self.clock = 0
        self._memories: dict[int, _Memory] = {}

    def wrote(self, t: Tensor, before: State | None, after: State | None, batch_size: int) -> None:
        """Remember that `t` was written to in place: its examples were `before`, are `after`."""
        self.clock += 1
        number = storage_of(t)
        memory = self._memories.get(number)
        if memory is None:
            memory = _Memory(StorageWeakRef(t.untyped_storage()))
            self._memories[number] = memory
        memory.writes.append(
            _Write(
                self.clock,
                _place(t),
                owner_of_each(t, before, batch_size),
                owner_of_each(t, after, batch_size),
            )
        )

    def now(self, t: Tensor, clock: int, state: State | None, batch_size: int) -> State | None:
        """What `t`, known as `state` when the clock was `clock`, is after later writes."""
        memory = self._memories.get(storage_of(t))
        if memory is None or memory.writes[-1].clock <= clock:
            return state
        shape, stride, offset, width = _place(t)
        elements = t.untyped_storage().nbytes() // width
        if elements > _LARGEST or any(w.place[3] != width for w in memory.writes):
            return Mixed(
                "memory that examples were written into is looked at through another view."
            )
        known = torch.full((elements,), _UNKNOWN, dtype=torch.int32)
        for write in memory.writes:
            sizes, strides, start, _ = write.place
            region = known.as_strided(sizes, strides, start)
            if write is memory.writes[0]:
                region.copy_(write.before)
            region.copy_(write.after)
        mine = known.as_strided(shape, stride, offset)
        if bool((mine == _UNKNOWN).all()):
            return state
        before = owner_of_each(t, state, batch_size)
        mine = torch.where(mine == _UNKNOWN, before, mine)
        if isinstance(state, ParamOnly) or bool((mine == _MIXED).any()):
            return Mixed("it shares memory with a tensor into which mixed examples were written.")
        try:
            return read_owners(mine, batch_size)
        except Lost as lost:
            return Mixed(f"it shares memory with a tensor that was written to in place: {lost}.")
