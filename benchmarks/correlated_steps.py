"""What correlated noise adds to a step: python benchmarks/correlated_steps.py [rounds] [workload ...]

Processor time of one thread, mechanisms interleaved, as multiples of the ordinary step: the median of
the step; of its noise and division the median and the least, which other work on the machine changes
less. Batches differ in size where they are drawn, which is more than what noise adds, so that the
noise is timed by itself too. And the bytes that it moves: the sum is read and written, and what
`BandedNoise` reads and writes of its bands. Workloads are those of `dptorch bench`.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from dptorch import PrivacyEngine, make_plan
from dptorch.bench.workloads import Workload, get_workload
from dptorch.noise import BandedNoise, GaussianNoise, InverseBandedNoise
from dptorch.noise.banded import steps_together

BANDS = 8
MECHANISMS: dict[str, dict[str, Any]] = {
    "gaussian": {},
    "banded": {"mechanism": "banded", "bands": BANDS, "coefficients": "square-root"},
    "inverse-banded": {"mechanism": "inverse-banded", "bands": BANDS},
}
NOISES = {"gaussian": GaussianNoise, "banded": BandedNoise, "inverse-banded": InverseBandedNoise}
TOGETHER = steps_together(BANDS - 1)
#: Numbers of the model's size that the noise of a step reads and writes.
MOVED = {
    "gaussian": 2.0,
    "banded": 2 + (BANDS - 1 + sum(range(2, TOGETHER + 1)) + 2 * TOGETHER - 1) / TOGETHER,
    "inverse-banded": 2.0,
}


def _cross_entropy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(x), y, reduction="none")


def _classifier(model: nn.Module, x: torch.Tensor) -> Workload:
    return Workload(model, (x, torch.randint(10, (len(x),))), _cross_entropy)


def mlp() -> Workload:
    """670,000 parameters, each used once an example."""
    model = nn.Sequential(
        nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )
    return _classifier(model, torch.randn(256, 784))


def convolutions() -> Workload:
    """Filters, each used at every place of a picture."""
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, 10))
    return _classifier(model, torch.randn(64, 3, 32, 32))


def encoder() -> Workload:
    """Two layers of a transformer on 64 positions."""
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model = nn.Sequential(stack, nn.Flatten(), nn.Linear(64 * 256, 10))
    return _classifier(model, torch.randn(32, 64, 256))


def steps_of(make: Callable[[], Workload]) -> dict[str, Callable[[], None]]:
    """A function that takes one step, by mechanism; "ordinary" is without privacy."""
    found: dict[str, Callable[[], None]] = {}
    for name in ("ordinary", *MECHANISMS):
        torch.manual_seed(0)
        work = make()
        optimizer = torch.optim.SGD(work.model.parameters(), lr=1e-6)
        if name == "ordinary":
            found[name] = _ordinary(work, optimizer)
            continue
        plan = make_plan(
            batch_size=work.batch_size,
            sample_size=work.batch_size * BANDS,
            steps=10_000,
            noise_multiplier=1.0,
            target_delta=1e-5,
            **MECHANISMS[name],
        )
        engine = PrivacyEngine(work.model, plan=plan, seed=0)
        found[name] = _private(engine, work, engine.attach(optimizer))
    return found


def _ordinary(work: Workload, optimizer: Any) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad()
        work.per_example().mean().backward()
        optimizer.step()

    return step


def _private(engine: Any, work: Workload, optimizer: Any) -> Callable[[], None]:
    data = torch.utils.data.TensorDataset(
        *(t.repeat(BANDS, *[1] * (t.dim() - 1)) for t in work.inputs)
    )
    loader = engine.loader(data)
    batches: Iterator[Any] = iter(())

    def step() -> None:
        nonlocal batches
        optimizer.zero_grad()
        batch = next(batches, None)
        if batch is None:
            batches = iter(loader)
            batch = next(batches)
        work.losses(work.model, *batch).mean().backward()
        optimizer.step()

    return step


def _timed(noise: Any, seconds: list[float]) -> None:
    """From now on the time of each step's noise is added to `seconds`."""
    privatize = noise.privatize

    def watched(*args: Any, **kwargs: Any) -> Any:
        began = time.process_time()
        released = privatize(*args, **kwargs)
        seconds.append(time.process_time() - began)
        return released

    noise.privatize = watched


def main(rounds: int, workloads: list[str]) -> None:
    """Print a row for each model and mechanism."""
    torch.set_num_threads(1)
    noise: dict[str, list[float]] = {name: [] for name in NOISES}
    for name, kind in NOISES.items():
        _timed(kind, noise[name])
    makes: dict[str, Callable[[], Workload]] = {n: get_workload(n).make for n in workloads}
    for model, make in (makes or {"mlp": mlp, "conv": convolutions, "encoder": encoder}).items():
        ways = steps_of(make)
        size = sum(p.numel() for p in make().model.parameters())
        spent: dict[str, list[float]] = {name: [] for name in ways}
        for seconds in noise.values():
            seconds.clear()
        for _ in range(rounds):
            for name, step in ways.items():
                began = time.process_time()
                step()
                spent[name].append(time.process_time() - began)
        whole = {name: statistics.median(times[3:]) for name, times in spent.items()}
        ordinary = whole["ordinary"], min(spent["ordinary"][3:])
        for name, moved in MOVED.items():
            own = noise[name][3:]
            middle, least = statistics.median(own) / ordinary[0], min(own) / ordinary[1]
            print(
                f"{model:10} {size:>10,} {name:14} {whole[name] * 1e3:8.2f} ms, "
                f"{whole[name] / ordinary[0]:.2f} of an ordinary step, its noise {middle:.3f} "
                f"(least {least:.3f}), {4 * moved * size / 1e6:.1f} MB",
                flush=True,
            )


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 25, sys.argv[2:])
