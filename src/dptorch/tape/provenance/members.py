"""The parameters and buffers of a module without their names, which are what takes long to make.

Every step looks through all of them. A model that has its own idea of what its members are is asked.
"""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["buffers_of", "parameters_of"]


def parameters_of(model: nn.Module) -> list[Tensor]:
    """Those of ``model.parameters()``; one that several modules hold may occur again.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> [id(p) for p in parameters_of(model)] == [id(p) for p in model.parameters()]
        True
    """
    if _changes(model, "parameters"):
        return list(model.parameters())
    return [p for m in _modules_of(model) for p in m._parameters.values() if p is not None]


def buffers_of(model: nn.Module) -> list[Tensor]:
    """Those of ``model.buffers()``; one that several modules hold may occur again."""
    if _changes(model, "buffers"):
        return list(model.buffers())
    return [b for m in _modules_of(model) for b in m._buffers.values() if b is not None]


def _changes(model: nn.Module, what: str) -> bool:
    """Whether the model's class replaces a method by which torch finds members."""
    own = type(model)
    methods = (what, f"named_{what}", "named_modules")
    return any(getattr(own, name) is not getattr(nn.Module, name) for name in methods)


def _modules_of(model: nn.Module) -> list[nn.Module]:
    found, seen = [model], {model}
    for module in found:
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found
