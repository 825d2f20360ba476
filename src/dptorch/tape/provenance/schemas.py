"""The names of a torch function's arguments, whatever way they were passed.

``baddbmm(x, a, b)`` and ``baddbmm(x, batch1=a, batch2=b)`` are one call. Torch itself says what an
argument is called: a Python function by its signature, a builtin by the schemas of its operator.
Which schema of several is meant is decided by the kinds of the arguments, once for each mixture of
kinds.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["bind"]

# Spellings that torch takes for a schema's own: numpy's, and the two names of the first operand.
_SPELLINGS = {
    "self": "input",
    "x": "input",
    "a": "input",
    "x1": "input",
    "x2": "other",
    "axis": "dim",
    "axis0": "dim0",
    "axis1": "dim1",
    "keepdims": "keepdim",
}


class _Schema(NamedTuple):
    """The arguments of one overload: names and kinds in order; how many may be passed by position."""

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    by_position: int


class _Layout(NamedTuple):
    """Where the arguments of one mixture of kinds go: a name for each position; whether the last takes
    all that is left; and every name, for keywords."""

    names: tuple[str, ...]
    rest: bool
    known: tuple[str, ...]


_OPERATORS = {"truediv": "div", "floordiv": "floor_divide", "mod": "remainder"}
_SIGNATURES: dict[Any, tuple[str, ...] | None] = {}
_PLAIN = frozenset({Tensor, torch.nn.Parameter, int, float, bool, type(None), torch.dtype})
_LAYOUTS: dict[tuple[Any, ...], _Layout | None] = {}


def bind(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by name, in the order of the schema.

    The first operand of a builtin, "self" in schemas, is called "input" as in torch's documentation;
    Python functions keep the names of their signature. Arguments that were not passed are absent.
    What torch has no schema of (a custom Function's ``apply``) gives its keywords alone.

    Example:
        >>> x = torch.ones(2, 3, 3)
        >>> list(bind(torch.baddbmm, (x, x), {"batch2": x}))
        ['input', 'batch1', 'batch2']
        >>> bind(torch.Tensor.permute, (x, 2, 0, 1), {})["dims"]
        (2, 0, 1)
    """
    layout = _layout(func, args, kwargs)
    bound: dict[str, Any]
    if layout is None:
        bound = {}
    else:
        bound = dict(zip(layout.names, args, strict=False))
        if layout.rest:
            last = len(layout.names) - 1
            bound[layout.names[last]] = tuple(args[last:])
    if kwargs:
        known = layout.known if layout is not None else ()
        for name, value in kwargs.items():
            own = name if name in known else _SPELLINGS.get(name, name)
            bound[own] = value
        if layout is not None:  # by keyword they came in any order
            bound = {n: bound[n] for n in layout.known if n in bound} | bound
    return bound


def _layout(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> _Layout | None:
    try:
        names = _SIGNATURES[func]
    except KeyError:
        names = _SIGNATURES[func] = _signature(func)
    except TypeError:  # unhashable
        return None
    if names is not None:
        return _Layout(names, False, names)
    kinds = [kind if (kind := type(a)) in _PLAIN else _kind(a) for a in args]
    key = (func, *kinds, None, *kwargs) if kwargs else (func, *kinds)
    try:
        return _LAYOUTS[key]
    except KeyError:
        found = _LAYOUTS[key] = _choose(func, args, kwargs)
        return found


def _kind(value: Any) -> Any:
    """What decides between overloads; the first member tells lists of tensors from lists of ints."""
    if isinstance(value, (list, tuple)) and value:
        return type(value), type(value[0])
    return type(value)


def _signature(func: Callable[..., Any]) -> tuple[str, ...] | None:
    """The names of a Python function's arguments by position; None for a builtin."""
    if isinstance(func, torch._ops.OpOverload):
        return tuple(_name(a.name) for a in func._schema.arguments)
    try:
        parameters = list(inspect.signature(func).parameters.values())
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if names and names[0] == "self":
        names[0] = "input"
    # slot wrappers have a signature without names worth having: (self, value, /)
    return None if type(func) is type(Tensor.__add__) else tuple(names)


def _name(name: str) -> str:
    return _SPELLINGS[name] if name in ("self", "axis0", "axis1") else name


def schemas_of(func: Callable[..., Any]) -> list[_Schema]:
    """The overloads of the operator that a builtin is, those that write to ``out=`` left out."""
    raw = getattr(func, "__name__", "")
    bare = raw[2:-2] if raw.startswith("__") and raw.endswith("__") else raw
    for name in (raw, bare, bare[1:]):  # __iadd__, __radd__
        name = _OPERATORS.get(name, name)
        found = torch._C._jit_get_schemas_for_operator(f"aten::{name}") if name else []
        if found:
            break
    kept = []
    for schema in found:
        if any(a.is_out for a in schema.arguments):
            continue
        arguments = schema.arguments
        kept.append(
            _Schema(
                tuple(_name(a.name) for a in arguments),
                tuple(str(a.real_type).replace("SymInt", "int") for a in arguments),
                sum(not a.kwarg_only for a in arguments),
            )
        )
    return kept


def _choose(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> _Layout | None:
    # A number may stand for a tensor, but where an overload takes the number itself, that is meant.
    schemas = schemas_of(func)
    for numbers in (False, True):
        for schema in schemas:
            found = _place(schema, args, kwargs, numbers)
            if found is not None:
                return found
    # Casts (x.long()) have no schema.
    return _Layout(("input",), False, ("input",)) if args else None


def _place(
    schema: _Schema, args: Sequence[Any], kwargs: Mapping[str, Any], numbers: bool
) -> _Layout | None:
    """How a call fits one overload; None if it does not."""
    names, kinds = schema.names, schema.kinds
    for k in kwargs:
        if k != "out" and k not in names and _SPELLINGS.get(k, k) not in names:
            return None
    positional = names[: schema.by_position]
    fits = [_fits(k, v, numbers) for k, v in zip(kinds, args, strict=False)]
    if len(args) <= len(positional) and all(fits):
        return _Layout(positional[: len(args)], False, names)
    # x.permute(2, 0, 1), x.view(-1, 3): the last argument by position is a list written out.
    for last in range(min(len(positional), len(args))):
        listed = kinds[last] == "List[int]" and all(fits[:last])
        if listed and all(_fits("int", v, False) for v in args[last:]):
            return _Layout(positional[: last + 1], True, names)
    return None


def _fits(kind: str, value: Any, numbers: bool) -> bool:
    """Whether torch takes `value` for an argument of a schema's `kind`."""
    if kind.startswith("Optional["):
        return value is None or _fits(kind[9:-1], value, numbers)
    whole = isinstance(value, int) and not isinstance(value, bool)
    scalar = isinstance(value, Tensor) and value.dim() == 0
    if kind == "Tensor":
        return isinstance(value, Tensor) or (numbers and isinstance(value, (int, float, complex)))
    if kind.startswith("List["):
        inner = kind[5:-1]
        if isinstance(value, (list, tuple)):
            return all(_fits(inner, v, numbers) for v in value)
        return inner == "int" and whole
    if kind == "int":
        return whole or scalar or _is_code(value)
    if kind in ("float", "number"):
        return isinstance(value, (int, float, complex)) or scalar
    if kind in ("bool", "str"):
        return isinstance(value, bool if kind == "bool" else str)
    return not isinstance(value, (Tensor, str))  # devices, generators


def _is_code(value: Any) -> bool:
    """Dtypes, layouts and memory formats, which schemas give as ints."""
    return isinstance(value, (torch.dtype, torch.layout, torch.memory_format))
