"""Clipping styles: each parameter in one group, and norms and shares that add up."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dptorch.clipping import STYLES, ClippingGroup, groups_of, read_style
from dptorch.errors import ConfigurationError

C = 0.7


class Net(nn.Module):
    """Parameters in the root, in a plain layer, and in two nested lists of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
            for _ in range(3)
        )
        self.scale = nn.Parameter(nn.Linear(1, 1).weight.detach())


NAMES = [name for name, _ in Net().named_parameters()]


def groups(style: Any, norm: float = C) -> tuple[ClippingGroup, ...]:
    name, specs = read_style(style)
    return groups_of(Net(), NAMES, name, specs, norm)


def members(style: Any) -> dict[str, set[str]]:
    return {group.name: set(group.parameters) for group in groups(style)}


WEIGHTED = {"stem": (0.5, 0.2), "blocks.*": (0.3, 0.7), "*": (0.1, 0.1)}
ALL = [*STYLES, ["blocks.*"], ["stem", "scale"], {"stem*|blocks.1": 0.5, "*": 0.2}, WEIGHTED]


@pytest.mark.parametrize("style", ALL, ids=str)
def test_every_parameter_is_in_one_group(style: Any) -> None:
    found = [name for group in groups(style) for name in group.parameters]
    assert sorted(found) == sorted(NAMES)


@pytest.mark.parametrize("style", ALL, ids=str)
def test_an_example_moves_all_groups_together_by_one_unit_of_noise(style: Any) -> None:
    """The guarantee of `noise_scale`: one Gaussian mechanism with the plan's noise multiplier."""
    made = groups(style)
    assert math.isclose(sum((g.max_grad_norm / g.noise_scale) ** 2 for g in made), 1.0)
    norms = {0.5, 0.2} if isinstance(style, dict) and style is not WEIGHTED else None
    if style is WEIGHTED:
        norms = {0.5, 0.3, 0.1}
    assert math.isclose(
        math.hypot(*(g.max_grad_norm for g in made)), math.hypot(*norms) if norms else C
    )


@given(st.lists(st.tuples(st.floats(1e-3, 1e3), st.floats(1e-3, 1.0)), min_size=2, max_size=2))
def test_any_norms_and_shares_make_one_mechanism(entries: list[tuple[float, float]]) -> None:
    total = sum(w for _, w in entries)
    style = dict(zip(("stem", "*"), ((c, w / total) for c, w in entries), strict=True))
    moved = sum((g.max_grad_norm / g.noise_scale) ** 2 for g in groups(style))
    assert math.isclose(moved, 1.0, rel_tol=1e-9)


def test_layers_are_the_modules_that_own_parameters() -> None:
    owners = {
        path or "the model itself": {f"{path}.{n}".lstrip(".") for n, _ in module.named_parameters(
            recurse=False)}
        for path, module in Net().named_modules()
    }  # fmt: skip
    assert members("layer-wise") == {path: inside for path, inside in owners.items() if inside}
    assert members("per-layer") == members("layer-wise")


def test_parameters_and_everything() -> None:
    assert members("param-wise") == {name: {name} for name in NAMES}
    assert members("flat") == {"all-layer": set(NAMES)}
    assert groups("param-wise")[0].max_grad_norm == pytest.approx(C / math.sqrt(len(NAMES)))


def test_blocks_are_the_children_of_the_outermost_lists() -> None:
    found = members("block-wise")
    assert set(found) == {"blocks.0", "blocks.1", "blocks.2", "all others"}
    assert found["all others"] == {"scale", "stem.weight", "stem.bias"}
    assert found["blocks.1"] == {name for name in NAMES if name.startswith("blocks.1.")}


def test_the_first_group_that_names_a_parameter_takes_it() -> None:
    found = members({"*.weight": 1.0, "stem|scale": 1.0, "*": 1.0})
    assert found["*.weight"] == {name for name in NAMES if name.endswith(".weight")}
    assert found["stem|scale"] == {"stem.bias", "scale"}
    assert found["*"] == set(NAMES) - found["*.weight"] - found["stem|scale"]


@pytest.mark.parametrize(
    ("style", "message"),
    [
        ("layerwise", "layer-wise"),
        (["nothing.*"], "matches no"),
        ({"stem*": 1.0}, "no group takes parameter"),
        ({"stem*": 1.0, "stem": 1.0, "*": 1.0}, "'stem' matches no"),
        ({"stem*|blks.1": 1.0, "*": 1.0}, "'blks.1' matches no"),
        ({"stem*|": 1.0, "*": 1.0}, "'' matches no"),
        ({"*": -1.0}, "above 0"),
        ({"*": math.nan}, "above 0"),
        ({"*": None}, "has no norm"),
        ({"stem*": (1.0, 0.5), "*": 1.0}, "no noise weight"),
        ({"stem*": (1.0, 0.5), "*": (1.0, 0.6)}, "sum to 1"),
        ([], "expected one of"),
        ({}, "no group"),
    ],
)
def test_styles_that_cannot_be_are_refused(style: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        groups(style)
