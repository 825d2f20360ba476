"""Which example owns which index of a tensor: exact, never guessed from shapes.

Every tensor computed from the batch carries a *tag*. The tag of a tensor with B examples along
dimension `dim` says that index i along it belongs to example ``(i // step) % B``. One rule covers a
plain batch (step 1), a batch with positions folded in (``x.view(B * T, D)``: step T), windows and
heads folded in, sequence-first layouts and ``repeat``. Two rarer forms complete it: an explicit
owner for each index (after ``x[permutation]``), and a whole tensor of one example (``x[3]``).

Shape legend: B examples, m positions folded into the batch dimension, ... whatever remains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "NOBODY",
    "ONE_EXAMPLE",
    "PARAM_ONLY",
    "PER_EXAMPLE",
    "Lost",
    "Mixed",
    "Order",
    "ParamOnly",
    "Reduced",
    "State",
    "Tag",
    "broadcast_shape",
    "complete",
    "owners",
    "param_only_state",
    "place",
    "read_owners",
    "read_shadow",
    "regular_or_explicit",
    "rows",
    "separate",
    "shadow",
    "tag_after_view",
]


# In place of an owner: a row that was never written to, in a buffer that is being filled.
NOBODY = -1

# The kind of a loss with one value for each example.
PER_EXAMPLE = "per example"

# The kind of a scalar loss of one example among several, such as a sum over rows that a mask selects
# where only one example has any.
ONE_EXAMPLE = "one example"


class Tag(NamedTuple):
    """Examples lie along `dim`; index i belongs to ``(i // step) % B``, or to ``explicit[i]``.

    With ``dim=None`` the whole tensor belongs to example `step`. An explicit owner may be `NOBODY`.
    """

    dim: int | None
    step: int = 1
    explicit: tuple[int, ...] | None = None

    @property
    def regular(self) -> bool:
        """Whether every example owns the same number of indices, in a periodic pattern."""
        return self.dim is not None and self.explicit is None

    def at(self, dim: int) -> Tag:
        """The same owners along another dimension."""
        return self if self.dim is None else Tag(dim, self.step, self.explicit)


class ParamOnly(NamedTuple):
    """Computed from parameters and constants alone; stays under ordinary autograd.

    `source` is the smaller tensor that this one is an ``expand`` of, where it is one: an expanded
    copy meets each example separately, so its gradient can be taken before the expansion sums it.
    `transposed` is the matrix that this one is the transpose of. `looked_up` is the table that its
    rows were taken from (positions of a transformer), the numbers of the rows, and the padding's.
    """

    source: Tensor | None = None
    transposed: Tensor | None = None
    looked_up: tuple[Tensor, Tensor, int | None] | None = None


class Order(NamedTuple):
    """A permutation of the examples, or sequence lengths in that order.

    It depends on all of them, so it may do nothing but put whole examples in order and back: what
    packing sequences for a recurrent layer needs.
    """


class Reduced(NamedTuple):
    """A linear reduction over the examples, the "sum" or the "mean" of their losses.

    `factors` are the numbers that the terms of the loss were multiplied by since, one for each
    term: (1.0,) for a plain loss, (1.0, 0.5) for ``a + 0.5 * b``.
    """

    kind: str
    factors: tuple[float, ...] = (1.0,)

    def times(self, factor: float) -> Reduced:
        """The loss multiplied by a number."""
        return Reduced(self.kind, tuple(f * factor for f in self.factors))


class Mixed(NamedTuple):
    """Examples met in a way that no per-example gradient can undo; `reason` names op and module."""

    reason: str


State = Tag | ParamOnly | Order | Reduced | Mixed
PARAM_ONLY = ParamOnly()


def param_only_state(
    name: str,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    out: Any,
    parameters: Mapping[int, str],
) -> ParamOnly:
    """The state of what op `name` made of parameters alone; `parameters` has their ids."""
    x = args[0] if args and isinstance(args[0], Tensor) else None
    if x is None or not isinstance(out, Tensor):
        return PARAM_ONLY
    plain = kwargs.get("max_norm") is None and not kwargs.get("scale_grad_by_freq")
    # F.embedding, as torch hands it on; torch.embedding has the table first.
    if name == "embedding" and plain and len(args) == 2 and id(args[1]) in parameters:
        return ParamOnly(looked_up=(args[1], x, kwargs.get("padding_idx")))
    if name in ("expand", "expand_as", "broadcast_to"):
        return ParamOnly(source=x)
    if id(x) in parameters and x.dim() == 2 and out.dim() == 2:
        swapped = name in (".T", ".mT", "t") or (
            name in ("transpose", "permute")
            and out.shape == x.shape[::-1]
            and out.stride() == x.stride()[::-1]
        )
        if swapped:
            return ParamOnly(transposed=x)
    return PARAM_ONLY


# torch works this out anew, in Python, at each call.
broadcast_shape = lru_cache(maxsize=1024)(torch.broadcast_shapes)


class Lost(Exception):
    """Raised inside tag inference when the examples of a result cannot be told apart."""


def complete(tag: Tag) -> bool:
    """Whether every index belongs to an example."""
    return tag.explicit is None or NOBODY not in tag.explicit


def owners(tag: Tag, size: int, batch_size: int, device: torch.device | None = None) -> Tensor:
    """The owner of each index along ``tag.dim``: int64 [size].

    Example:
        >>> owners(Tag(0, step=2), 6, 3).tolist()
        [0, 0, 1, 1, 2, 2]
    """
    if tag.explicit is not None:
        return torch.tensor(tag.explicit, dtype=torch.int64, device=device)
    return (torch.arange(size, device=device) // tag.step) % batch_size


def rows(t: Tensor, tag: Tag, batch_size: int) -> Tensor:
    """Bring the examples to the front: [B, m, ...], m being what was folded into the dimension.

    With explicit owners m is the largest number of rows that an example has; the others are padded
    with zeros, which add nothing where rows are multiplied and summed.

    Example:
        >>> x = torch.arange(6).view(6, 1)                     # 3 examples, 2 positions folded in
        >>> rows(x, Tag(0, step=2), 3).shape
        torch.Size([3, 2, 1])
    """
    if tag.dim is None:
        return place(t[None], tag.step, batch_size)
    dim, step = tag.dim, tag.step
    if dim:
        t = t.movedim(dim, 0)
    if tag.explicit is not None:
        return _padded_rows(t, tag.explicit, batch_size)
    if t.shape[0] == batch_size:
        return t.unsqueeze(1)
    repeats = t.shape[0] // (batch_size * step)
    if repeats == 1:
        return t.view(batch_size, step, *t.shape[1:])  # as unflatten does, which is slow
    return t.view(repeats, batch_size, step, *t.shape[1:]).transpose(0, 1).flatten(1, 2)


def place(t: Tensor, example: int, batch_size: int) -> Tensor:
    """One example's tensor among zeros for the others, [B, *t.shape]."""
    if batch_size == 1:
        return t[None]
    placed = t.new_zeros(batch_size, *t.shape)
    placed[example] = t
    return placed


def _padded_rows(t: Tensor, explicit: tuple[int, ...], batch_size: int) -> Tensor:
    taken: list[list[int]] = [[] for _ in range(batch_size)]
    for i, owner in enumerate(explicit):
        if owner != NOBODY:
            taken[owner].append(i)
    longest = max(1, max(map(len, taken)))
    # One row past the end serves as padding.
    index = [own + [t.shape[0]] * (longest - len(own)) for own in taken]
    padded = torch.cat([t, t.new_zeros(1, *t.shape[1:])])
    return padded[torch.tensor(index, device=t.device)]


def separate(
    g: Tensor, tag: Tag, batch_size: int, start: int = 0, stop: int | None = None
) -> Tensor:
    """One copy of g for each example in [start, stop), zero wherever another example owns it.

    Returns [stop - start, *g.shape].
    """
    stop = batch_size if stop is None else stop
    wanted = torch.arange(start, stop, device=g.device)
    if tag.dim is None:
        mine = (wanted == tag.step).to(g.dtype)
        return g[None] * mine.view([-1] + [1] * g.dim())
    owner = owners(tag, g.shape[tag.dim], batch_size, g.device)
    mine = owner[None, :] == wanted[:, None]
    shape = [stop - start] + [g.shape[i] if i == tag.dim else 1 for i in range(g.dim())]
    # where, not a product: another example's inf must not become NaN in this one's copy.
    return torch.where(mine.view(shape), g[None], torch.zeros((), dtype=g.dtype, device=g.device))


def tag_after_view(shape: torch.Size, tag: Tag, new_shape: torch.Size, batch_size: int) -> Tag:
    """The tag after a reshape.

    In row-major order the owner of element f is ``(f // s) % B`` with ``s = step * inner size``. An
    output dimension of inner size q carries the examples if q divides s and the dimension spans
    whole periods of B * s elements.

    Raises:
        Lost: if no single dimension of the result tells the examples apart.

    Example:
        >>> tag_after_view(torch.Size([4, 5, 8]), Tag(0), torch.Size([20, 8]), 4)
        Tag(dim=0, step=5, explicit=None)
    """
    assert tag.dim is not None
    if tag.explicit is not None:
        return _explicit_after_view(shape, tag.dim, tag.explicit, new_shape)
    return _regular_after_view(shape, tag.dim, tag.step, new_shape, batch_size)


@lru_cache(maxsize=1024)
def _regular_after_view(
    shape: torch.Size, dim: int, step: int, new_shape: torch.Size, batch_size: int
) -> Tag:
    s = step * math.prod(shape[dim + 1 :])
    for i, n in enumerate(new_shape):
        q = math.prod(new_shape[i + 1 :])
        if s and q and n >= batch_size and s % q == 0 and (n * q) % (batch_size * s) == 0:
            return Tag(i, s // q)
    raise Lost(f"a reshape from {tuple(shape)} to {tuple(new_shape)} folds examples together")


def _explicit_after_view(
    shape: torch.Size, dim: int, explicit: tuple[int, ...], new_shape: torch.Size
) -> Tag:
    """As `_regular_after_view`; the period is all owners, in blocks of one owner that are as long as
    they can be."""
    if 0 in new_shape:
        return Tag(new_shape.index(0), 1, ())
    n = len(explicit)
    block = math.gcd(n, *(i for i in range(1, n) if explicit[i] != explicit[i - 1]))
    if block == n and explicit[0] != NOBODY:
        return Tag(None, explicit[0])
    each, inner = explicit[::block], block * math.prod(shape[dim + 1 :])
    for i, size in enumerate(new_shape):
        q = math.prod(new_shape[i + 1 :])
        if inner % q == 0 and (size * q) % (len(each) * inner) == 0:
            s = inner // q
            return Tag(i, 1, tuple(each[(j // s) % len(each)] for j in range(size)))
    raise Lost("a reshape folds irregularly ordered examples")


def shadow(shape: torch.Size, dim: int, device: torch.device) -> Tensor:
    """Indices along `dim`, broadcast to `shape` without memory: what a data-movement op is run on
    to learn where it puts the examples."""
    index = torch.arange(shape[dim], device=device)
    return index.view([-1 if i == dim else 1 for i in range(len(shape))]).expand(shape)


def read_shadow(moved: Tensor, tag: Tag, size: int, batch_size: int) -> Tag:
    """Read the tag off a moved `shadow`.

    Raises:
        Lost: if owners vary along more than one dimension.
    """
    if moved.numel() == 0:
        return Tag(moved.shape.index(0), 1, ())
    owner_of = owners(tag, size, batch_size, moved.device)
    varying = [i for i in range(moved.dim()) if moved.stride(i) != 0 and moved.shape[i] > 1]
    if len(varying) > 1:  # a copy: find what really varies
        varying = [i for i in varying if not bool((moved == moved.narrow(i, 0, 1)).all())]
    if len(varying) > 1:
        raise Lost("the examples vary along several dimensions")
    if not varying:
        return Tag(None, int(owner_of[moved.reshape(-1)[:1]]))
    dim = varying[0]
    for axis in reversed(range(moved.dim())):
        if axis != dim:
            moved = moved.select(axis, 0)
    return regular_or_explicit(owner_of[moved], dim, batch_size, tag.step)


def read_owners(owner: Tensor, batch_size: int) -> Tag | None:
    """The tag of a tensor whose every element's owner is given; None if it is all `NOBODY`'s.

    Raises:
        Lost: if owners vary along more than one dimension.

    Example:
        >>> read_owners(torch.tensor([[0, 0], [-1, 1]]), 2)
        Tag(dim=0, step=1, explicit=None)
    """
    if owner.numel() == 0:
        return None
    if owner.dim() == 0:
        return None if int(owner) == NOBODY else Tag(None, int(owner))
    single: int | None = None
    for dim in range(owner.dim()):
        along = owner.movedim(dim, 0).reshape(owner.shape[dim], -1).amax(1)
        view = along.view([-1 if i == dim else 1 for i in range(owner.dim())])
        if not bool(((owner == view) | (owner == NOBODY)).all()):
            continue
        found = along.unique()
        if found.numel() == 1 and int(found) == NOBODY:
            return None
        if found.numel() > 1:
            return regular_or_explicit(along, dim, batch_size)
        single = int(found)
    if single is None:
        raise Lost("the examples vary along several dimensions")
    return Tag(None, single)


def regular_or_explicit(owner: Tensor, dim: int, batch_size: int, hint: int = 1) -> Tag:
    """The shortest tag that gives these owners along `dim`."""
    n = owner.numel()
    if not n:
        return Tag(dim, 1, ())
    index = torch.arange(n, device=owner.device)
    for step in dict.fromkeys((hint, 1, n // batch_size)):
        if (
            step
            and n % (step * batch_size) == 0
            and torch.equal(owner, (index // step) % batch_size)
        ):
            return Tag(dim, step)
    explicit = tuple(owner.tolist())
    if explicit[0] != NOBODY and explicit.count(explicit[0]) == n:
        return Tag(None, explicit[0])
    return Tag(dim, 1, explicit)
