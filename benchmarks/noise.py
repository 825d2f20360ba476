"""Noise for ten million coordinates against torch's own, interleaved: python benchmarks/noise.py"""

from __future__ import annotations

import statistics
import time

import torch

from dptorch.clipping.sums import ClippedSum
from dptorch.noise import GaussianNoise
from dptorch.noise.compiled import compiled
from dptorch.randomness import RootKey

SIZE, ROUNDS = 10_000_000, 7


def main() -> None:
    """Print nanoseconds a value: least and median, and the median ratio to `normal_`."""
    key, values = RootKey.from_seed(0), torch.zeros(SIZE)
    noise = GaussianNoise(1.0)
    ways = {
        "dptorch, added": lambda: noise.privatize(ClippedSum({"w": values}, 1.0), key, 0),
        "normal_, not added": lambda: values.normal_(),
        "torch.normal, added": lambda: values.add_(torch.normal(0.0, 1.0, (SIZE,))),
    }
    print("compiled:", "yes" if compiled() else "no")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS + 1):
            for name, run in ways.items():
                began = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - began)
        for name, found in seconds.items():
            own = [s * 1e9 / SIZE for s in found[1:]]
            ratio = statistics.median(
                a / b for a, b in zip(found[1:], seconds["normal_, not added"][1:], strict=True)
            )
            print(
                f"{threads} threads  {name:20} {min(own):6.2f} {statistics.median(own):6.2f} ns "
                f"x {ratio:.2f}"
            )


if __name__ == "__main__":
    main()
