"""Record and replay: the same randomness on a data set and on its neighbour, and the distance of the
sums before the noise against what the accounting was told.

Everything that could enter is read from the registries, so that what is added later is tested too.
The learning rate is 0: the model stays as it is, and every step can be compared.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import dptorch
from dptorch import accounting
from dptorch.accounting import Adjacency
from dptorch.clipping import FUNCTIONS, STYLES, functions
from dptorch.clipping.sums import ClippedSum
from dptorch.errors import PrivacyError
from dptorch.noise import GaussianNoise
from dptorch.sampling import SCHEMES
from dptorch.tape.gradients.clipping_modes import MODES, NON_PRIVATE

SIZE, STEPS, BOUND = 24, 16, 0.3
RECORD = SIZE - 1
ROUNDING = 1 + 1e-5

CLIPPING = list(itertools.product(FUNCTIONS, STYLES, Adjacency))
COMPUTING = [(m, s) for m in MODES for s in STYLES if m != NON_PRIVATE.name]
SAMPLING = [(s.name, a) for s in SCHEMES.values() for a in s.adjacencies]


def model() -> nn.Module:
    """Linear, without biases: gradients grow with the record, turn with its sign, and are zero for
    zeros."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7, bias=False), nn.Linear(7, 3, bias=False))


def neighbours(adjacency: Adjacency) -> tuple[TensorDataset, TensorDataset]:
    """A data set whose last record is huge, and its neighbour without it, with zeros or with the
    opposite of it in its place."""
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(SIZE, 5, generator=generator), torch.arange(SIZE) % 3
    x[RECORD] *= 100.0
    other_x, other_y = x.clone(), y.clone()
    if adjacency is Adjacency.ADD_REMOVE:
        other_x, other_y = x[:RECORD], y[:RECORD]
    elif adjacency is Adjacency.ZERO_OUT:
        other_x[RECORD] = 0.0
    else:
        other_x[RECORD] *= -3.0
    return TensorDataset(x, y), TensorDataset(other_x, other_y)


class Recorder:
    """One run: what each step drew, and each sum before its noise in units of the noise's scale."""

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        data: TensorDataset,
        adjacency: Adjacency,
        replay: list[NDArray[np.int64]] | None,
        **settings: Any,
    ) -> None:
        self.sums: list[Tensor] = []
        self.draws: list[NDArray[np.int64]] = []
        public = {} if adjacency is Adjacency.ADD_REMOVE else {"sample_size": SIZE}
        plan: dict[str, Any] = {
            "batch_size": 6.0,
            "sample_rate": 0.25,
            "steps": STEPS,
            "noise_multiplier": 1.0,
            "target_delta": 1e-3,
            "max_grad_norm": BOUND,
            "adjacency": adjacency,
        }
        if settings.get("sampling") == "truncated-poisson":
            plan["capacity"] = SIZE
        net = model()
        engine = dptorch.PrivacyEngine(net, seed=6, self_check=False, **plan | public | settings)
        optimizer = engine.attach(torch.optim.SGD(net.parameters(), lr=0.0))
        with patch.context() as patched:
            patched.setattr(GaussianNoise, "privatize", self._recording(GaussianNoise.privatize))
            loader = engine.loader(data, max_physical_batch_size=7)
            draw = type(loader.sampler).draw

            def noted(sampler: Any, step: int) -> NDArray[np.int64]:
                # The neighbour's batches are those of the first, less the record that it lacks: the
                # coupling of the two samples that the accounting compares.
                drawn = draw(sampler, step) if replay is None else replay[step]
                drawn = drawn[drawn < len(data)]
                self.draws.append(drawn)
                return drawn

            patched.setattr(type(loader.sampler), "draw", noted)
            while engine.steps_done < STEPS:
                for x, y in loader:
                    F.nll_loss(net(x), y).backward()  # minus the score of the class: linear
                    optimizer.step()
                    optimizer.zero_grad()

    def _recording(self, plain: Any) -> Any:
        def privatize(noise: GaussianNoise, clipped: ClippedSum, *rest: Any, **more: Any) -> Any:
            scaled = [(v / clipped.scale(n)).flatten() for n, v in clipped.values.items()]
            self.sums.append(torch.cat(scaled).double())
            return plain(noise, clipped, *rest, **more)

        return privatize


def excess(patch: pytest.MonkeyPatch, adjacency: Adjacency, **settings: Any) -> float:
    """The largest distance of the two runs' sums in a step, over what is declared for it: the
    adjacency's factor for each time that the record was drawn."""
    first, second = neighbours(adjacency)
    one = Recorder(patch, first, adjacency, None, **settings)
    other = Recorder(patch, second, adjacency, one.draws, **settings)
    assert len(one.sums) == len(other.sums) == STEPS
    worst, times = 0.0, 0
    for drawn, a, b in zip(one.draws, one.sums, other.sums, strict=True):
        count = int((drawn == RECORD).sum())
        times += count
        distance = float((a - b).norm())
        if count == 0:
            # Nothing but rounding: the parts of the batch are the same.
            worst = max(worst, distance * 1e5)
        else:
            worst = max(worst, distance / (count * adjacency.sensitivity_factor))
    assert times, "the record was never drawn, so that nothing was measured"
    return worst


@pytest.mark.slow
@pytest.mark.parametrize(("function", "style", "adjacency"), CLIPPING)
def test_every_way_of_clipping(
    monkeypatch: pytest.MonkeyPatch, function: str, style: str, adjacency: Adjacency
) -> None:
    settings = {"clipping_fn": function, "clipping_style": style}
    assert excess(monkeypatch, adjacency, **settings) <= ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "style"), COMPUTING)
def test_every_way_of_computing_it(monkeypatch: pytest.MonkeyPatch, mode: str, style: str) -> None:
    settings = {"clipping_mode": mode, "clipping_style": style}
    assert excess(monkeypatch, Adjacency.REPLACE_ONE, **settings) <= ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize(("sampling", "adjacency"), SAMPLING)
def test_every_way_of_sampling(
    monkeypatch: pytest.MonkeyPatch, sampling: str, adjacency: Adjacency
) -> None:
    for accountant in accounting.accountant_names():
        with contextlib.suppress(PrivacyError):  # it does not cover this sampling
            found = excess(monkeypatch, adjacency, sampling=sampling, accountant=accountant)
            assert found <= ROUNDING
            return
    # No accountant states an epsilon for it, so no engine trains with it: that is safe too.
    with pytest.raises(PrivacyError, match="does not cover"):
        excess(monkeypatch, adjacency, sampling=sampling)


@pytest.mark.parametrize("adjacency", list(Adjacency))
def test_the_bound_is_reached(monkeypatch: pytest.MonkeyPatch, adjacency: Adjacency) -> None:
    """Otherwise the tests above would measure too little to mean much."""
    assert excess(monkeypatch, adjacency, clipping_fn="normalised") > 0.9


# -- broken twins ----------------------------------------------------------------------------------


def _not_clipped(norms: Tensor, bound: float) -> Tensor:
    return torch.ones_like(norms)


def _clipped_after_the_mean(norms: Tensor, bound: float) -> Tensor:
    return torch.full_like(norms, min(1.0, bound / max(1e-9, norms.mean().item())))


def _twice_the_bound(norms: Tensor, bound: float) -> Tensor:
    return (2 * bound / norms).clamp(max=1.0)


def _turned_by_the_batch(norms: Tensor, bound: float) -> Tensor:
    """Each contribution is bounded, but the record decides the sign of the others'."""
    return bound / norms * (1 - 2 * ((norms.sum() * 1e3).long() % 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    "twin", [_not_clipped, _clipped_after_the_mean, _twice_the_bound, _turned_by_the_batch]
)
@pytest.mark.parametrize("adjacency", list(Adjacency))
def test_clipping_that_is_broken_is_caught(
    monkeypatch: pytest.MonkeyPatch, twin: Any, adjacency: Adjacency
) -> None:
    monkeypatch.setitem(functions.FUNCTIONS, "abadi", twin)
    assert excess(monkeypatch, adjacency) > 1.3


def test_noise_that_is_smaller_than_declared_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales that say less than was clipped to (violation V1's shape) show as a longer distance."""
    plain = ClippedSum.scale
    monkeypatch.setattr(ClippedSum, "scale", lambda self, name: 0.01 * plain(self, name))
    assert excess(monkeypatch, Adjacency.ADD_REMOVE) > 50


def test_an_example_counted_twice_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from dptorch.engine.logical_batch import LogicalBatch

    monkeypatch.setitem(functions.FUNCTIONS, "abadi", functions.FUNCTIONS["normalised"])
    plain = LogicalBatch.pop_sum

    def take(self: LogicalBatch) -> ClippedSum:
        found = plain(self)
        return ClippedSum({n: 2 * v for n, v in found.values.items()}, found.max_norm, found.scales)

    monkeypatch.setattr(LogicalBatch, "pop_sum", take)
    assert math.isclose(excess(monkeypatch, Adjacency.ZERO_OUT), 2.0, rel_tol=1e-3)
