"""Functions that make a tensor of another, which torch hands to no tensor subclass.

``torch.tensor(t)``, ``Tensor(t)``, ``Variable(t)`` and ``t.as_subclass(cls)`` return plain tensors
whatever the class of `t` is, and ``other.data = t`` leaves `other` one. They are replaced, once, when
the first model is hooked, also where a program bound them to a name of a module before; of anything
but a followed tensor they make what they made before. ``torch.FloatTensor(t)`` and its kin are types of
C that cannot be replaced, and are not followed.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
import torch.jit._builtins as script
from torch import Tensor
from torch._functorch import eager_transforms
from torch._functorch import vmap as functorch_vmap
from torch.autograd import Variable, forward_ad
from torch.utils._device import _device_constructors

from dptorch.errors import NotCoveredError
from dptorch.tape.provenance.tags import Mixed, Tag
from dptorch.tape.recording.handlers import SPECIAL
from dptorch.tape.recording.outputs import RecordedTensor, leaving, made_from, promote
from dptorch.tape.recording.places import user_line
from dptorch.tape.recording.read_numbers import read_numbers
from dptorch.tape.recording.recording import innermost

__all__ = ["follow_constructors"]

_FUNCTIONS = ("tensor", "as_tensor", "asarray")
# Which take tensors for numbers; of some of them the first argument lends no more than its shape.
_OF_NUMBERS = ("full", "full_like", "linspace", "logspace", "arange", "scalar_tensor")
_OF_ITS_SHAPE = ("full_like", "new_full")
_METHODS = ("new_tensor", "new_full", "new", "as_subclass", "_make_subclass")
_MOST = 16  # numbers in a list that are looked for among those that were read
_done = False


def follow_constructors() -> None:
    """Let the constructors return followed tensors for followed tensors."""
    global _done
    if _done:
        return
    _done = True
    # ``with torch.device(...)`` knows constructors by identity, from a table made when first asked for:
    # asked now, it holds those that the replacements call.
    _device_constructors()
    for name in (*_FUNCTIONS, *_OF_NUMBERS):
        plain = getattr(torch, name)
        followed = _function(plain) if name in _FUNCTIONS else _method(plain)
        setattr(torch, name, followed)
        _rebind(plain, followed)
        if script._builtin_table is not None and name != "asarray":
            script._register_builtin(followed, f"aten::{name}")
    for name in _METHODS:
        method = _method(getattr(Tensor, name))
        setattr(Tensor, name, staticmethod(method) if name == "_make_subclass" else method)
    for name in ("to_dlpack", "from_dlpack"):
        exchange = _method(getattr(torch, name))
        setattr(torch, name, exchange)
        setattr(torch.utils.dlpack, name, exchange)
    Tensor.data = _Data()  # type: ignore[assignment]
    Variable.__new__ = _new(Variable.__new__)  # type: ignore[method-assign]
    Tensor.__new__ = _new(Tensor.__new__)  # type: ignore[method-assign]
    for module, name in ((functorch_vmap, "_add_batch_dim"), (eager_transforms, "_wrap_for_grad")):
        setattr(module, name, _refusing(getattr(module, name)))
    for module, name in ((forward_ad, "make_dual"), (eager_transforms, "_wrap_functional_tensor")):
        setattr(module, name, _refusing(getattr(module, name), in_models=True))


_plain_data: Any = torch._C.TensorBase.data


class _Data:
    """``Tensor.data``, which asks only the tensor that is assigned to."""

    def __get__(self, t: Tensor | None, kind: Any = None) -> Any:
        return _plain_data if t is None else _plain_data.__get__(t)

    def __set__(self, t: Tensor, value: Any) -> None:
        if isinstance(value, RecordedTensor) and not isinstance(t, RecordedTensor):
            RecordedTensor.__torch_function__(_plain_data.__set__, (), (t, value))
        else:
            _plain_data.__set__(t, value)


def _rebind(plain: object, followed: object) -> None:
    """Replace a function where a program has it by ``from torch import tensor``."""
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] not in ("torch", "dptorch"):
            for name, value in list(getattr(module, "__dict__", {}).items()):
                if value is plain:
                    setattr(module, name, followed)


def _function(plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def make(*args: Any, **kwargs: Any) -> Any:
        made = plain(*args, **kwargs)
        data = args[0] if args else kwargs.get("data", kwargs.get("obj"))
        if isinstance(data, RecordedTensor):
            # Inside a recorded forward pass its function mode has seen the call.
            return made if made is data or innermost() is not None else made_from(data, made)
        leaves = _leaves(data) if isinstance(data, (list, tuple)) else [data]
        if RecordedTensor in set(map(type, leaves)) and innermost() is None:
            numbers = [v.detach() if isinstance(v, Tensor) else plain(v) for v in leaves]
            stacked = torch.stack([v.reshape(()) for v in numbers]).reshape(made.shape)
            if isinstance(stacked, RecordedTensor):
                return made_from(stacked, made)
        if len(leaves) <= _MOST and any(type(v) is float for v in leaves):
            _follow_numbers(made, leaves)
        return made

    return make


def _follow_numbers(made: Tensor, numbers: Sequence[Any]) -> None:
    """Say that a tensor was made of numbers that were read from a batch, if one of them was."""
    for number in numbers:
        batch, owner = read_numbers.owner_of(number) or (None, None)
        if batch is not None and batch.beside is not None:
            state = Mixed(
                f"{user_line()}: a tensor is made of a number that was read from the batch."
            )
            own = Tag(None, owner) if owner is not None and len(numbers) == 1 else state
            batch.beside.mark(made, own)
            promote(made, innermost() or batch.beside)
            return


def _leaves(data: list[Any] | tuple[Any, ...]) -> Sequence[Any]:
    """The elements of a list, of lists inside it too, but for the elements of tensors."""
    if not any(issubclass(kind, (list, tuple)) for kind in set(map(type, data))):
        return data  # a list of numbers may be long
    found: list[Any] = []
    for value in data:
        if isinstance(value, (list, tuple)):
            found += _leaves(value)
        else:
            found.append(value)
    return found


def _method(plain: Callable[..., Any]) -> Callable[..., Any]:
    first = 1 if plain.__name__ in _OF_ITS_SHAPE else 0

    @functools.wraps(plain)
    def make(*args: Any, **kwargs: Any) -> Any:
        made = plain(*args, **kwargs)
        for data in (*args[first:], *kwargs.values()):
            if isinstance(data, RecordedTensor) and not isinstance(made, RecordedTensor):
                if innermost() is None and isinstance(made, Tensor):
                    made = made_from(data, made)
                if isinstance(made, RecordedTensor):
                    break
                leaving(data)  # a Parameter, say, is not followed and known by its values
        return made

    return make


def _new(plain: Callable[..., Any]) -> Any:
    # Dynamo takes it for the function that it knows, by its signature of any arguments.
    def new(*args: Any, **kwargs: Any) -> Any:
        made = plain(*args, **kwargs)
        data = args[1] if len(args) > 1 else kwargs.get("data")
        if isinstance(data, Tensor):
            recording = innermost()
            if recording is not None:
                SPECIAL["tensor"](recording, lambda _: made, "tensor", (data,), {})
            elif isinstance(data, RecordedTensor):
                return made_from(data, made)
        return made

    return staticmethod(new)


def _refusing(plain: Callable[..., Any], *, in_models: bool = False) -> Callable[..., Any]:
    """What wraps the arguments of a function under torch.func, which runs without followed tensors.

    Args:
        in_models: whether recorded forward passes are refused too, whose modes do not see them inside.
    """

    @functools.wraps(plain)
    def wrap(*args: Any, **kwargs: Any) -> Any:
        recording = innermost() if in_models else None
        for value in (*args, *kwargs.values()):
            known = recording is not None and isinstance(value, Tensor) and recording.state(value)
            if known or isinstance(value, RecordedTensor):
                _refuse()
        return plain(*args, **kwargs)

    return wrap


def _refuse() -> NoReturn:
    raise NotCoveredError(
        f"{user_line()}: a function runs on the examples of the batch inside torch.func (vmap, grad, "
        "...), where they cannot be followed. Write it with ordinary ops on batched tensors, or "
        "torch.autograd.grad."
    )
