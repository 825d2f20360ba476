"""What correlated noise gains in accuracy: the same budget, the same tuning, three seeds.

    python benchmarks/correlated_noise.py mnist-features reviews

Linear classifiers on the features of the recipes. Plans, samplers and noise are the library's; the
clipped sum of a batch has a closed form here, so that hundreds of runs take minutes. For each ε and
mechanism, sampling rate and learning rate are chosen on a fifth of the training examples that is held
out, by one run of each (with a seed of its own). Then the model is trained on all of them with three
seeds. Prints mean and standard deviation of the test accuracy over seeds, and what was chosen. The
choice is not paid for: it is a measurement, not a private run.
"""

from __future__ import annotations

import functools
import itertools
import sys
from typing import Any

import torch
from torch import Tensor

from dptorch.clipping.sums import ClippedSum
from dptorch.noise import get_mechanism
from dptorch.plan import PrivacyPlan, make_plan
from dptorch.randomness import RootKey
from dptorch.training.data import Examples
from dptorch.training.recipes import get_recipe

EPSILONS = (1.0, 2.0, 4.0, 8.0)
RATES = (1 / 4, 1 / 10, 1 / 25)
LEARNING_RATES = {"mnist-features": (5.0, 10.0, 20.0, 40.0), "reviews": (1.0, 2.0, 5.0, 10.0)}
MECHANISMS = ("gaussian", "banded", "inverse-banded", "buffered-toeplitz")


@functools.cache
def plan_of(mechanism: str, size: int, rate: float, epsilon: float) -> PrivacyPlan:
    """The plan of 20 epochs."""
    return make_plan(
        sample_rate=rate,
        sample_size=size,
        epochs=20,
        target_epsilon=epsilon,
        target_delta=1e-5,
        accountant="exact",
        mechanism=mechanism,
    )


def clipped_sum(weights: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    """The sum of gradients of cross-entropy [K, D], each clipped to norm 1."""
    errors = torch.softmax(x @ weights.T, 1)
    errors[torch.arange(len(x)), labels] -= 1.0
    norms = errors.norm(dim=1) * x.norm(dim=1)
    return (errors / norms.clamp(min=1.0)[:, None]).T @ x


def accuracy(plan: PrivacyPlan, train: Examples, test: Examples, lr: float, seed: int) -> float:
    """Of one run, in percent."""
    key = RootKey.from_seed(seed)
    x, held = (torch.cat([d.inputs, torch.ones(len(d), 1)], 1) for d in (train, test))
    if plan.sampling == "sequential":  # its sampler takes the order as it is
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        x, labels = x[order], train.labels[order]
    else:
        labels = train.labels
    sampler = plan.scheme.sampler(plan.terms, len(x), key)
    kind: Any = get_mechanism(plan.mechanism)
    more = (plan.coefficients, plan.steps) if plan.coefficients else ()
    noise = kind(plan.noise_multiplier, *more)
    weights = torch.zeros(int(train.labels.max()) + 1, x.shape[1])
    for step in range(plan.steps):
        drawn = torch.from_numpy(sampler.draw(step))
        sums = ClippedSum({"w": clipped_sum(weights, x[drawn], labels[drawn])}, max_norm=1.0)
        gradient = noise.privatize(sums, key, step, divisor=plan.expected_batch_size)
        weights -= lr * gradient.values["w"]
    return 100 * float(((held @ weights.T).argmax(1) == test.labels).double().mean())


def main(names: list[str]) -> None:
    """Print a row for each data set, budget and mechanism."""
    for name in names:
        data = get_recipe(name).load()
        order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0)).tolist()
        cut = len(order) // 5
        kept, held = data.train.take(order[cut:]), data.train.take(order[:cut])
        for epsilon, mechanism in itertools.product(EPSILONS, MECHANISMS):
            best = (-1.0, 0.0, 0.0)
            for rate, lr in itertools.product(RATES, LEARNING_RATES[name]):
                plan = plan_of(mechanism, len(kept), rate, epsilon)
                best = max(best, (accuracy(plan, kept, held, lr, 100), rate, lr))
            plan = plan_of(mechanism, len(data.train), best[1], epsilon)
            runs = [accuracy(plan, data.train, data.test, best[2], seed) for seed in range(3)]
            found = torch.tensor(runs)
            print(
                f"| {name} | {epsilon:g} | {mechanism} | {found.mean():.1f} ± {found.std():.1f} | "
                f"q {best[1]:g}, learning rate {best[2]:g}, bands {len(plan.coefficients)} |",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:] or list(LEARNING_RATES))
