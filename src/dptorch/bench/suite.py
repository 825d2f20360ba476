"""Measure every workload under every engine, and return rows of results."""

from __future__ import annotations

import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dptorch.bench.all_engines import engines
from dptorch.bench.engines import NON_PRIVATE, Engine, Step, start, versions
from dptorch.bench.exactness import WRONG, gradient_error
from dptorch.bench.memory import Question, ask
from dptorch.bench.timing import interleave
from dptorch.bench.workloads import Recipe, Size, Unavailable

__all__ = [
    "Options", "Row", "Tell", "facts", "family", "is_wrong", "largest", "measure", "processor",
    "sweep_sizes",
]  # fmt: skip

#: Told what is going on, and whether it is over.
Tell = Callable[[str, bool], None]


@dataclass(frozen=True)
class Options:
    """What to measure, and how.

    Args:
        engines: by which engines; the ordinary loop is measured anyway.
        peers: checkouts by name, for the processes in which memory is measured.
        seconds: of timing for each workload and size.
        rounds: this many instead.
        threads: of the CPU.
        device, dtype: where, and in which precision.
        memory: whether to measure peaks.
        check: whether to hold each engine's gradient against a loop over examples.
        seed: of the order in which engines step.
    """

    engines: Sequence[Engine]
    peers: dict[str, Path] = field(default_factory=dict)
    seconds: float = 60.0
    rounds: int | None = None
    threads: int = 2
    device: str = "cpu"
    dtype: str = "float32"
    memory: bool = True
    check: bool = True
    seed: int = 0

    def question(self, recipe: Recipe, size: Size, engine: str, cap: int | None = None) -> Question:
        """What a worker process is asked."""
        peers = {n: str(p) for n, p in self.peers.items()}
        at = (self.device, self.dtype, self.threads)
        return Question(recipe.name, engine, dict(vars(size)), peers, *at, cap)


@dataclass
class Row:
    """One engine on one workload; None is not measured, `reason` says why it could not be.

    Times are in milliseconds, memory in MiB; ratios are to the ordinary loop.
    """

    workload: str
    engine: str
    B: int
    T: int | None
    d: int | None
    reason: str = ""
    rounds: int | None = None
    step_ms: float | None = None
    ratio: float | None = None
    ratio_p10: float | None = None
    ratio_p90: float | None = None
    cpu_ratio: float | None = None
    allocator_mib: float | None = None
    allocator_ratio: float | None = None
    resident_mib: float | None = None
    resident_ratio: float | None = None
    gradient_error: float | None = None
    largest_batch: int | None = None
    L: int | None = None
    V: int | None = None
    parameters: int | None = None


def family(engine: str) -> str:
    """The library of an engine: ``opacus`` of ``opacus/ghost``."""
    return engine.partition("/")[0]


def is_wrong(row: Row) -> bool:
    """Whether the engine clips or sums something else than each example's gradient."""
    return row.gradient_error is not None and not row.gradient_error <= WRONG


def facts(options: Options) -> dict[str, Any]:
    """Machine, versions, date and load: what must be known to read the numbers."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "machine": _machine(options),
        **_instructions(options),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "threads": options.threads,
        "dtype": options.dtype,
        "load average": ", ".join(f"{x:.1f}" for x in os.getloadavg()),
        "measured": f"{options.rounds} rounds" if options.rounds else f"{options.seconds:g} s each",
        "versions": ", ".join(f"{n} {v}" for n, v in versions().items()),
    }


def _machine(options: Options) -> str:
    cores = f"{os.cpu_count()} cores"
    if torch.device(options.device).type == "cuda":
        return f"{torch.cuda.get_device_name(options.device)}, CUDA {torch.version.cuda}"
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {cores}, {gib:.0f} GiB"


#: What the compiled code chooses by, and the BLAS: the name of a processor often hides it.
_INSTRUCTIONS = {"avx512f": "AVX-512", "vaes": "VAES", "amx_tile": "AMX", "sve": "SVE"}


def _instructions(options: Options) -> dict[str, str]:
    """The wide instructions of the processor, where it has any and the system tells."""
    info = Path("/proc/cpuinfo")
    if torch.device(options.device).type == "cuda" or not info.exists():
        return {}
    lines = [x for x in info.read_text().splitlines() if x.startswith(("flags", "Features"))]
    known = set(lines[0].split()) if lines else set()
    found = [name for flag, name in _INSTRUCTIONS.items() if flag in known]
    return {"instructions": ", ".join(found)} if found else {}


def processor(of: dict[str, Any]) -> str:
    """The processor or device of a run's `facts`: its name and its wide instructions."""
    name = of["machine"].partition(",")[0].replace("(R)", "").replace("(TM)", "")
    return f"{name} with {of['instructions']}" if of.get("instructions") else name


def sweep_sizes(recipe: Recipe, axis: str, values: Sequence[int] = ()) -> list[Size]:
    """The sizes of a sweep: the given values, or a quarter to twice the usual one.

    Raises:
        Unavailable: if the workload has no such axis.
    """
    recipe.size.with_(axis, 1)
    usual = getattr(recipe.size, axis)
    chosen = list(values) or [max(1, usual * factor // 4) for factor in (1, 2, 4, 8)]
    return [recipe.size.with_(axis, value) for value in chosen]


def measure(recipe: Recipe, options: Options, size: Size | None = None, *, tell: Tell) -> list[Row]:
    """Time, memory and exactness of all engines on one workload.

    An engine that cannot run has a row with the reason. The first row is the ordinary loop, timed
    against itself: its ratio is 1 up to what the measurement is worth.
    """
    size = size or recipe.size
    chosen = [e for e in options.engines if e.name != NON_PRIVATE]
    plain = engines()[NON_PRIVATE]
    rows = {e.name: _row(recipe, size, e.name) for e in [plain, *chosen]}
    with _threads(options.threads), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        steps: dict[str, Step] = {}
        try:
            work = _make(recipe, size, options)
            reference = start(plain, work)
        except Unavailable as error:
            for row in rows.values():
                row.reason = str(error)
            tell(f"{recipe.name}: {error}", True)
            return list(rows.values())
        trained = sum(p.numel() for p in work.model.parameters() if p.requires_grad)
        for row in rows.values():
            row.parameters = trained
        for engine in [plain, *chosen]:
            tell(f"{recipe.name}: {engine.name}", False)
            row = rows[engine.name]
            try:
                steps[engine.name] = start(engine, _make(recipe, size, options))
                if options.check and engine.all_layer:
                    row.gradient_error = gradient_error(engine, recipe)
            except Unavailable as error:
                row.reason = str(error)
        tell(f"{recipe.name}: timing {len(steps)} engines", False)
        timings = interleave(
            reference,
            steps,
            seconds=options.seconds,
            rounds=options.rounds,
            device=options.device,
            seed=options.seed,
        )
        for name, timing in timings.items():
            vars(rows[name]).update(vars(timing))
        del steps, reference, work
    if options.memory:
        _add_memory(rows, recipe, size, options, tell)
    tell(recipe.name, True)
    return list(rows.values())


def _add_memory(
    rows: dict[str, Row], recipe: Recipe, size: Size, options: Options, tell: Tell
) -> None:
    for name, row in rows.items():
        if row.reason:
            continue
        tell(f"{recipe.name}: memory of {name}", False)
        try:
            peaks = ask(options.question(recipe, size, name))
        except Unavailable as error:
            row.reason = f"memory: {error}"
            continue
        for kind in ("allocator", "resident"):
            peak, plain = peaks[kind], getattr(rows[NON_PRIVATE], f"{kind}_mib")
            if peak is None:
                continue
            setattr(row, f"{kind}_mib", peak / 2**20)
            if name == NON_PRIVATE:
                setattr(row, f"{kind}_ratio", 1.0)
            elif plain:
                setattr(row, f"{kind}_ratio", peak / 2**20 / plain)


def largest(recipe: Recipe, options: Options, cap: int, *, tell: Tell) -> list[Row]:
    """The largest batch of each engine that fits `cap` bytes, and its step there, alone."""
    names = [NON_PRIVATE, *(e.name for e in options.engines if e.name != NON_PRIVATE)]
    rows = []
    for name in names:
        tell(f"{recipe.name}: largest batch of {name}", False)
        row = _row(recipe, recipe.size, name)
        try:
            found = ask(options.question(recipe, recipe.size, name, cap))
            row.largest_batch, step_us = found["batch"], found.get("step_us")
            row.step_ms = None if step_us is None else step_us / 1000
        except Unavailable as error:
            row.reason = str(error)
        rows.append(row)
    tell(recipe.name, True)
    return rows


def _row(recipe: Recipe, size: Size, engine: str) -> Row:
    return Row(recipe.name, engine, size.B, size.T, size.d, L=size.L, V=size.V)


def _make(recipe: Recipe, size: Size, options: Options) -> Any:
    return recipe.make(size, device=options.device, dtype=getattr(torch, options.dtype))


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
