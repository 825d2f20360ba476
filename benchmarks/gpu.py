"""All that a GPU is needed for, in one run of at most eight minutes: python -m benchmarks.gpu

In this order: the tests that want a GPU, exactness against a loop on the device, the law and the speed
of noise there, a step beside the ordinary one and beside other libraries, and the peak of memory by
clipping mode. What there is no time left for is left out, and said. Writes JSON that carries the
device's name, after each part, so that an interrupted run has its results.

    python -m benchmarks.gpu --output gpu.json --peer fastdp=PATH
    python -m benchmarks.gpu --device cpu --tiny       # that the script itself works, anywhere
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dptorch.bench.all_engines import choose, engines
from dptorch.bench.engines import NON_PRIVATE, start
from dptorch.bench.exactness import gradient_error
from dptorch.bench.memory import allocator_peak
from dptorch.bench.peers import read_peers
from dptorch.bench.suite import Options, facts, measure
from dptorch.bench.timing import interleave
from dptorch.bench.workloads import Recipe, Unavailable, get_workload
from dptorch.clipping.sums import ClippedSum
from dptorch.noise import GaussianNoise
from dptorch.randomness import RootKey
from dptorch.tape.gradients.clipping_modes import MODES

#: What is measured, the most wanted first.
WORKLOADS = ("gpt2_small", "llama_1b_lora", "vit_base", "resnet50_gn", "llama_1b")
ENGINES = ("dptorch/auto", "opacus/ghost", "fastdp/MixOpt-origin")
TESTS = ("tests/tape/gradients/test_gram.py", "tests/noise/test_gaussian.py")
_STANDARD_ERRORS = 6.0  # beyond which a moment of the noise is not what it should be


@dataclass(frozen=True)
class Plan:
    """What to run, and where.

    Args:
        device: cuda or cpu.
        workloads: names.
        dtype: of the steps that are timed; exactness is looked at in float32.
        minutes: for all.
        tiny: at the size of tests.
        tests: whether the tests are run.
        peers: checkouts by name.
        normals: how many numbers of noise are looked at.
    """

    device: str = "cuda"
    workloads: Sequence[str] = WORKLOADS
    dtype: str = "bfloat16"
    minutes: float = 8.0
    tiny: bool = False
    tests: bool = True
    peers: tuple[str, ...] = ()
    normals: int = 10**8

    def recipe(self, name: str) -> Recipe:
        """The workload of this name, at the size of this run."""
        recipe = get_workload(name)
        return replace(recipe, size=recipe.tiny) if self.tiny else recipe


def run(plan: Plan, write: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """All parts in turn; `write` gets what there is after each."""
    end = time.monotonic() + 60 * plan.minutes
    chosen = engines(read_peers(plan.peers))
    options = Options(
        choose(chosen, [name for name in ENGINES if name in chosen]),
        device=plan.device,
        dtype=plan.dtype,
        memory=False,
        check=False,
        rounds=2 if plan.tiny else None,
    )
    found: dict[str, Any] = {"plan": asdict(plan), "facts": facts(options)}
    parts: dict[str, Callable[[], Any]] = {
        "tests": lambda: _tests(end - time.monotonic()) if plan.tests else "not asked for",
        "exactness": lambda: _exactness(plan),
        "noise": lambda: _noise(plan),
    }
    for i, name in enumerate(plan.workloads):
        recipe, left = plan.recipe(name), len(plan.workloads) - i
        # Half of what remains is for steps: building models and memory take the rest.
        parts[f"step {name}"] = lambda recipe=recipe, left=left: _steps(
            recipe, replace(options, seconds=max(1.0, (end - time.monotonic()) / (2 * left + 2)))
        )
    parts["memory by mode"] = lambda: _memory(plan, end)
    for name, part in parts.items():
        if time.monotonic() > end:
            found[name] = "no time left"
        else:
            began = time.monotonic()
            try:
                found[name] = part()
            except Exception as error:  # a part that fails says why, and the others go on
                found[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            found.setdefault("seconds", {})[name] = round(time.monotonic() - began, 1)
        if plan.device == "cuda":
            torch.cuda.empty_cache()
        write(found)
    return found


def _tests(seconds: float) -> dict[str, Any]:
    """What pytest says of the tests that want a GPU; a skipped one did not run."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "gpu or cuda"]
    done = subprocess.run(
        [*command, *TESTS], capture_output=True, text=True, timeout=max(1.0, min(120.0, seconds))
    )
    return {"passed": done.returncode == 0, "said": done.stdout.strip().splitlines()[-1:]}


def _exactness(plan: Plan) -> dict[str, Any]:
    """Relative error of a noiseless step of each workload, tiny, against a loop over examples."""
    ours = engines()["dptorch/auto"]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    errors: dict[str, Any] = {}
    for name in plan.workloads:
        try:
            errors[name] = gradient_error(ours, get_workload(name), plan.device)
        except Unavailable as error:
            errors[name] = str(error)
    return errors


def _noise(plan: Plan) -> dict[str, Any]:
    """Moments of the noise in units of their standard error, its correlation with itself in another
    step, and its speed beside ``normal_``."""
    n = 10**5 if plan.tiny else plan.normals
    key, noise = RootKey.from_seed(0), GaussianNoise(1.0)
    values = torch.zeros(n, device=plan.device)

    def draw(step: int) -> torch.Tensor:
        values.zero_()
        noise.privatize(ClippedSum({"w": values}, 1.0), key, step)
        return values

    def discard(_: torch.Tensor) -> None:
        """Steps return nothing."""

    first = draw(0).clone()
    z = first.double()
    moments = {
        "mean": z.mean() * math.sqrt(n),
        "variance": (z.square().mean() - 1) * math.sqrt(n / 2),
        "third": z.pow(3).mean() * math.sqrt(n / 15),
        "fourth": (z.pow(4).mean() - 3) * math.sqrt(n / 96),
        "with another step": (first * draw(1)).double().mean() * math.sqrt(n),
        "with its neighbour": (z[1:] * z[:-1]).mean() * math.sqrt(n),
    }
    found = {name: round(float(value), 3) for name, value in moments.items()}
    tails = {
        f"beyond {t}": [int((z.abs() > t).sum()), round(n * math.erfc(t / math.sqrt(2)), 1)]
        for t in (3, 4, 5)
    }
    again = bool(torch.equal(draw(0), first))
    timing = interleave(
        lambda: discard(values.normal_()),
        {"privatize": lambda: discard(draw(2))},
        seconds=0.0,
        rounds=2 if plan.tiny else 20,
        device=plan.device,
    )["privatize"]
    return {
        "standard errors": found,
        "as it should be": again and all(abs(v) < _STANDARD_ERRORS for v in found.values()),
        "tails, found and expected": tails,
        "ns a value": timing.step_ms * 1e6 / n,
        "ratio to normal_": timing.ratio,
    }


def _steps(recipe: Recipe, options: Options) -> list[dict[str, Any]]:
    """Each engine's step, as a ratio to the ordinary one, and how much it gets through."""
    rows = []
    for row in measure(recipe, options, tell=lambda text, over: None):
        rate = None if row.step_ms is None else 1000 * row.B / row.step_ms
        known = {k: v for k, v in asdict(row).items() if v not in (None, "")}
        rows.append(known | {"examples_per_second": rate})
    return rows


def _memory(plan: Plan, end: float) -> dict[str, dict[str, Any]]:
    """Bytes that a step allocates above model and batch, of the ordinary loop and by mode."""
    device = torch.device(plan.device)
    found: dict[str, dict[str, Any]] = {}
    for name in plan.workloads[:1] if plan.tiny else ("gpt2_small", "resnet50_gn"):
        recipe, peaks = plan.recipe(name), found.setdefault(name, {})
        for engine in (NON_PRIVATE, *(f"dptorch/{mode}" for mode in MODES if mode != NON_PRIVATE)):
            if time.monotonic() > end:
                peaks[engine] = "no time left"
                continue
            try:
                work = recipe.make(device=device, dtype=getattr(torch, plan.dtype))
                peaks[engine] = allocator_peak(start(engines()[engine], work), device)
            except Unavailable as error:
                peaks[engine] = str(error)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all of it, and keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    parser.add_argument("--workload", action="append", choices=WORKLOADS)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--tiny", action="store_true", help="the sizes of tests")
    parser.add_argument("--no-tests", action="store_true")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; --device cpu --tiny runs the script anyway.")
    warnings.simplefilter("ignore")
    plan = Plan(
        device=given.device,
        workloads=tuple(given.workload or WORKLOADS),
        dtype="float32" if given.tiny else "bfloat16",
        minutes=given.minutes,
        tiny=given.tiny,
        tests=not given.no_tests,
        peers=tuple(given.peer),
    )
    write = lambda found: given.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(run(plan, write), indent=1))


if __name__ == "__main__":
    main()
