"""What each option adds to a small network on 5,000 digits: the second ladder of docs/vision.md.

    python -m benchmarks.network_ladder            # every row: its rate is chosen, then it is measured
    python -m benchmarks.network_ladder Adam EMA   # rows by name

Each row is the row "small network" with one thing changed. Data, budgets and the public 1,000 images on
which alone a learning rate is chosen are those of `benchmarks.mnist_ladder`: two folds of four, at
ε = 3, with as much noise for each example as the private run has. The test set chooses nothing.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.mnist_ladder import (
    BUDGETS,
    DELTA,
    GAMMA,
    SEEDS,
    N,
    data,
    inputs,
    public_part,
    small_network,
)
from dptorch import PrivacyEngine
from dptorch.plan import PrivacyPlan, make_plan
from dptorch.postprocessing import (
    Ahead,
    KalmanFilter,
    LowPassFilter,
    MomentScaling,
    Scaled,
    WeightAverage,
)
from dptorch.randomness import RootKey
from dptorch.training.images import deskew, standardise
from dptorch.training.schedules import Schedule
from dptorch.training.wide_resnet import StandardisedConv2d
from dptorch.vision.augmentation import Augmentation, Views
from dptorch.vision.methods import apply_method

Fit = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """One row: a network, how it is trained, and the learning rates to choose from.

    `stages` are (method of `dptorch.vision.methods`, share of the steps), one after the other; with
    `public` the network begins from weights that were trained on scikit-learn's digits.
    """

    network: str = "groups of 4"
    rates: tuple[float, ...] = (1.0, 2.0, 4.0)
    q: float = 0.125
    epochs: float = 5.0
    optimizer: str = "sgd"
    weight_decay: float = 0.0
    clipping: str = "abadi"
    decay: str = "constant"
    warmup: float = 0.0
    low_pass: float | None = None
    kalman: float | None = None
    moment_scaling: float | None = None
    views: int = 1
    public: bool = False
    stages: tuple[tuple[str, float], ...] = (("full", 1.0),)


_ADAM: Final = (0.003, 0.01, 0.03)
_HOG: Final[dict[str, Any]] = {
    "network": "HOG",
    "q": 0.25,
    "epochs": 20.0,
    "rates": (5.0, 10.0, 20.0),
}
#: Results of a row: its last weights, and averages of those of its steps.
AVERAGES: Final[Mapping[str, dict[str, float]]] = {
    "": {},
    ", mean of the last half": {"tail": 0.5},
    ", EMA 0.9": {"ema": 0.9},
}
ROWS: Final[Mapping[str, Row]] = {
    "small network": Row(),
    "standardised weights": Row("standardised"),
    "Adam": Row(optimizer="adam", rates=_ADAM),
    "AdamW, weight decay 0.1": Row(optimizer="adamw", weight_decay=0.1, rates=_ADAM),
    "moment scaling 0.9": Row(moment_scaling=0.9),
    "moment scaling 0.9, Adam": Row(moment_scaling=0.9, optimizer="adam", rates=_ADAM),
    "cosine schedule": Row(decay="cosine", rates=(2.0, 4.0, 8.0)),
    "linear schedule": Row(decay="linear", rates=(2.0, 4.0, 8.0)),
    "warm-up of a quarter": Row(warmup=0.25),
    "batches of 250, 2.5 epochs": Row(q=0.0625, epochs=2.5),
    "batches of 1,000, 10 epochs": Row(q=0.25, epochs=10.0),
    "batches of 2,000, 20 epochs": Row(q=0.5, epochs=20.0, rates=(2.0, 4.0, 8.0)),
    "low-pass filter 0.5": Row(low_pass=0.5),
    "low-pass filter 0.9": Row(low_pass=0.9),
    "public weights, all trained": Row(epochs=2.5, public=True),
    "public weights, last layer": Row(epochs=2.5, public=True, stages=(("last-layer", 1.0),)),
    "public weights, biases": Row(epochs=2.5, public=True, stages=(("bias-only", 1.0),)),
    "public weights, last layer, then all": Row(
        epochs=2.5, public=True, stages=(("last-layer", 0.5), ("full", 0.5))
    ),
    "4 views": Row(views=4),
    "Kalman filter 0.7": Row(kalman=0.7),
    "tanh, no normalisation": Row("tanh"),
    "ReLU, no normalisation": Row("ReLU"),
    "GroupNorm in one group": Row("one group"),
    "GroupNorm of each channel": Row("groups of 1"),
    "GroupNorm in groups of 8": Row("groups of 8"),
    "automatic clipping": Row(clipping="automatic"),
    "HOG": Row(**_HOG),
    "HOG, moment scaling 0.9": Row(**_HOG, moment_scaling=0.9),
    "HOG, cosine schedule": Row(**_HOG, decay="cosine"),
    "HOG, Adam": Row(**_HOG | {"rates": (0.01, 0.03, 0.1)}, optimizer="adam"),
    "HOG, AdamW, weight decay 0.1": Row(
        **_HOG | {"rates": (0.01, 0.03, 0.1)}, optimizer="adamw", weight_decay=0.1
    ),
}
#: Rows whose averaged weights are rows too.
AVERAGED: Final = ("small network", "HOG")


NETWORKS: Final[Mapping[str, Callable[[], nn.Module]]] = {
    "tanh": lambda: small_network(nn.Tanh, pool_first=True),
    "ReLU": lambda: small_network(nn.ReLU, pool_first=True),
    "groups of 1": lambda: _normalised(1),
    "groups of 4": lambda: _normalised(4),
    "groups of 8": lambda: _normalised(8),
    "one group": lambda: _normalised(),
    "standardised": lambda: _normalised(4, StandardisedConv2d),
    "HOG": lambda: nn.Linear(432, 10),
}


def _normalised(size: int | None = None, convolution: type[nn.Conv2d] = nn.Conv2d) -> nn.Module:
    """The small network with GroupNorm in groups of that many channels, or in one group."""

    def norm(channels: int) -> nn.Module:
        return nn.GroupNorm(1 if size is None else channels // size, channels)

    return small_network(nn.ReLU, norm, convolution, pool_first=True)


@functools.cache
def public_weights(network: str) -> dict[str, Tensor]:
    """Weights after ordinary training on scikit-learn's 1,797 digits, enlarged."""
    from sklearn.datasets import load_digits

    pixels, numbers = load_digits(return_X_y=True)
    small = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 16
    x = standardise(deskew(F.interpolate(small, size=(28, 28), mode="bilinear")[:, 0]))[:, None]
    y = torch.from_numpy(numbers).long()
    torch.manual_seed(0)
    model = NETWORKS[network]()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    for _ in range(10):
        for part in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
    return {name: value.clone() for name, value in model.state_dict().items()}


@functools.cache
def plan_of(row: Row, epsilon: float) -> PrivacyPlan:
    """The plan of a private run on the 4,000."""
    return make_plan(
        sample_size=N, sample_rate=row.q, epochs=row.epochs, target_epsilon=epsilon,
        target_delta=DELTA, max_grad_norm=1.0, clipping_fn=row.clipping,
    )  # fmt: skip


def trained(
    row: Row, plan: PrivacyPlan, rate: float, x: Tensor, y: Tensor, seed: int
) -> dict[str, Fit]:
    """Train with as much noise as the plan has for each of its examples, in one stage after another.

    The steps of all stages together are those of the plan, and so is what they cost.

    Returns:
        by the names of `AVERAGES`, what each gives for inputs.
    """
    torch.manual_seed(seed)
    network = NETWORKS[row.network]()
    if row.public:
        network.load_state_dict(public_weights(row.network))
    fits: dict[str, Fit] = {}
    for i, (method, share) in enumerate(row.stages):
        for p in network.parameters():
            p.requires_grad_(True)
        own = make_plan(
            sample_size=len(x), sample_rate=row.q, steps=round(share * plan.steps),
            target_delta=DELTA, max_grad_norm=1.0, clipping_fn=row.clipping,
            noise_multiplier=plan.noise_multiplier * len(x) / N,
        )  # fmt: skip
        fits = _one_stage(row, own, rate, apply_method(network, method), x, y, 10 * seed + i)
    return fits


def _one_stage(
    row: Row, plan: PrivacyPlan, rate: float, network: nn.Module, x: Tensor, y: Tensor, seed: int
) -> dict[str, Fit]:
    model: nn.Module = Views(network, dims=x.ndim)
    if row.kalman is not None:
        model = Ahead(model)
    if row.moment_scaling is not None:
        model = Scaled(model)
    engine = PrivacyEngine(model, plan=plan, seed=seed)
    trainable = [p for p in model.parameters() if p.requires_grad]
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    optimizer = engine.attach(
        kinds[row.optimizer](trainable, lr=rate, weight_decay=row.weight_decay)
    )
    parts = [1.0]
    if isinstance(model, Scaled):
        MomentScaling(model, optimizer, beta=row.moment_scaling or 0.0)
    if row.low_pass is not None:
        LowPassFilter(optimizer, row.low_pass)
    if isinstance(model, Ahead):
        parts = list(KalmanFilter(model, optimizer, kappa=row.kalman or 0.0, gamma=GAMMA).weights)
    averages = {
        name: WeightAverage(
            model,
            optimizer,
            decay=kind.get("ema"),
            first_step=round((1 - kind.get("tail", 1.0)) * plan.steps),
        )
        for name, kind in AVERAGES.items()
        if kind
    }
    moved = Augmentation("crop", row.views, RootKey.from_seed(seed)) if row.views > 1 else None
    schedule = Schedule(row.decay, plan.steps, row.warmup)
    private = torch.utils.data.TensorDataset(x, y)
    while not engine.exhausted:
        for inputs_B, labels_B in engine.loader(private, max_physical_batch_size=1000):
            schedule.apply(optimizer, engine.steps_done)
            views = inputs_B if moved is None else moved(inputs_B, engine.steps_done)
            outputs = model(views).reshape(len(labels_B), len(parts), -1, 10)  # [B, A, K, 10]
            losses = [
                part * F.cross_entropy(outputs[:, i, k], labels_B, reduction="none")
                for i, part in enumerate(parts)
                for k in range(outputs.shape[2])
            ]
            (torch.stack(losses, 1).sum(1) / outputs.shape[2]).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    engine.detach()

    def fit(name: str, inputs: Tensor) -> Tensor:
        with averages[name].applied() if name else nullcontext(), torch.no_grad():
            return torch.as_tensor(network(inputs))

    return {name: partial(fit, name) for name in AVERAGES}


def chosen(row: Row) -> dict[str, tuple[float, float]]:
    """By the names of `AVERAGES`, (accuracy in cross-validation on the public part at ε = 3, rate)."""
    x, y = inputs_of(row)[public_part()], data()[1][public_part()]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(5))
    plan = plan_of(row, 3.0)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in AVERAGES}
    for rate in row.rates:
        accuracies: dict[str, list[float]] = {name: [] for name in AVERAGES}
        for fold in range(2):  # of four
            test = order[fold::4]
            train = torch.cat([order[other::4] for other in range(4) if other != fold])
            for name, fit in trained(row, plan, rate, x[train], y[train], seed=fold).items():
                accuracies[name].append(accuracy(fit, x[test], y[test]))
        for name, values in accuracies.items():
            found[name].append((statistics.mean(values), rate))
    return {name: max(values) for name, values in found.items()}


def accuracy(fit: Fit, x: Tensor, y: Tensor) -> float:
    """The share of labels that it gives."""
    return float((fit(x).argmax(1) == y).double().mean())


def inputs_of(row: Row) -> Tensor:
    """What the row's network takes."""
    return inputs("hog" if row.network == "HOG" else "images")


@functools.cache
def measured(row: Row, rate: float, epsilon: float, seed: int) -> dict[str, float]:
    """Accuracy on the test set of one private run by the engine, by the names of `AVERAGES`."""
    x, y, train, test = inputs_of(row), *data()[1:]
    plan = plan_of(row, epsilon)
    assert plan.epsilon() <= epsilon
    fits = trained(row, plan, rate, x[train], y[train], seed)
    return {name: accuracy(fit, x[test], y[test]) for name, fit in fits.items()}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", help="rows; all by default")
    torch.set_num_threads(1)
    for name in parser.parse_args().rows or ROWS:
        row = ROWS[name]
        for average, (validated, rate) in chosen(row).items():
            if average and name not in AVERAGED:
                continue
            print(
                f"# {name}{average}: rate {rate:g}, {validated:.3f} in cross-validation", flush=True
            )
            cells = []
            for epsilon in BUDGETS:
                found = [measured(row, rate, epsilon, seed)[average] for seed in SEEDS]
                cells.append(f"{statistics.mean(found):.3f} ± {statistics.stdev(found):.3f}")
                print("#", epsilon, found, flush=True)
            print(f"| {name}{average} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
