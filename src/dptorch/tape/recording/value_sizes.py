"""Follow sizes that depend on values: how many elements a mask picks, how many values are different.

A tensor's size is known to Python without a read. What it was made from is noted with the tensor, and
its sizes are handed out as `ValueSize`: a number that may give other tensors their shape, and
may not be compared, divided, printed or used as a value. Where a size leaves as a plain number
(``len``), it counts as a read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from dptorch.tape.provenance.calls import DYNAMIC, each_tensor, words
from dptorch.tape.provenance.tags import Mixed, Order, Reduced, Tag
from dptorch.tape.recording.reads import TRUSTED, is_trusted, note_read
from dptorch.tape.recording.tensor_states import owners_of
from dptorch.tape.rules.recorder import Recorder

__all__ = [
    "SIZES_MADE",
    "ValueSize",
    "follow_sizes",
    "is_sized",
    "mark_sized",
    "plain_sizes",
    "read_size",
]

_DIMS = "_dptorch_value_sizes"
_RANK = -1  # in place of a dimension: whether there is one more depends on values
_TRUSTED = (*TRUSTED, "einops")  # which asks for no more than sizes
_MIXED = Mixed("a size that depends on values")
#: Not empty once any size that depends on values was met in this process.
SIZES_MADE: list[bool] = []

_OF_RANK = words("dim ndimension .ndim .shape size __len__")
# These take sizes, and numbers of sizes, as what they are.
_SHAPING = words(
    """view reshape expand broadcast_to unflatten narrow split split_with_sizes chunk repeat tile
    zeros ones empty full new_zeros new_ones new_empty new_full rand randn randint zeros_like pad
    as_strided view_as unfold resize set_ index_add scatter one_hot repeat_interleave arange"""
)
# What these make holds no value of a size; the last element of ``arange(n)`` does.
_CREATING = words(
    """zeros ones empty full new_zeros new_ones new_empty new_full rand randn view reshape expand
    broadcast_to unflatten narrow repeat tile pad"""
)
# Ops that pass sizes on where they meet no example; others make a number of them.
_KEEPING = words(
    """zeros_like ones_like empty_like full_like rand_like randn_like view reshape flatten unsqueeze
    squeeze expand transpose permute t to float double half bfloat16 long int bool detach clone
    contiguous add sub mul div neg exp log cat stack"""
)


def is_sized(t: Tensor) -> bool:
    """Whether a size of `t` depends on values of examples."""
    return hasattr(t, _DIMS)


def mark_sized(t: Tensor, dims: frozenset[int]) -> None:
    """Say that the sizes of `t` along `dims` depend on values of examples."""
    if not SIZES_MADE:
        SIZES_MADE.append(True)
    setattr(t, _DIMS, dims)


class _Node:
    """What code of torch that takes a `ValueSize` unseen asks for its number: a read."""

    def __init__(self, recording: Recorder) -> None:
        self._recording = recording

    def __getattr__(self, name: str) -> NoReturn:
        note_read(self._recording, "a size that depends on values", (_MIXED,))
        raise AttributeError(name)


class ValueSize(torch.SymInt):
    """A size that depends on values of examples.

    Sums, products and whole quotients of it are such sizes too. To compare it, count a loop with it or
    turn it into a truth value, a fraction or a text is a read (`dptorch.tape.recording.reads`). It is
    not an `int`, whose number C code takes without asking, but what torch takes for a size.

    Attributes:
        number: the size.
        recording: of the forward pass that it was made in.
    """

    def __init__(self, number: int, recording: Recorder) -> None:
        self.number = number
        self.recording = recording
        self.node = _Node(recording)

    def __hash__(self) -> int:
        note_read(self.recording, "a size that depends on values", (_MIXED,))
        return hash(self.number)

    def __reduce__(self) -> Any:
        note_read(self.recording, "a size that depends on values", (_MIXED,))
        return int, (self.number,)


def _arithmetic(name: str) -> Callable[..., Any]:
    plain: Callable[..., Any] = getattr(int, name)

    def compute(self: ValueSize, *others: Any) -> Any:
        if any(type(o) not in (int, bool, ValueSize) for o in others):
            if isinstance(others[0], Tensor):
                return NotImplemented
            return _observation(name)(self, *others)
        numbers = [o.number if type(o) is ValueSize else o for o in others]
        return ValueSize(plain(self.number, *numbers), self.recording)

    return compute


def _observation(name: str) -> Callable[..., Any]:
    def look(self: ValueSize, *others: Any) -> Any:
        if others and isinstance(others[0], Tensor):
            return NotImplemented
        note_read(self.recording, "a size that depends on values", (_MIXED,))
        numbers = [o.number if type(o) is ValueSize else o for o in others]
        found = getattr(int, name)(self.number, *numbers)
        if found is NotImplemented:  # a fraction
            found = getattr(float, name)(float(self.number), *numbers)
        return found

    return look


for _name in words("add radd sub rsub mul rmul floordiv rfloordiv mod rmod neg pos abs"):
    setattr(ValueSize, f"__{_name}__", _arithmetic(f"__{_name}__"))
for _name in words(
    """eq ne lt le gt ge bool float int index truediv rtruediv pow rpow str repr format divmod rdivmod
    and rand or ror xor rxor lshift rlshift rshift rrshift invert round trunc floor ceil"""
):
    setattr(ValueSize, f"__{_name}__", _observation(f"__{_name}__"))


class _Shape(tuple):  # type: ignore[type-arg]
    """A shape with sizes that depend on values; `torch.Size` would give ``numel()`` away."""

    def numel(self) -> int:
        """The product of the sizes."""
        product = 1
        for size in self:
            product = size * product
        return product

    def __getitem__(self, index: Any) -> Any:
        found = tuple.__getitem__(self, index)
        return _Shape(found) if isinstance(index, slice) else found


def _plain(value: Any, found: list[ValueSize]) -> Any:
    if type(value) is ValueSize:
        found.append(value)
        return value.number
    if type(value) is _Shape:
        return torch.Size([_plain(v, found) for v in value])
    if type(value) in (tuple, list):
        return type(value)(_plain(v, found) for v in value)
    if type(value) is slice:
        return slice(*(_plain(v, found) for v in (value.start, value.stop, value.step)))
    return value


def plain_sizes(
    recording: Recorder, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], Mapping[str, Any], Mixed | bool]:
    """The arguments with plain numbers, and whether any depended on values: `Mixed` if it counts as a
    value itself."""
    found: list[ValueSize] = []
    args = tuple(_plain(a, found) for a in args)
    kwargs = {k: _plain(v, found) for k, v in kwargs.items()}
    if found and name not in _SHAPING:
        reason = f"'{name}' computes with a size that depends on the values of examples."
        return args, kwargs, Mixed(f"{recording.module_path()}: {reason}")
    return args, kwargs, bool(found)


def read_size(
    recording: Recorder,
    name: str,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Run a function that looks at no value, where sizes may depend on values.

    Raises:
        ExamplesMixError: for a size that leaves as a plain number.
    """
    found: list[ValueSize] = []
    args = tuple(_plain(a, found) for a in args)
    kwargs = {k: _plain(v, found) for k, v in kwargs.items()}
    out = func(*args, **kwargs)
    tensors = each_tensor(args, kwargs)
    t = next((t for t in tensors if is_sized(t)), None)
    if not recording.refuses_reads or (t is None and not found) or is_trusted(_TRUSTED):
        return out
    if t is None:  # broadcast_shapes
        everything = isinstance(out, torch.Size)
        return _Shape(ValueSize(n, recording) for n in out) if everything else out
    dims: frozenset[int] = getattr(t, _DIMS)
    if _RANK in dims and name in _OF_RANK:
        note_read(recording, name, (_MIXED,))
    if isinstance(out, torch.Size):
        return _Shape(ValueSize(n, recording) if d in dims else n for d, n in enumerate(out))
    if name in ("size", "sym_size"):
        assert t is not None
        dim = args[1] if len(args) > 1 else kwargs["dim"]
        return ValueSize(out, recording) if dim % t.dim() in dims else out
    if name in ("numel", "nelement", "sym_numel"):
        return ValueSize(out, recording)
    if name in ("__len__", "stride", ".nbytes", "sym_stride", "storage_offset", "is_same_size"):
        note_read(recording, name, (_MIXED,))
    return out


def follow_sizes(
    recording: Recorder,
    name: str,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    out: Any,
    given: bool = False,
) -> None:
    """Note which sizes of the results of an op depend on values.

    Args:
        given: whether the op was given a size that does.

    Raises:
        ExamplesMixError: where the number of results does.
    """
    operands = [] if name.startswith("new_") else each_tensor(args, kwargs)
    if name == "__getitem__" and len(operands) < 2 and not SIZES_MADE:
        return  # indexed by numbers and slices
    made = _depends(recording, name, args, kwargs)
    known = [t for t in operands if hasattr(t, _DIMS)]
    rank = frozenset({_RANK} if any(_has_rank(name, t, args, kwargs) for t in known) else ())
    if name in _UNPACKING or (not made and not known and not given):
        return
    if name in _PARTING and any(_parted(name, t, args, kwargs) for t in known):
        note_read(recording, name, (_MIXED,))
    fixed = [] if made else [t.shape for t in operands if not hasattr(t, _DIMS)]
    sizes = {t.shape[d] for t in known for d in getattr(t, _DIMS) if 0 <= d < t.dim()}
    for o in each_tensor((out,), {}):
        if name not in _RESIZING and (any(o is t for t in operands) or o.shape in fixed):
            continue
        state = recording.state(o)
        if not o.dim():
            dims = frozenset[int]()
        elif isinstance(state, Tag) and state.dim is not None:
            dims = frozenset((state.dim,))
        elif made or given:
            dims = frozenset(range(o.dim()))
        else:
            dims = frozenset(d for d, n in enumerate(o.shape) if n in sizes)
            dims = dims or frozenset(range(o.dim()))
        if dims | rank:
            mark_sized(o, dims | rank)
        reason = ""
        if state is None and not made and name not in (_CREATING if given else _KEEPING):
            reason = f"'{name}' makes a value of a size that depends on the values of examples."
        elif name in _PICKING and known and _picks_by_place(recording, operands, o, state):
            reason = f"'{name}' picks rows by their place among rows whose number varies."
        if reason:
            recording.mark(o, Mixed(f"{recording.module_path()}: {reason}"))


# Their results have as many dimensions as other operands or arguments say.
_KEEPING_RANK = words(
    """index_select index_add index_copy index_fill index_reduce view reshape flatten expand linear
    cat"""
)
_PARTING = words("unbind split chunk tensor_split __iter__ hsplit vsplit dsplit split_with_sizes")
_RESIZING = words("resize resize_as")
# Their results have one row an example again, and the length that a caller chose or the longest has.
_UNPACKING = words("_pad_packed_sequence")
_PICKING = words("__getitem__ index narrow select index_select take roll flip slice gather")


def _picks_by_place(recording: Recorder, operands: list[Tensor], o: Tensor, state: Any) -> bool:
    """Whether rows of examples of different sizes were picked by numbers that are no example's."""
    x, *others = operands
    before = recording.state(x)
    if not (is_sized(x) and isinstance(state, Tag) and isinstance(before, Tag)):
        return False
    if before.dim is None or any(recording.state(t) is not None for t in others):
        return False
    size = recording.batch_size
    return owners_of(o, state, size) != owners_of(x, before, size)


def _has_rank(name: str, t: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a result has one dimension less where `t` has one element along a size by values."""
    dims: frozenset[int] = getattr(t, _DIMS)
    if name != "squeeze":
        return _RANK in dims and name not in _KEEPING_RANK
    given = args[1] if len(args) > 1 else kwargs.get("dim", tuple(range(t.dim())))
    named = (given,) if isinstance(given, int) else given
    return any(d % max(t.dim(), 1) in dims for d in named)


def _parted(name: str, t: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a tensor is parted along a size that depends on values."""
    place = 1 if name == "unbind" else 2
    dim = kwargs.get("dim", args[place] if len(args) > place else 0)
    return dim % max(t.dim(), 1) in getattr(t, _DIMS)


def _depends(
    recording: Recorder, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bool:
    """Whether the size of what an op makes depends on values of examples."""
    deciding = _deciding(name, args, kwargs)
    return any(isinstance(recording.state(t), (Tag, Mixed, Reduced, Order)) for t in deciding)


def _deciding(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The operands whose values decide how large the result is."""
    tensors = each_tensor(args, kwargs)
    if name in ("__getitem__", "index", "_unsafe_index"):
        return [t for t in tensors[1:] if t.dtype in (torch.bool, torch.uint8)]
    if name == "where":
        return tensors if len(args) + len(kwargs) == 1 else []
    if name == "repeat_interleave":
        return tensors[-1:] if len(tensors) > 1 or len(args) + len(kwargs) == 1 else []
    if name == "one_hot":
        classes = args[1] if len(args) > 1 else kwargs.get("num_classes", -1)
        return tensors if classes == -1 else []
    if name == "masked_select":
        return tensors[1:]
    if name == "bincount":
        return tensors[:1]
    return tensors if name in DYNAMIC else []
