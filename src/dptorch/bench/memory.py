"""Measure how much memory a step takes, and how large a batch fits.

Peaks are counted twice. The allocator's is all tensors above the model and its batch: what the
engine keeps between steps, and the most that a step takes on top. The resident set is what the
operating system gave the process during steps, above what it had between them; it also sees what
libraries take past the allocator, and is blurred by pages and pools. Each engine runs in a process
of its own, see `worker.py`.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from dptorch.bench.workloads import Unavailable
from dptorch.engine.out_of_memory import is_out_of_memory
from dptorch.errors import ConfigurationError

__all__ = [
    "Question",
    "allocator_peak",
    "ask",
    "largest_batch",
    "live_bytes",
    "memory_bytes",
    "resident_peak",
]

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_MOST = 2**20  # examples


def live_bytes(device: torch.device) -> int:
    """Bytes of all tensors alive; on the CPU of those that Python knows of."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    storages = {}
    for found in gc.get_objects():
        if isinstance(found, torch.Tensor) and found.device.type == "cpu":
            with suppress(RuntimeError, NotImplementedError):  # tensors without storage
                storage = found.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def allocator_peak(step: Callable[[], None], device: torch.device) -> int:
    """Most bytes allocated at any time of the step, above those live at its start.

    On the CPU from torch's profiler: memory that was live before and is freed inside the step is not
    counted down.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        start = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - start
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    results = profiler.profiler.kineto_results
    changes = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    live = peak = 0
    for _, change in sorted(changes, key=lambda c: c[0]):
        live += change
        peak = max(peak, live)
    return peak


def resident_peak(step: Callable[[], None], steps: int = 3) -> int | None:
    """Largest resident set while stepping, above the one before, in bytes. None where there is no
    Linux to ask."""
    before = _begin_resident()
    if before is None:
        return None
    for _ in range(steps):
        step()
    return max(0, _resident("VmHWM") - before)


def _begin_resident() -> int | None:
    """Give free memory back, reset the peak, and return the resident set."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        _RESET.write_text("5")
        return _resident("VmRSS")
    except OSError:
        return None


def _resident(line: str) -> int:
    for text in _STATUS.read_text().splitlines():
        if text.startswith(line):
            return int(text.split()[1]) * 1024
    raise OSError(f"no {line} in {_STATUS}.")


def largest_batch(
    start: Callable[[int], Callable[[], None]], cap: int, device: torch.device
) -> int:
    """The largest batch whose steps stay below `cap` bytes, by doubling and bisection to 5 %.

    On the CPU the cap is on the resident set of the whole process, Python and libraries included;
    on CUDA on what the allocator may reserve.

    Args:
        start: batch size -> a step.

    Returns:
        0 if not even one example fits.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total), device)
    good, bad = 0, 1
    while bad <= _MOST and _fits(start, bad, cap, device):
        good, bad = bad, 2 * bad
    while bad - good > max(1, good // 20):
        middle = (good + bad) // 2
        if _fits(start, middle, cap, device):
            good = middle
        else:
            bad = middle
    return good


def _fits(
    start: Callable[[int], Callable[[], None]], size: int, cap: int, device: torch.device
) -> bool:
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif _begin_resident() is None:
        raise Unavailable("peaks of the resident set are only known on Linux")
    try:
        with _limit(cap) if device.type == "cpu" else nullcontext():
            step = start(size)
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return device.type == "cuda" or _resident("VmHWM") <= cap
    except MemoryError:
        return False
    except Unavailable as error:
        if is_out_of_memory(error.__cause__) or is_out_of_memory(error):
            return False
        raise


class _limit:
    """Keeps a trial that is far too large from taking the machine down: a soft limit on the process's
    data, well above the cap."""

    def __init__(self, cap: int) -> None:
        self._cap = cap

    def __enter__(self) -> None:
        import resource

        self._old = resource.getrlimit(resource.RLIMIT_DATA)
        limit = _resident("VmData") + int(1.25 * self._cap)
        hard = self._old[1]
        if hard != resource.RLIM_INFINITY:
            limit = min(limit, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))

    def __exit__(self, *args: object) -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, self._old)


# -- a process of its own --------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """What a worker process is asked: the peaks of a step, or with a cap (bytes) the largest batch
    and how long a step on it takes."""

    workload: str
    engine: str
    size: dict[str, int | None]
    peers: dict[str, str] = field(default_factory=dict)
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1
    cap: int | None = None


def ask(question: Question) -> dict[str, int | None]:
    """Put a question to a new process.

    Returns:
        ``allocator`` and ``resident`` in bytes; or ``batch``, and ``step_us`` of a step on it.

    Raises:
        Unavailable: if the engine cannot run there, or the process died.
    """
    found = subprocess.run(
        [sys.executable, "-m", "dptorch.bench.worker"],
        input=json.dumps(asdict(question)),
        capture_output=True,
        text=True,
    )
    try:
        answer = json.loads(found.stdout.strip().splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        last = (found.stderr.strip().splitlines() or ["no message"])[-1]
        why = "killed, out of memory?" if found.returncode == -9 else last[:160]
        raise Unavailable(f"its process died: {why}") from None
    if "unavailable" in answer:
        raise Unavailable(answer["unavailable"])
    return answer


def memory_bytes(text: str) -> int:
    """Bytes of "4GB", "512MiB" or a plain number.

    Raises:
        ConfigurationError: for anything else.

    Example:
        >>> memory_bytes("4GB"), memory_bytes("1.5MiB")
        (4000000000, 1572864)
    """
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    units |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    number = text.strip().rstrip("kmgibKMGIB ")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        value = float(number) * units[unit]
    except (KeyError, ValueError):
        value = 0
    if not 0 < value < 2**60:
        raise ConfigurationError(
            f"--memory-cap {text!r} is no amount of memory. Expected one like 4GB or 512MiB."
        )
    return int(value)
