"""Functions of ``opacus.utils.module_utils``."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

__all__ = [
    "are_state_dict_equal",
    "clone_module",
    "get_submodule",
    "has_trainable_params",
    "parametrized_modules",
    "requires_grad",
    "trainable_modules",
    "trainable_parameters",
]


def has_trainable_params(module: nn.Module) -> bool:
    """Return whether `module` itself, without its submodules, has a trainable parameter."""
    return any(p.requires_grad for p in module.parameters(recurse=False))


def parametrized_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) of each that has parameters of its own."""
    return ((n, m) for n, m in module.named_modules() if [*m.parameters(recurse=False)])


def trainable_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) of each that has a trainable parameter of its own."""
    return ((n, m) for n, m in module.named_modules() if has_trainable_params(m))


def trainable_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (name, parameter) of each trainable one."""
    return ((n, p) for n, p in module.named_parameters() if p.requires_grad)


def requires_grad(module: nn.Module, *, recurse: bool = False) -> bool:
    """Return whether a parameter is trainable, with `recurse` one of a submodule too."""
    return any(p.requires_grad for p in module.parameters(recurse))


def clone_module(module: nn.Module) -> nn.Module:
    """Return a deep copy."""
    return copy.deepcopy(module)


def get_submodule(module: nn.Module, target: str) -> nn.Module:
    """Return ``module.get_submodule(target)``."""
    return module.get_submodule(target)


def are_state_dict_equal(sd1: Mapping[str, Tensor], sd2: Mapping[str, Tensor]) -> bool:
    """Return whether both have the same names, with values that are all close."""
    return set(sd1) == set(sd2) and all(torch.allclose(sd1[n], sd2[n]) for n in sd1)
