"""What the audit says of BloGS at an index of 1, and of its Gaussian sibling at ε = 1.

Both are played against the engine that users call: an optimizer with a learning rate of zero keeps
the weights, and what it got as gradients is what the adversary sees.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dptorch.audit.evidence import Evidence
from dptorch.audit.games import SCORES, audit_step
from dptorch.audit.result import judge
from dptorch.blogs import BloGSPrivacyEngine
from dptorch.engine.privacy_engine import PrivacyEngine
from dptorch.noise import GaussianNoise

pytestmark = pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")

DELTA, CLIP, RECORDS = 1e-5, 1.0, 16


class World:
    """A model, known records and canaries, and an engine for `steps` steps at a target of 1."""

    def __init__(self, *, steps, canaries, **settings):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 4))
        self.x, self.y = torch.randn(RECORDS, 20), torch.arange(RECORDS) % 4
        # Canaries large enough for their gradients to be clipped: each contributes all it may.
        self.canary_x, self.canary_y = 5 * torch.randn(canaries, 20), torch.arange(canaries) % 4
        self.settings = settings
        self.steps = steps
        self.start()

    def start(self, **settings):
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
        self.engine = BloGSPrivacyEngine(
            self.optimizer,
            self.model,
            target_epsilon=1.0,
            delta=DELTA,
            clip_value=CLIP,
            steps=self.steps,
            batch_size=RECORDS,
            **{**self.settings, **settings},
        )

    def loss(self, canary, member):
        x, y = self.x, self.y
        if member:
            x = torch.cat([x, self.canary_x[canary : canary + 1]])
            y = torch.cat([y, self.canary_y[canary : canary + 1]])
        return F.cross_entropy(self.model(x), y)

    def release(self, canary, member):
        self.engine.zero_grad()
        self.loss(canary, member).backward()
        self.engine.step()
        return [p.grad.clone() for p in self.model.parameters()]

    def clipped(self, canary, member):
        """What a shuffle permutes."""
        gradients = torch.autograd.grad(self.loss(canary, member), list(self.model.parameters()))
        return [g * (CLIP / g.norm()).clamp(max=1) for g in gradients]


def _one_run(world, score, known):
    """One run of as many steps as canaries; a coin decides for each whether it is in its step."""
    coins = np.random.default_rng(5).random(world.steps) < 0.5
    scores = []
    for canary, member in enumerate(coins):
        inside, outside = known(canary)
        scores.append(SCORES[score](world.release(canary, bool(member)), inside, outside))
    return judge(
        Evidence(scores, coins),
        epsilon=1.0,
        delta=DELTA,
        adversary="knows weights and batches, sees every step",
        bound="one-run",
    )


def _shuffle_world(index):
    return World(steps=100, canaries=100, index=index, dataset_size=1000)


@pytest.mark.slow
@pytest.mark.parametrize("index", ["2024", "0.1.21"])
@pytest.mark.parametrize("score", ["exact-match", "sorted-block", "norm"])
def test_a_step_of_blogs_refutes_what_is_claimed_of_the_whole_run(index, score):
    """No false alarm to state: every guess is right in every game."""
    world = _shuffle_world(index)
    result = audit_step(
        lambda member: world.release(0, member),
        inside=world.clipped(0, True),
        outside=world.clipped(0, False),
        epsilon=1.0,
        delta=DELTA,
        score=score,
        games=45,
    )
    assert result.refuted
    assert result.epsilon_lower > 1.5


@pytest.mark.slow
@pytest.mark.parametrize("index", ["2024", "0.1.21"])
def test_one_run_of_blogs_refutes_its_index(index):
    world = _shuffle_world(index)
    result = _one_run(
        world, "exact-match", lambda c: (world.clipped(c, True), world.clipped(c, False))
    )
    assert float(world.engine.get_privacy_spent()) <= 1.0
    assert result.refuted
    assert result.epsilon_lower > 2


def _gaussian_world(**settings):
    return World(
        dataset_size=RECORDS, mechanism="gaussian", on_budget_exhausted="raise", **settings
    )


def _one_step(world, member, *, seed):
    """A step of a new run of the sibling's plan; its engine is the one engine of dptorch."""
    plan = world.engine._steps.engine.plan
    world.engine.detach()
    engine = PrivacyEngine(world.model, plan=plan, self_check=False, seed=seed)
    try:
        optimizer = engine.attach(torch.optim.SGD(world.model.parameters(), lr=0.0))
        world.loss(0, member).backward()
        optimizer.step()
        return [p.grad.clone() for p in world.model.parameters()]
    finally:
        engine.detach()


def _step_game(world, *, games=150):
    # Two runs with one seed have the same noise: the difference is the canary's contribution.
    inside, outside = (_one_step(world, member, seed=0) for member in (True, False))
    share = [a - b for a, b in zip(inside, outside, strict=True)]
    return audit_step(
        lambda member: _one_step(world, member, seed=None),
        inside=share,
        outside=[torch.zeros_like(d) for d in share],
        epsilon=1.0,
        delta=DELTA,
        score="projection",
        games=games,
    )


@pytest.mark.slow
def test_a_step_of_the_gaussian_sibling_does_not_refute_its_epsilon():
    """The hardest case for it: one step at ε = 1, without amplification, and the best test there is.
    The audit of a true claim says REFUTED in at most one case of twenty."""
    world = _gaussian_world(steps=1, canaries=1)
    assert world.engine._steps.engine.plan.sample_rate == 1.0
    assert not _step_game(world).refuted


@pytest.mark.slow
def test_the_same_game_refutes_noise_that_is_too_small(monkeypatch):
    """Negative control: a tenth of the noise is found."""
    privatize = GaussianNoise.privatize

    def too_small(self, *args, **kwargs):
        return privatize(GaussianNoise(self.noise_multiplier / 10), *args, **kwargs)

    monkeypatch.setattr(GaussianNoise, "privatize", too_small)
    assert _step_game(_gaussian_world(steps=1, canaries=1)).refuted


@pytest.mark.slow
@pytest.mark.parametrize("score", ["exact-match", "projection"])
def test_one_run_of_the_gaussian_sibling_does_not_refute_its_epsilon(score):
    """The game that refutes BloGS: as many canaries and steps, the same adversary."""
    world = _gaussian_world(steps=100, canaries=100)
    plain = World(steps=100, canaries=100, index="2024")

    def known(canary):
        inside, outside = plain.clipped(canary, True), plain.clipped(canary, False)
        return inside, outside

    result = _one_run(world, score, known)
    assert float(world.engine.get_privacy_spent()) <= 1.0
    assert not result.refuted
