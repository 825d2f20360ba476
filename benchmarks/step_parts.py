"""Where the time of a private step goes, beside an ordinary one: python benchmarks/step_parts.py mlp

Both steps are taken in turn, their parts timed apart; the least and the median of all rounds are
printed, in milliseconds.
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
import dptorch.engine.privacy_engine
from dptorch.bench.workloads import WORKLOADS, Workload, get_workload
from dptorch.engine.logical_batch import LogicalBatch
from dptorch.noise import GaussianNoise
from dptorch.tape import Tape

# A part of the private step: where its function is found, and under which name.
PARTS: dict[str, tuple[Any, str]] = {
    "norms (in the backward)": (Tape, "_measure"),
    "clipped sums": (LogicalBatch, "hold"),
    "fingerprint of the sum": (dptorch.engine, "fingerprint"),
    "noise, division": (GaussianNoise, "privatize"),
}


@contextmanager
def timed(seconds: dict[str, float]) -> Iterator[None]:
    """Inside, every part adds its time to `seconds`; a part within a part counts as the outer one."""
    originals = {part: getattr(*place) for part, place in PARTS.items()}
    inside = False

    def watched(part: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:
                return originals[part](*args, **kwargs)
            inside, began = True, time.perf_counter()
            try:
                return originals[part](*args, **kwargs)
            finally:
                inside = False
                seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - began

        return call

    for part, (owner, name) in PARTS.items():
        setattr(owner, name, watched(part))
    try:
        yield
    finally:
        for part, (owner, name) in PARTS.items():
            setattr(owner, name, originals[part])


def step(work: Workload, model: torch.nn.Module, optimizer: Any, seconds: dict[str, float]) -> None:
    """One step, its three outer parts timed."""
    marks = [time.perf_counter()]
    loss = work.losses(model, *work.inputs).mean()
    marks.append(time.perf_counter())
    loss.backward()
    marks.append(time.perf_counter())
    optimizer.step()
    optimizer.zero_grad()
    marks.append(time.perf_counter())
    for name, start, stop in zip(("forward", "backward", "step"), marks, marks[1:], strict=False):
        seconds[name] = stop - start


def measure(name: str, rounds: int) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds of each part in each round: of the ordinary step, of the private one."""
    work = get_workload(name).make()
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
        step(work, plain, ordinary, times[0])
        with timed(times[1]):
            step(work, work.model, private, times[1])
        inner = times[1]
        inner["backward"] -= inner.get("norms (in the backward)", 0.0)
        inner["step"] -= sum(inner[p] for p in list(PARTS)[1:])
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
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    for name in options.workloads:
        found = measure(name, options.rounds)
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
