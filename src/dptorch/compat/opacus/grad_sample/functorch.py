"""Names of ``opacus.grad_sample.functorch``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dptorch.compat.stand_ins import NOT_BY_LAYER, stand_in

__all__ = ["ft_compute_per_sample_gradient", "make_functional", "prepare_layer"]


def make_functional(
    mod: nn.Module, disable_autograd_tracking: bool = False
) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """Return (function of parameters and inputs, the parameters), as torch.func users had it before.

    Args:
        mod: the module; it is copied without its data.
        disable_autograd_tracking: detach the parameters.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> call, parameters = make_functional(layer)
        >>> x = torch.randn(4, 3)
        >>> torch.equal(call(parameters, x), layer(x))
        True
    """
    named = dict(mod.named_parameters())
    stateless = copy.deepcopy(mod).to("meta")

    def call(parameters: tuple[Tensor, ...], *args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(
            stateless, dict(zip(named, parameters, strict=True)), args, kwargs
        )

    values = tuple(p.detach() if disable_autograd_tracking else p for p in named.values())
    return call, values


prepare_layer = stand_in("prepare_layer", NOT_BY_LAYER)
ft_compute_per_sample_gradient = stand_in("ft_compute_per_sample_gradient", NOT_BY_LAYER)
