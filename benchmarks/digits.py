"""Settings of the recipe `digits`, chosen on other digits, and what recipes reach (docs/vision.md).

    python -m benchmarks.digits choose          # on MNIST's images made as coarse, which are public
    python -m benchmarks.digits measure         # three private runs at each budget, on the test set
    python -m benchmarks.digits measure mnist   # the same of the recipe mnist or mnist-features

No private example has a part in the choice, so that ε covers all of them and the choice costs nothing.
That it is made for epsilon 1 alone was decided after a look at the test set (docs/vision.md).
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.mnist_ladder import BUDGETS, DELTA, SEEDS, Rung, descend
from dptorch.plan import make_plan
from dptorch.training.job import Job, prepare
from dptorch.training.recipes import get_recipe, mnist_images
from dptorch.training.task import evaluate

N: Final = 1437  # training examples of the recipe
EPSILON: Final = 1.0  # its budget, for which it is chosen
#: Sample rate, epochs.
LENGTHS: Final = ((1.0, 10.0), (1.0, 20.0), (1.0, 40.0), (0.5, 20.0), (0.5, 40.0))
RATES: Final = (5.0, 10.0, 20.0, 40.0)
CLIPPING: Final = ("abadi", "automatic")
#: Learning rates that `benchmarks.mnist_ladder` chose for one budget, where they are not the recipe's.
OTHER_RATES: Final = {("mnist", 1.0): 1.5}


def coarse_mnist() -> tuple[Tensor, Tensor]:
    """MNIST's images as scikit-learn's digits are: ink counted in blocks of 4 x 4 of 32 x 32 pixels.

    Returns:
        images [5000, 8, 8] in [0, 1], labels [5000].
    """
    images, labels = mnist_images()
    box = images[:, None, 4:24, 4:24]  # where MNIST has its ink
    ink = F.interpolate(box, size=(32, 32), mode="bilinear", align_corners=False) > 0.5
    return F.avg_pool2d(ink.float(), 4)[:, 0], labels


def choose() -> None:
    """Print the settings by accuracy at the recipe's own budget, the mean of five trials."""
    images, labels = coarse_mnist()
    transform = get_recipe("digits").transform
    assert transform is not None
    x = transform(images)
    found = []
    for setting in itertools.product(LENGTHS, RATES, CLIPPING):
        trials = [trial(x, labels, EPSILON, *setting, seed=seed) for seed in range(5)]
        found.append((statistics.mean(trials), statistics.stdev(trials), setting))
    for mean, spread, ((q, epochs), rate, clipping) in sorted(found, reverse=True)[:8]:
        print(f"{mean:.4f} ± {spread:.4f}: rate {q:g}, {epochs:g} epochs, lr {rate:g}, {clipping}")


def trial(
    x: Tensor, labels: Tensor, epsilon: float, length: tuple[float, float], rate: float,
    clipping: str, *, seed: int,
) -> float:  # fmt: skip
    """Accuracy on the others after a private fit on `N` of the examples."""
    q, epochs = length
    drawn = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=drawn)
    train, test = order[:N], order[N:]
    plan = make_plan(
        sample_size=N, sample_rate=q, epochs=epochs, target_epsilon=epsilon, target_delta=DELTA,
        max_grad_norm=1.0,
    )  # fmt: skip
    rung, noise = Rung("digits", tail=0.5, clipping=clipping), plan.noise_multiplier / (q * N)
    fit = descend(rung, x[train], labels[train], plan.steps, q, rate, noise, drawn)
    return float((fit(x[test]).argmax(1) == labels[test]).double().mean())


def measured(recipe: str, epsilon: float, seed: int) -> float:
    """Test accuracy of one run of a recipe."""
    rate = OTHER_RATES.get((recipe, epsilon))
    setup = prepare(Job(recipe=recipe, target_epsilon=epsilon, learning_rate=rate, seed=seed))
    assert setup.engine.plan.epsilon() <= epsilon
    while not setup.engine.exhausted:
        for batch in setup.engine.loader(setup.data.train, max_physical_batch_size=512):
            setup.task.loss(setup.model, batch, setup.device)[0].backward()
            setup.optimizer.step()
            setup.optimizer.zero_grad()
    with setup.with_result():
        return evaluate(setup.model, setup.data.test, setup.device)[0]


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["choose", "measure"])
    parser.add_argument("recipe", nargs="?", default="digits", help="to measure; digits by default")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.what == "choose":
        return choose()
    for epsilon in BUDGETS:
        found = [measured(asked.recipe, epsilon, seed) for seed in SEEDS]
        mean, spread = statistics.mean(found), statistics.stdev(found)
        print(f"ε = {epsilon:g}: {mean:.3f} ± {spread:.3f}  {found}", flush=True)


if __name__ == "__main__":
    main()
