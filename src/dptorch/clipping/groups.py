"""Clipping styles: which parameters are clipped together, and to what norm.

Under *all-layer* clipping an example's whole gradient has one norm. The other styles cut the
parameters into groups that are clipped each on its own (McMahan et al. 2018, arXiv:1710.06963; He et
al. 2023, arXiv:2212.01539): a group's sum is finished as soon as the backward has passed it, so that
nothing of it is kept. With norms C_g, one example's contribution has the joint norm
``sqrt(sum_g C_g^2)``, which is the plan's max_grad_norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final

from torch import nn

from dptorch.accounting.arguments import number
from dptorch.errors import ConfigurationError, one_of

__all__ = ["STYLES", "ClippingGroup", "GroupSpec", "groups_of", "read_style"]

_ALIASES = {"flat": "all-layer", "per-layer": "layer-wise", "per_layer": "layer-wise"}
_NAMED = "named groups"
_REST = "all others"
Members = dict[str, list[str]]  # names of parameters, by the name of their group


@dataclass(frozen=True)
class GroupSpec:
    """One entry of a user's own grouping.

    Attributes:
        pattern: name of a module or a parameter, with wildcards (``encoder.layer.*``); for a group
            with a norm also several of them, with "|" between.
        max_grad_norm: the group's norm C_g; None for an equal share.
        noise_weight: the group's share w_g of the privacy, see `ClippingGroup.noise_scale`; None
            for the share that gives every coordinate of the model the same noise.
    """

    pattern: str
    max_grad_norm: float | None = None
    noise_weight: float | None = None


@dataclass(frozen=True)
class ClippingGroup:
    """Parameters whose joint gradient is clipped to one norm.

    Attributes:
        name: for people: a module, a parameter or a pattern.
        parameters: their names.
        max_grad_norm: the group's norm C_g.
        noise_weight: its share w_g of the privacy; the weights of all groups sum to 1.
    """

    name: str
    parameters: tuple[str, ...]
    max_grad_norm: float
    noise_weight: float

    @property
    def noise_scale(self) -> float:
        """Standard deviation of the group's noise for each unit of noise multiplier,
        ``C_g / sqrt(w_g)``.

        Guarantees:
            Measured in these units an example moves all groups together by at most
            ``sqrt(sum_g (C_g / scale_g)^2) = sqrt(sum_g w_g) = 1``, so the mechanism is a Gaussian
            one with the plan's noise multiplier, whatever the weights.
            Held by `test_an_example_moves_all_groups_together_by_one_unit_of_noise`.
        """
        return self.max_grad_norm / math.sqrt(self.noise_weight)


def read_style(
    style: str | Sequence[str] | Mapping[str, Any], specs: Sequence[GroupSpec] = ()
) -> tuple[str, tuple[GroupSpec, ...]]:
    """A style as a user writes it -> (its name, the user's own groups).

    Args:
        style: a name in `STYLES`; a list of patterns, of which every module that matches becomes a
            group; or {pattern: C_g} or {pattern: (C_g, w_g)}, of which each entry is one group.
        specs: groups that were read before, with a style that was read before.

    Raises:
        ConfigurationError: for an unknown name, or a norm or weight that is not one.

    Example:
        >>> read_style({"encoder.*": 1.0, "head.*": 0.5})[0]
        'named groups'
    """
    if isinstance(style, str):
        if style == _NAMED and specs:
            return _NAMED, _checked(specs)
        name = _ALIASES.get(style) or one_of("clipping_style", style, STYLES)
        return name, _checked(specs) if name == "block-wise" else ()
    if isinstance(style, Mapping):
        found = []
        for pattern, value in style.items():
            norm, weight = value if isinstance(value, (tuple, list)) else (value, None)
            if norm is None:
                raise ConfigurationError(f"clipping_style: group {pattern!r} has no norm.")
            if not isinstance(norm, float):  # a NaN is refused with what else is out of range
                norm = number(f"clipping_style, group {pattern!r}: norm", norm)
            found.append(GroupSpec(str(pattern), norm, weight))
        if not found:
            raise ConfigurationError("clipping_style={}: no group. Name one, or use 'all-layer'.")
        return _NAMED, _checked(found)
    patterns = list(style) if isinstance(style, Iterable) else []
    if not patterns or not all(isinstance(p, str) for p in patterns):
        raise ConfigurationError(
            f"clipping_style={style!r}: expected one of {', '.join(STYLES)}, a list of module names "
            "or patterns, or {pattern: norm}."
        )
    return "block-wise", tuple(GroupSpec(p) for p in patterns)


def _checked(specs: Iterable[GroupSpec]) -> tuple[GroupSpec, ...]:
    specs = tuple(specs)
    for spec in specs:
        for what, value in (("norm", spec.max_grad_norm), ("weight", spec.noise_weight)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigurationError(
                    f"clipping_style: the {what} of group {spec.pattern!r} is {value!r}; it must be "
                    "a finite number above 0."
                )
    normed = [s for s in specs if s.max_grad_norm is not None]
    if normed and len(normed) < len(specs):
        missing = next(s.pattern for s in specs if s.max_grad_norm is None)
        raise ConfigurationError(
            f"clipping_style: group {missing!r} has no norm while others have one. Give all of them "
            "a norm, or none."
        )
    weighted = [s for s in specs if s.noise_weight is not None]
    if weighted and len(weighted) < len(specs):
        missing = next(s.pattern for s in specs if s.noise_weight is None)
        raise ConfigurationError(
            f"clipping_style: group {missing!r} has no noise weight while others have one. Give "
            "all of them a weight, or none."
        )
    total = sum(s.noise_weight or 0.0 for s in weighted)
    if weighted and not math.isclose(total, 1.0, rel_tol=1e-6):
        raise ConfigurationError(
            f"clipping_style: the noise weights sum to {total:g}; they are shares and sum to 1."
        )
    return specs


def joint_norm(specs: Sequence[GroupSpec]) -> float | None:
    """``sqrt(sum C_g^2)`` of groups with norms of their own; None where they share one."""
    norms = [s.max_grad_norm for s in specs if s.max_grad_norm is not None]
    return math.hypot(*norms) if norms else None


def groups_of(
    model: nn.Module,
    parameters: Iterable[str],
    style: str,
    specs: Sequence[GroupSpec],
    max_grad_norm: float,
) -> tuple[ClippingGroup, ...]:
    """The groups that a style makes of a model's parameters.

    Args:
        model: its module tree says what a layer and a block are.
        parameters: names of the trainable parameters, as in ``model.named_parameters()``.
        style, specs: from `read_style`.
        max_grad_norm: joint norm C of all groups; L groups without norms of their own get
            ``C / sqrt(L)`` each.

    Raises:
        ConfigurationError: for a pattern that matches nothing, or named groups that leave a
            parameter out.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> names = [name for name, _ in model.named_parameters()]
        >>> [g.name for g in groups_of(model, names, "layer-wise", (), 1.0)]
        ['0', '1']
    """
    join = _named if style == _NAMED else STYLES[one_of("clipping_style", style, STYLES)]
    members = join(model, list(parameters), specs)
    own = {s.pattern: s for s in specs if s.max_grad_norm is not None}
    max_grad_norm = joint_norm(specs) or max_grad_norm
    groups = []
    for name, inside in members.items():
        spec = own.get(name)
        norm = max_grad_norm / math.sqrt(len(members))
        if spec is not None:
            assert spec.max_grad_norm is not None
            norm = spec.max_grad_norm
        # Shares that give all groups noise of one size: C_g / sqrt(w_g) is then the joint norm.
        weight = (norm / max_grad_norm) ** 2
        if spec is not None and spec.noise_weight is not None:
            weight = spec.noise_weight
        groups.append(ClippingGroup(name, tuple(inside), norm, weight))
    total = sum(group.noise_weight for group in groups)
    if not math.isclose(total, 1.0, rel_tol=1e-6):
        raise ConfigurationError(
            f"clipping_style: the groups' shares of the privacy sum to {total:g}, not to 1. Give "
            "every group a norm of its own (and a weight), or none, in clipping_style itself."
        )
    return tuple(groups)


def _whole(model: nn.Module, names: Sequence[str], specs: Sequence[GroupSpec]) -> Members:
    return {"all-layer": list(names)}


def _layers(model: nn.Module, names: Sequence[str], specs: Sequence[GroupSpec]) -> Members:
    return _by(names, lambda n: n.rpartition(".")[0] or "the model itself")


def _parameters(model: nn.Module, names: Sequence[str], specs: Sequence[GroupSpec]) -> Members:
    return {n: [n] for n in names}


def _by(names: Iterable[str], key: Any) -> Members:
    found: dict[str, list[str]] = {}
    for n in names:
        found.setdefault(key(n), []).append(n)
    return found


def _inside(name: str, module: str) -> bool:
    return not module or name.startswith(module + ".")


def _named(model: nn.Module, names: Sequence[str], specs: Sequence[GroupSpec]) -> Members:
    modules = [m for m, _ in model.named_modules() if m]
    found: dict[str, list[str]] = {s.pattern: [] for s in specs}
    takers: dict[str, str] = {}
    for spec in specs:
        hits = {part: _matched(part, names, modules) for part in spec.pattern.split("|")}
        _refuse_empty(hits)
        for matched in hits.values():
            for n in matched:
                # The first pattern that matches takes a parameter, so that a last '*' takes the rest.
                takers.setdefault(n, spec.pattern)
    for n in names:
        if n not in takers:
            raise ConfigurationError(
                f"clipping_style: no group takes parameter '{n}'. Add one for it, or a last entry "
                "'*' for all others."
            )
        found[takers[n]].append(n)
    _refuse_empty(found)
    return found


def _matched(pattern: str, names: Sequence[str], modules: Sequence[str]) -> list[str]:
    """The parameters that a pattern names, and those inside modules that it names."""
    if not any(c in pattern for c in "*?["):  # a long list of names is looked up, not matched
        return [n for n in names if pattern and (n == pattern or _inside(n, pattern))]
    inside = [m for m in modules if fnmatchcase(m, pattern)]
    return [n for n in names if fnmatchcase(n, pattern) or any(_inside(n, m) for m in inside)]


def _blocks(model: nn.Module, names: Sequence[str], specs: Sequence[GroupSpec]) -> Members:
    patterns = [s.pattern for s in specs]
    if patterns:
        # A pattern may also name parameters, each of which is then a group.
        paths = [m for m, _ in model.named_modules() if m] + list(names)
        hits = {p: [m for m in paths if fnmatchcase(m, p)] for p in patterns}
        _refuse_empty(hits)
        blocks = [m for matched in hits.values() for m in matched]
    else:
        blocks = _repeated(model)

    def block(n: str) -> str:
        return next((m for m in blocks if n == m or _inside(n, m)), _REST)

    return _by(names, block)


#: Clipping styles by name: which parameters are clipped together.
STYLES: Final[Mapping[str, Callable[[nn.Module, Sequence[str], Sequence[GroupSpec]], Members]]] = {
    "all-layer": _whole,
    "layer-wise": _layers,
    "param-wise": _parameters,
    "block-wise": _blocks,
}
"""The styles by name: (model, names of parameters, the user's patterns) -> the names in each group."""


def _repeated(model: nn.Module) -> list[str]:
    """The children of every outermost list of modules: a network's repeated blocks."""
    found: list[str] = []
    for path, module in model.named_modules():
        if any(_inside(path, m) for m in found):
            continue
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1:
            found += [f"{path}.{name}".lstrip(".") for name, _ in module.named_children()]
    return found


def _refuse_empty(found: Mapping[str, Sequence[str]]) -> None:
    for pattern, members in found.items():
        if not members:
            raise ConfigurationError(
                f"clipping_style: {pattern!r} matches no trainable parameter and no module that has "
                "one. Names are those of model.named_modules() and model.named_parameters()."
            )
