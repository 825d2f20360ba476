"""One intercepted torch function call, and what its name means."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dptorch.tape.provenance.schemas import bind
from dptorch.tape.provenance.tags import Tag

__all__ = [
    "DYNAMIC",
    "INFO",
    "Call",
    "Info",
    "canonical_name",
    "each_tensor",
    "info",
    "replace_tensors",
    "words",
]


def words(text: str) -> frozenset[str]:
    """The words of a text: a readable way to write long lists of names.

    Example:
        >>> sorted(words("add sub"))
        ['add', 'sub']
    """
    return frozenset(text.split())


# Operators arrive under their dunder, reflected and in-place names.
_DUNDERS = {
    "truediv": "div",
    "itruediv": "div",
    "rtruediv": "rdiv",
    "rdiv": "rdiv",
    "idiv": "div",
    "floordiv": "floor_divide",
    "rfloordiv": "floor_divide",
    "ifloordiv": "floor_divide",
    "mod": "remainder",
    "rmod": "remainder",
    "imod": "remainder",
    "and": "bitwise_and",
    "rand": "bitwise_and",
    "iand": "bitwise_and",
    "or": "bitwise_or",
    "ror": "bitwise_or",
    "ior": "bitwise_or",
    "xor": "bitwise_xor",
    "ixor": "bitwise_xor",
    "rxor": "bitwise_xor",
    "invert": "bitwise_not",
    "radd": "add",
    "iadd": "add",
    "rsub": "sub",
    "isub": "sub",
    "rmul": "mul",
    "imul": "mul",
    "rpow": "pow",
    "ipow": "pow",
    "imatmul": "matmul",
    "ilshift": "lshift",
    "irshift": "rshift",
}
_SYNONYMS = {
    "multiply": "mul",
    "subtract": "sub",
    "divide": "div",
    "true_divide": "div",
    "negative": "neg",
    "absolute": "abs",
    "concat": "cat",
    "concatenate": "cat",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "moveaxis": "movedim",
}
_IN_PLACE_DUNDERS = words(
    """iadd isub imul itruediv idiv ifloordiv imod ipow imatmul iand ior ixor ilshift irshift"""
)
_OPERATORS = words("""add sub mul pow matmul neg pos abs eq ne lt le gt ge lshift rshift""")


def canonical_name(func: Callable[..., Any]) -> str:
    """The plain name of a torch function: ``Tensor.__iadd__``, ``torch.add`` and ``add_`` are "add".

    Properties arrive as the ``__get__`` of a descriptor; they get the property's name with a
    leading dot (".shape", ".T").

    Example:
        >>> canonical_name(torch.Tensor.__iadd__), canonical_name(torch.Tensor.mul_)
        ('add', 'mul')
    """
    if func is F.unfold:  # not Tensor.unfold, which moves data along one dimension
        return "im2col"
    if isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return _operator_name(func)
    module = getattr(func, "__module__", None)
    if isinstance(func, types.FunctionType) and not f"{module}.".startswith("torch."):
        return f"{module}.{func.__qualname__}"  # a library's own function is not torch's namesake
    name: str = getattr(func, "__name__", type(func).__name__)
    if name == "__get__":
        return "." + str(getattr(getattr(func, "__self__", None), "__name__", "?"))
    if name.startswith("__") and name.endswith("__"):
        inner = name[2:-2]
        return inner if inner in _OPERATORS else _DUNDERS.get(inner, name)
    if name.endswith("_"):
        name = name[:-1]
    return _SYNONYMS.get(name, name)


def _operator_name(func: Any) -> str:
    packet = getattr(func, "_overloadpacket", func)
    name: str = packet.__name__
    space = packet._qualified_op_name.partition("::")[0]
    bare = name.rstrip("_")
    return _SYNONYMS.get(bare, bare) if space == "aten" else f"{space}::{name}"


class Info(NamedTuple):
    """What a torch function is, worked out once.

    Attributes:
        name: its `canonical_name`.
        in_place: whether its name says that it writes to its first argument.
        passive: it makes no tensor of the batch, or none that matters.
        sizes_by_values: the size of its result can depend on values.
    """

    name: str
    in_place: bool
    passive: bool
    sizes_by_values: bool


#: Ops whose result has a size that depends on values: those that torch tags so, and their relatives.
DYNAMIC = words(
    """nonzero argwhere unique _unique _unique2 unique_dim unique_consecutive masked_select bincount
    repeat_interleave one_hot __getitem__ index _unsafe_index where to_sparse to_sparse_coo
    to_sparse_csr to_sparse_csc to_sparse_bsr to_sparse_bsc indices values _indices _values
    crow_indices col_indices coalesce _pack_padded_sequence pack_padded_sequence
    combinations resize resize_as"""
)
# Functions that make no tensor of the batch, or none that matters.
_PASSIVE = words(
    """size dim ndimension numel nelement stride is_floating_point is_complex element_size
    is_contiguous storage_offset is_same_size get_device
    register_post_accumulate_grad_hook is_tensor result_type
    can_cast is_storage is_inference is_grad_enabled is_signed has_names is_conj is_neg
    is_pinned is_shared promote_types broadcast_shapes is_set_to autograd_backward __len__ __hash__
    __array_wrap__ __dir__ __setstate__ __delete__ __dlpack_device__ is_coalesced sparse_dim dense_dim
    _is_view is_distributed sym_size sym_numel sym_stride sym_storage_offset"""
)
# Properties that hand out memory, gradients or code that changes them.
_ACTIVE_PROPERTIES = frozenset({".__cuda_array_interface__", ".grad", ".grad_fn"})
_TENSOR_PROPERTIES = frozenset({".T", ".mT", ".H", ".mH", ".data", ".real", ".imag"})
#: What `info` remembers.
INFO: dict[Any, Info] = {}


def info(func: Callable[..., Any]) -> Info:
    """What `func` is; remembered."""
    try:
        return INFO[func]
    except KeyError:
        found = _describe(func)
        INFO[func] = found
        return found
    except TypeError:  # unhashable
        return _describe(func)


def _describe(func: Callable[..., Any]) -> Info:
    name = canonical_name(func)
    raw = getattr(func, "__name__", "")
    dunder = raw.startswith("__") and raw.endswith("__")
    if raw == "__set__":
        name = "." + str(getattr(getattr(func, "__self__", None), "__name__", "?")) + "="
    in_place = raw == "__setitem__" or (
        raw[2:-2] in _IN_PLACE_DUNDERS if dunder else raw.endswith("_")
    )
    passive = name in _PASSIVE or (
        name[0] == "." and name not in _TENSOR_PROPERTIES and name not in _ACTIVE_PROPERTIES
    )
    sets = name in (".data=", ".requires_grad=")
    return Info(name, in_place, passive and not sets, name in DYNAMIC)


# Kinds of argument that are no tensor and hold none; a look here is cheaper than isinstance.
_NO_TENSOR = frozenset(
    {int, float, bool, str, type(None), torch.Size, torch.dtype, torch.device, torch.memory_format}
)


def each_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Every tensor among the arguments, in order, inside lists and tuples too (two levels)."""
    found = []
    for a in (*args, *kwargs.values()) if kwargs else args:
        kind = type(a)
        if kind in _NO_TENSOR:
            continue
        if kind is Tensor or isinstance(a, Tensor):
            found.append(a)
        elif isinstance(a, (list, tuple)):
            for b in a:
                if isinstance(b, Tensor):
                    found.append(b)
                elif isinstance(b, (list, tuple)):
                    found += [c for c in b if isinstance(c, Tensor)]
    return found


def replace_tensors(value: Any, table: Mapping[int, Tensor]) -> Any:
    """`value` with each tensor whose ``id`` is in `table` replaced, through lists and tuples."""
    if isinstance(value, Tensor):
        return table.get(id(value), value)
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        new = [replace_tensors(v, table) for v in value]
        if hasattr(value, "_fields") or type(value).__module__ == "torch.return_types":
            return type(value)(*new) if hasattr(value, "_fields") else type(value)(new)
        return type(value)(new)
    return value


class Call:
    """A torch function call with at least one operand that carries examples.

    Attributes:
        func: what was called; may be called again outside the recording.
        name: its canonical name.
        args, kwargs: as given.
        tagged: (tensor, tag) of each operand that carries examples.
        parameters: distinct operands whose per-example gradient is wanted (parameters and
            param-only tensors).
        batch_size: number of examples B.
        in_place: whether the call writes to its first argument.
    """

    __slots__ = (
        "_bound",
        "args",
        "batch_size",
        "func",
        "in_place",
        "kwargs",
        "name",
        "parameters",
        "tagged",
    )

    def __init__(
        self,
        func: Callable[..., Any],
        name: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        tagged: list[tuple[Tensor, Tag]],
        parameters: list[Tensor],
        batch_size: int,
        in_place: bool = False,
    ) -> None:
        self.func = func
        self.name = name
        self.args = args
        self.kwargs = kwargs
        self.tagged = tagged
        self.parameters = parameters
        self.batch_size = batch_size
        self.in_place = in_place
        self._bound: dict[str, Any] | None = None

    @property
    def bound(self) -> dict[str, Any]:
        """The arguments by the names that torch gives them, in the order of its schema."""
        if self._bound is None:
            self._bound = bind(self.func, self.args, self.kwargs)
        return self._bound

    def arg(self, name: str, default: Any = None) -> Any:
        """An argument by the name that torch gives it, however it was passed."""
        return self.bound.get(name, default)

    @property
    def first(self) -> Any:
        """The first operand, whatever it is called."""
        return self.args[0] if self.args else next(iter(self.bound.values()), None)

    def operands(self) -> list[Tensor]:
        """The arguments that are tensors, in the order of the schema."""
        values = self.bound.values() if self.kwargs else self.args
        return [v for v in values if isinstance(v, Tensor)]

    def tag_of(self, t: Any) -> Tag | None:
        """The tag of an operand, or None if it carries no examples."""
        for other, tag in self.tagged:
            if other is t:
                return tag
        return None

    def is_parameter(self, t: Any) -> bool:
        """Whether `t` is one of the operands whose per-example gradient is wanted."""
        return id(t) in map(id, self.parameters)

    def run(self, table: Mapping[int, Tensor] | None = None) -> Any:
        """Call the function, with some operands replaced."""
        if not table:
            return self.func(*self.args, **self.kwargs)
        args = tuple(replace_tensors(a, table) for a in self.args)
        kwargs = {k: replace_tensors(v, table) for k, v in self.kwargs.items()}
        return self.func(*args, **kwargs)
