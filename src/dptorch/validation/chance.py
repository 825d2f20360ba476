"""Replace random draws in a model, so that one example alone computes what it does in a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dptorch.tape.provenance.calls import canonical_name

__all__ = ["FixedChance", "no_chance"]

_DROPOUTS = frozenset(
    [
        "dropout",
        "alpha_dropout",
        "feature_dropout",
        "feature_alpha_dropout",
        "dropout1d",
        "dropout2d",
        "dropout3d",
    ]
)
_NORMAL = 0.75  # what every standard normal draw becomes: any number that is not special
_DROPOUT_POSITION = {"scaled_dot_product_attention": 4, "multi_head_attention_forward": 10}


class FixedChance(TorchFunctionMode):
    """Random functions return the same number everywhere, dropout returns its input.

    Each example then meets the same draws whatever batch it is in, without which a batch cannot be
    compared with a loop. Ops that draw in other ways stay random.

    Example:
        >>> with FixedChance():
        ...     torch.rand(2).tolist(), nn.functional.dropout(torch.ones(2)).tolist()
        ([0.5, 0.5], [1.0, 1.0])
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = canonical_name(func)
        if name in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if name == "native_dropout":
            return args[0], torch.ones_like(args[0], dtype=torch.bool)
        position = _DROPOUT_POSITION.get(name)
        if position is not None:
            if len(args) > position:
                args = (*args[:position], 0.0, *args[position + 1 :])
            elif "dropout_p" in kwargs:
                kwargs["dropout_p"] = 0.0
        fixed = _FIXED.get(name)
        out = func(*args, **kwargs)
        if fixed is not None and isinstance(out, Tensor):
            with torch.no_grad():
                fixed(out, args, kwargs)
        return out


def _argument(args: Any, kwargs: Mapping[str, Any], i: int, name: str, default: float) -> Any:
    return args[i] if len(args) > i else kwargs.get(name, default)


def _middle(out: Tensor, args: Any, kwargs: Mapping[str, Any]) -> None:
    out.fill_(0.5)


def _uniform(out: Tensor, args: Any, kwargs: Mapping[str, Any]) -> None:
    low, high = _argument(args, kwargs, 1, "from", 0.0), _argument(args, kwargs, 2, "to", 1.0)
    out.fill_((low + high) / 2)


def _standard_normal(out: Tensor, args: Any, kwargs: Mapping[str, Any]) -> None:
    out.fill_(_NORMAL)


def _normal(out: Tensor, args: Any, kwargs: Mapping[str, Any]) -> None:
    own = bool(args) and args[0] is out  # the method Tensor.normal_
    mean = _argument(args, kwargs, int(own), "mean", 0.0)
    std = _argument(args, kwargs, int(own) + 1, "std", 1.0)
    out.copy_(torch.as_tensor(mean + _NORMAL * std).expand(out.shape))


def _bernoulli(out: Tensor, args: Any, kwargs: Mapping[str, Any]) -> None:
    p = _argument(args, kwargs, 1, "p", 0.5)
    if p is None or (len(args) < 2 and "p" not in kwargs and args[0] is not out):
        p = args[0]
    out.copy_((torch.as_tensor(p) >= 0.5).expand(out.shape))


def _integer(out: Tensor, args: Any, kwargs: Mapping[str, Any]) -> None:
    bounds = [a for a in args if isinstance(a, int)]
    high = kwargs.get("high", bounds[-1] if bounds else 1)
    low = kwargs.get("low", bounds[0] if len(bounds) > 1 else 0)
    out.fill_((low + high) // 2)


def _in_order(out: Tensor, args: Any, kwargs: Mapping[str, Any]) -> None:
    out.copy_(out.sort().values)


def _one(out: Tensor, args: Any, kwargs: Mapping[str, Any]) -> None:
    out.fill_(1.0)


_FIXED: dict[str, Callable[[Tensor, Any, Mapping[str, Any]], None]] = {
    "rand": _middle,
    "rand_like": _middle,
    "uniform": _uniform,
    "randn": _standard_normal,
    "randn_like": _standard_normal,
    "normal": _normal,
    "bernoulli": _bernoulli,
    "randint": _integer,
    "randint_like": _integer,
    "randperm": _in_order,
    "exponential": _one,
}


@contextmanager
def no_chance(model: nn.Module) -> Iterator[None]:
    """Run `model` under `FixedChance`, dropout between recurrent layers off too."""
    recurrent = [(m, m.dropout) for m in model.modules() if isinstance(m, nn.RNNBase)]
    try:
        for module, _ in recurrent:
            module.dropout = 0.0
        with FixedChance():
            yield
    finally:
        for module, p in recurrent:
            module.dropout = p
