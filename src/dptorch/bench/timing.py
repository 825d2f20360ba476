"""Measure how long a step takes, as a ratio to the ordinary step next to it.

All engines step in one process, in rounds. A round goes through the engines in a new random order, a
few at a time, and among those few is one ordinary step that they are divided by: what else the
machine does then falls on both.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Clock", "Timing", "interleave", "percentile"]

_TOGETHER = 3  # engines that share an ordinary step
_SLOW = 5.0  # from this ratio on an engine sits out rounds, so that the others get more of them
_LEAST, _MOST = 8, 400  # rounds


@dataclass(frozen=True)
class Timing:
    """One engine's steps.

    Args:
        rounds: steps measured.
        step_ms: median time of a step in milliseconds.
        ratio: median over rounds of the step's time over the ordinary step's.
        ratio_p10, ratio_p90: 10th and 90th percentile of the same.
        cpu_ratio: the median ratio of CPU time, all threads together.
    """

    rounds: int
    step_ms: float
    ratio: float
    ratio_p10: float
    ratio_p90: float
    cpu_ratio: float


def interleave(
    reference: Callable[[], None],
    steps: Mapping[str, Callable[[], None]],
    *,
    seconds: float,
    device: torch.device | str = "cpu",
    seed: int = 0,
    rounds: int | None = None,
) -> dict[str, Timing]:
    """Time the steps in interleaved rounds.

    Args:
        reference: the ordinary step.
        steps: the others by name; each has stepped once before.
        seconds: how long to go on. At least 8 rounds are measured.
        device: waited for before the clock is read.
        seed: of the order.
        rounds: this many instead.

    Example:
        >>> work = lambda: sum(range(20000))
        >>> timings = interleave(work, {"same": work}, seconds=0.0)
        >>> timings["same"].rounds
        8
    """
    shuffle = random.Random(seed).shuffle
    clock = Clock(torch.device(device))
    usual = min(clock(reference)[0] for _ in range(2))
    every = {n: _stride(min(clock(s)[0] for _ in range(2)) / usual) for n, s in steps.items()}
    samples: dict[str, list[tuple[float, float, float]]] = {n: [] for n in steps}
    frozen = gc.get_freeze_count()
    gc.collect()
    gc.freeze()  # what is there stays: collecting between rounds then takes no time
    try:
        end, done = time.monotonic() + seconds, 0
        while (
            done < rounds if rounds else done < _LEAST or (done < _MOST and time.monotonic() < end)
        ):
            names = [n for n in steps if done % every[n] == 0]
            shuffle(names)
            gc.collect()
            for i in range(0, len(names), _TOGETHER):
                group = names[i : i + _TOGETHER]
                base = random.Random(seed + done + i).randint(0, len(group))
                times = [clock(steps[n]) for n in group[:base]]
                wall, cpu = clock(reference)
                times += [clock(steps[n]) for n in group[base:]]
                for n, (w, c) in zip(group, times, strict=True):
                    samples[n].append((w, w / wall, c / cpu if cpu else float("nan")))
            done += 1
    finally:
        if not frozen:  # else the caller's objects would thaw too
            gc.unfreeze()
    return {name: _summary(found) for name, found in samples.items()}


def percentile(values: Sequence[float], share: float) -> float:
    """The value that this share of the values lies below, without interpolation."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def _stride(ratio: float) -> int:
    return max(1, min(4, round(ratio / _SLOW)))


def _summary(samples: Sequence[tuple[float, float, float]]) -> Timing:
    walls, ratios, cpus = zip(*samples, strict=True)
    return Timing(
        rounds=len(samples),
        step_ms=1000 * statistics.median(walls),
        ratio=statistics.median(ratios),
        ratio_p10=percentile(ratios, 0.1),
        ratio_p90=percentile(ratios, 0.9),
        cpu_ratio=statistics.median(cpus),
    )


class Clock:
    """(wall, CPU) seconds of a call, the device's work included."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, step: Callable[[], None]) -> tuple[float, float]:
        self._wait()
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        self._wait()
        return time.perf_counter() - wall, time.process_time() - cpu

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
