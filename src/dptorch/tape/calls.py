"""One intercepted torch function call, and what its name means."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dptorch.tape.provenance import Tag

__all__ = ["Call", "canonical_name", "each_tensor", "replace_tensors"]

# Operators arrive under their dunder, reflected and in-place names.
_DUNDERS = {
    "truediv": "div",
    "itruediv": "div",
    "rtruediv": "div",
    "rdiv": "div",
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
    "invert": "bitwise_not",
    "radd": "add",
    "iadd": "add",
    "rsub": "sub",
    "isub": "sub",
    "rmul": "mul",
    "imul": "mul",
    "rpow": "pow",
    "ipow": "pow",
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
_OPERATORS = frozenset(
    "add sub mul pow matmul neg pos abs eq ne lt le gt ge lshift rshift".split()
)


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
    name: str = getattr(func, "__name__", type(func).__name__)
    if name == "__get__":
        return "." + str(getattr(getattr(func, "__self__", None), "__name__", "?"))
    if name.startswith("__") and name.endswith("__"):
        inner = name[2:-2]
        return inner if inner in _OPERATORS else _DUNDERS.get(inner, name)
    if name.endswith("_"):
        name = name[:-1]
    return _SYNONYMS.get(name, name)


def each_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """Every tensor among the arguments, in order, inside lists and tuples too (two levels)."""
    for a in args:
        if isinstance(a, Tensor):
            yield a
        elif isinstance(a, (list, tuple)):
            for b in a:
                if isinstance(b, Tensor):
                    yield b
                elif isinstance(b, (list, tuple)):
                    yield from (c for c in b if isinstance(c, Tensor))
    for a in kwargs.values():
        if isinstance(a, Tensor):
            yield a
        elif isinstance(a, (list, tuple)):
            yield from (b for b in a if isinstance(b, Tensor))


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
    """

    __slots__ = ("args", "batch_size", "func", "kwargs", "name", "parameters", "tagged")

    def __init__(
        self,
        func: Callable[..., Any],
        name: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        tagged: list[tuple[Tensor, Tag]],
        parameters: list[Tensor],
        batch_size: int,
    ) -> None:
        self.func = func
        self.name = name
        self.args = args
        self.kwargs = kwargs
        self.tagged = tagged
        self.parameters = parameters
        self.batch_size = batch_size

    def arg(self, position: int, keyword: str, default: Any = None) -> Any:
        """An argument by position or keyword."""
        if len(self.args) > position:
            return self.args[position]
        return self.kwargs.get(keyword, default)

    def tag_of(self, t: Any) -> Tag | None:
        """The tag of an operand, or None if it carries no examples."""
        for other, tag in self.tagged:
            if other is t:
                return tag
        return None

    def is_parameter(self, t: Any) -> bool:
        """Whether `t` is one of the operands whose per-example gradient is wanted."""
        return any(p is t for p in self.parameters)

    def run(self, table: Mapping[int, Tensor] | None = None) -> Any:
        """Call the function, with some operands replaced."""
        if not table:
            return self.func(*self.args, **self.kwargs)
        args = tuple(replace_tensors(a, table) for a in self.args)
        kwargs = {k: replace_tensors(v, table) for k, v in self.kwargs.items()}
        return self.func(*args, **kwargs)
