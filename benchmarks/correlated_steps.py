"""What correlated noise adds to a step: python benchmarks/correlated_steps.py [rounds]

Processor time of one thread, mechanisms interleaved, medians; and the bytes that the noise of a step
moves: the sum is read and written, each band read, and one band written.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dptorch import PrivacyEngine, make_plan

BANDS = 8
MECHANISMS: dict[str, dict[str, Any]] = {
    "gaussian": {},
    "banded": {"mechanism": "banded", "bands": BANDS, "coefficients": "square-root"},
    "inverse-banded": {"mechanism": "inverse-banded", "bands": BANDS},
}
#: Numbers of the model's size that the noise of a step reads and writes.
MOVED = {"gaussian": 2, "banded": 2 + BANDS - 1 + 1, "inverse-banded": 2}


def mlp() -> tuple[nn.Module, torch.Tensor]:
    """670,000 parameters, each used once an example."""
    model = nn.Sequential(
        nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )
    return model, torch.randn(256, 784)


def convolutions() -> tuple[nn.Module, torch.Tensor]:
    """Filters, each used at every place of a picture."""
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, 10)), torch.randn(64, 3, 32, 32)


def encoder() -> tuple[nn.Module, torch.Tensor]:
    """Two layers of a transformer on 64 positions."""
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model = nn.Sequential(stack, nn.Flatten(), nn.Linear(64 * 256, 10))
    return model, torch.randn(32, 64, 256)


def steps_of(make: Callable[[], tuple[nn.Module, torch.Tensor]]) -> dict[str, Callable[[], None]]:
    """A function that takes one step, by mechanism; "ordinary" is without privacy."""
    found: dict[str, Callable[[], None]] = {}
    for name in ("ordinary", *MECHANISMS):
        torch.manual_seed(0)
        model, x = make()
        y = torch.randint(10, (len(x),))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if name == "ordinary":
            found[name] = _ordinary(model, optimizer, x, y)
            continue
        plan = make_plan(
            batch_size=len(x),
            sample_size=len(x) * BANDS,
            steps=10_000,
            noise_multiplier=1.0,
            target_delta=1e-5,
            **MECHANISMS[name],
        )
        engine = PrivacyEngine(model, plan=plan, seed=0)
        found[name] = _private(engine, model, engine.attach(optimizer), x, y)
    return found


def _ordinary(model: nn.Module, optimizer: Any, x: torch.Tensor, y: torch.Tensor) -> Any:
    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def _private(
    engine: Any, model: nn.Module, optimizer: Any, x: torch.Tensor, y: torch.Tensor
) -> Any:
    data = torch.utils.data.TensorDataset(x.repeat(BANDS, *[1] * (x.dim() - 1)), y.repeat(BANDS))
    loader = engine.loader(data)
    batches = iter(())

    def step() -> None:
        nonlocal batches
        optimizer.zero_grad()
        batch = next(batches, None)
        if batch is None:
            batches = iter(loader)
            batch = next(batches)
        inputs, labels = batch
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()

    return step


def main(rounds: int) -> None:
    """Print a row for each model."""
    torch.set_num_threads(1)
    for make in (mlp, convolutions, encoder):
        ways = steps_of(make)
        size = sum(p.numel() for p in make()[0].parameters())
        spent: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, step in ways.items():
                began = time.process_time()
                step()
                spent[name].append(time.process_time() - began)
        middle = {name: statistics.median(times[3:]) for name, times in spent.items()}
        for name, moved in MOVED.items():
            print(
                f"{make.__name__:12} {size:>9,} {name:14} {middle[name] * 1e3:7.2f} ms, "
                f"{middle[name] / middle['ordinary']:.2f} of an ordinary step, "
                f"{middle[name] / middle['gaussian']:.2f} of independent noise, "
                f"noise moves {4 * moved * size / 1e6:.1f} MB",
                flush=True,
            )


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 25)
