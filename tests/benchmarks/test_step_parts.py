"""The parts of a step that benchmarks/step_parts.py times are those that a step has."""

from __future__ import annotations

import itertools

import pytest
from benchmarks.step_parts import PARTS, measure

from dptorch.bench.workloads import get_workload
from dptorch.tape import Tape


def test_every_part_of_a_private_step_is_met_where_it_is_counted() -> None:
    ticks = itertools.count()
    tiny = get_workload("mlp").tiny
    found = measure("mlp", rounds=1, clock=lambda: float(next(ticks)), size=tiny)
    for part in PARTS:
        (ordinary,), (private,) = found[part]
        assert ordinary == 0 < private, part
    # Subtracted where it is: nothing is left below zero, in the ordinary step neither.
    assert all(value > 0 for part in ("forward", "backward", "step") for value in found[part][1])


def test_a_part_that_is_nowhere_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PARTS, "clipped sums", (Tape, "gone"))
    with pytest.raises(AttributeError, match="gone"):
        measure("mlp", rounds=1, size=get_workload("mlp").tiny)
