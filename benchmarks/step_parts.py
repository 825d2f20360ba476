"""Where the time of a private step goes, beside an ordinary one: python -m benchmarks.step_parts mlp

Both steps are taken in turn, their parts timed apart; the least and the median of all rounds are
printed, in milliseconds. `--cpu` times the processor instead of the clock, for a machine that others
use too; it is of one thread then.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

import dptorch
import dptorch.engine.private_step
from dptorch.bench.workloads import WORKLOADS, Size, Workload, get_workload
from dptorch.noise import GaussianNoise
from dptorch.tape import Tape

# A part of the private step: where its function is found, and under which name. The first two are in
# the backward, where clipping is done at its end.
PARTS: dict[str, tuple[Any, str]] = {
    "norms": (Tape, "_measure"),
    "clipped sums": (Tape, "clipped_sum"),
    "fingerprint of the sum": (dptorch.engine.private_step, "fingerprint"),
    "noise, division": (GaussianNoise, "privatize"),
}


Clock = Callable[[], float]


@contextmanager
def timed(seconds: dict[str, float], clock: Clock) -> Iterator[None]:
    """Inside, every part adds its time to `seconds`; a part within a part counts as the outer one."""
    originals = {part: getattr(*place) for part, place in PARTS.items()}
    inside = False

    def watched(part: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:
                return originals[part](*args, **kwargs)
            inside, began = True, clock()
            try:
                return originals[part](*args, **kwargs)
            finally:
                inside = False
                seconds[part] = seconds.get(part, 0.0) + clock() - began

        return call

    for part, (owner, name) in PARTS.items():
        setattr(owner, name, watched(part))
    try:
        yield
    finally:
        for part, (owner, name) in PARTS.items():
            setattr(owner, name, originals[part])


def step(
    work: Workload,
    model: torch.nn.Module,
    optimizer: Any,
    seconds: dict[str, float],
    clock: Clock,
) -> None:
    """One step, its three outer parts timed."""
    marks = [clock()]
    loss = work.losses(model, *work.inputs).mean()
    marks.append(clock())
    loss.backward()
    marks.append(clock())
    optimizer.step()
    optimizer.zero_grad()
    marks.append(clock())
    for name, start, stop in zip(("forward", "backward", "step"), marks, marks[1:], strict=False):
        seconds[name] = stop - start


def measure(
    name: str, rounds: int, clock: Clock = time.perf_counter, size: Size | None = None
) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds of each part in each round: of the ordinary step, of the private one."""
    work = get_workload(name).make(size)
    plain = copy.deepcopy(work.model)
    ordinary = torch.optim.SGD(plain.parameters(), lr=1e-6)
    engine = dptorch.PrivacyEngine(
        work.model,
        sample_rate=1.0,
        sample_size=work.batch_size,
        steps=10**6,
        noise_multiplier=1.0,
        target_delta=1e-5,
    )
    private = engine.attach(torch.optim.SGD(work.model.parameters(), lr=1e-6))
    found: dict[str, tuple[list[float], list[float]]] = {}
    for i in range(rounds + 2):
        times: tuple[dict[str, float], dict[str, float]] = ({}, {})
        step(work, plain, ordinary, times[0], clock)
        with timed(times[1], clock):
            step(work, work.model, private, times[1], clock)
        inner = times[1]
        inner["backward"] -= sum(inner[p] for p in list(PARTS)[:2])
        inner["step"] -= sum(inner[p] for p in list(PARTS)[2:])
        if i >= 2:  # the first two make what later ones reuse
            for part in ("forward", "backward", *PARTS, "step"):
                for seconds, own in zip(times, found.setdefault(part, ([], [])), strict=True):
                    own.append(seconds.get(part, 0.0))
    return found


def main() -> None:
    """Print a table for each workload."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workloads", nargs="*", default=["mlp", "gpt2_tied", "resnet_gn"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1 if options.cpu else options.threads)
    clock = time.thread_time if options.cpu else time.perf_counter
    warnings.simplefilter("ignore")
    for name in options.workloads:
        found = measure(name, options.rounds, clock)
        print(f"\n{name}: {WORKLOADS[name].what}\n")
        print("| ms, least (median) | ordinary | private |\n|---|---|---|")
        columns = zip(*found.values(), strict=True)
        totals = tuple([sum(row) for row in zip(*c, strict=True)] for c in columns)
        for part, (ordinary, private) in [*found.items(), ("**all**", totals)]:
            cells = [
                f"{1e3 * min(c):.1f} ({1e3 * statistics.median(c):.1f})" if any(c) else ""
                for c in (ordinary, private)
            ]
            print(f"| {part} | {cells[0]} | {cells[1]} |")


if __name__ == "__main__":
    main()
