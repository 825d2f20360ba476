"""Torch functions written in Python: run so that the ops inside them are seen.

Inside the handler of a function mode the mode is off, so the body of
``F.multi_head_attention_forward`` would run unseen, and calling the function again would only hand
it back to the mode. It is therefore rebuilt with its override checks answered "no".
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

__all__ = ["is_composite", "without_checks"]

_OVERRIDE_CHECKS = (
    "has_torch_function",
    "has_torch_function_unary",
    "has_torch_function_variadic",
)


def is_composite(func: Callable[..., Any]) -> bool:
    """Whether `func` is a Python function that offers itself to function modes, in torch's own way: a
    library's that looks the checks up elsewhere cannot be rebuilt, and is opened as any unknown op."""
    code, scope = getattr(func, "__code__", None), getattr(func, "__globals__", {})
    return code is not None and any(c in code.co_names and c in scope for c in _OVERRIDE_CHECKS)


_COPIES: dict[Any, Callable[..., Any]] = {}


def without_checks(func: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a Python-level torch function that does not hand itself back to the mode."""
    if func not in _COPIES:
        scope = dict(func.__globals__)
        scope.update({check: lambda *a, **k: False for check in _OVERRIDE_CHECKS})
        copy = types.FunctionType(
            func.__code__,
            scope,
            func.__name__,
            func.__defaults__,
            func.__closure__,
        )
        copy.__kwdefaults__ = func.__kwdefaults__
        _COPIES[func] = copy
    return _COPIES[func]
