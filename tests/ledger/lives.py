"""One life of a run that is killed again and again: it goes on from the last checkpoint to its end."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import dptorch
from dptorch.errors import PrivacyWarning
from dptorch.ledger import open_ledger
from dptorch.noise import GaussianNoise
from tests.engine.setup import SIZE, make_data, make_model

__all__ = ["DELTA", "EPSILON", "NOISE", "RATE", "READY", "go_on", "watch"]

# Without sampling ε is a closed form, so that a child spends its life in steps and not in numerics.
NOISE, RATE, DELTA = 2.0, 1.0, 1e-3
READY, EPSILON = -2, -1  # columns of a row, after those of the steps


def go_on(
    location: str, checkpoint: Path, row: np.ndarray, dataset: str, *, save_every: int
) -> None:
    """Train to the end of the plan, on one process or on ranks.

    Args:
        location: of the ledger.
        checkpoint: where the last life has left it, if there was one.
        row: has a column for each step; says when the loop begins, and in the end ε in millionths.
        dataset: its name in the ledger.
        save_every: steps from one checkpoint to the next.
    """
    model = make_model()
    engine = dptorch.PrivacyEngine(
        model,
        sample_rate=RATE,
        sample_size=SIZE,
        steps=len(row) - 2,
        noise_multiplier=NOISE,
        target_delta=DELTA,
        accountant="exact",
        self_check=False,
        ledger=open_ledger(location, timeout_s=3600).dataset(dataset),
    )
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    if checkpoint.exists():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PrivacyWarning)  # that steps were lost
            engine.load_checkpoint(checkpoint)
    else:
        engine.save_checkpoint(checkpoint)
    loader = engine.loader(make_data())
    row[READY] = 1
    while not engine.exhausted:
        for x, y in loader:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            if engine.steps_done % save_every == 0:
                engine.save_checkpoint(checkpoint)
    engine.release_budget()
    row[EPSILON] = int(engine.get_privacy_spent().epsilon * 1e6)


def watch(seen: Callable[[int], object]) -> None:
    """In a child: call ``seen(step)`` once the noise of a step was drawn, before it goes anywhere."""
    plain = GaussianNoise.privatize

    def privatize(self: GaussianNoise, clipped: Any, key: Any, step: int, **more: Any) -> Any:
        noisy = plain(self, clipped, key, step, **more)
        seen(step)
        return noisy

    GaussianNoise.privatize = privatize  # type: ignore[method-assign]
