"""How long matrix products and memory traffic take on a device: two numbers, measured once.

The choice between methods needs only their ratio. Measuring takes a few tens of milliseconds, and
the result is kept on disk, so that runs on one machine choose alike.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

__all__ = ["TYPICAL", "DeviceCost", "cost_of", "free_bytes", "keep_freed_memory", "measure"]

_FORMAT = 3
# A measured intensity further from the typical one than this factor is a disturbed measurement.
_CREDIBLE = 8.0


@dataclass(frozen=True)
class DeviceCost:
    """Speed of one device in one dtype.

    Attributes:
        flops_per_second: of batched matrix products of moderate size.
        bytes_per_second: of element-wise work on tensors of the size that is worked on at once.

    On a CPU both are of one thread and of its own time: what other processes take from a wall clock is
    no property of the device, and choices depend on the ratio alone.
    """

    flops_per_second: float
    bytes_per_second: float

    @property
    def intensity(self) -> float:
        """Flops in the time of one byte: what choices depend on."""
        return self.flops_per_second / self.bytes_per_second

    def seconds(self, flops: float, moved_bytes: float) -> float:
        """Estimated time of some matrix products and some traffic.

        Example:
            >>> DeviceCost(1e9, 1e9).seconds(2e9, 1e9)
            3.0
        """
        return flops / self.flops_per_second + moved_bytes / self.bytes_per_second


TYPICAL = {"cpu": DeviceCost(1.0e11, 1.5e10), "cuda": DeviceCost(2.0e13, 1.2e12)}
"""For seeded runs, which should choose alike on every machine, and where nothing can be measured."""


def cost_of(device: torch.device, dtype: torch.dtype, *, measured: bool = True) -> DeviceCost:
    """The speed of `device`, from this process, the cache on disk, or a measurement now."""
    typical = TYPICAL.get(device.type, TYPICAL["cpu"])
    if not measured or dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return typical
    return _cost_of(device.type, device.index, dtype)


@cache
def _cost_of(kind: str, index: int | None, dtype: torch.dtype) -> DeviceCost:
    device = torch.device(kind if index is None else f"{kind}:{index}")
    if kind == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.machine()} {_processor()}"
    entry = f"{kind}: {name}, {dtype}, torch {torch.__version__}"
    path = _cache_file()
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return DeviceCost(**json.loads(path.read_text())[f"format {_FORMAT}"][entry])
    found, typical = measure(device, dtype), TYPICAL.get(kind, TYPICAL["cpu"])
    if not typical.intensity / _CREDIBLE <= found.intensity <= typical.intensity * _CREDIBLE:
        return typical  # the machine was busy with something else
    _remember(path, entry, found)
    return found


def measure(device: torch.device, dtype: torch.dtype) -> DeviceCost:
    """Time a batched product and a pass over memory on `device`: the fastest of a few tries each."""
    small = device.type != "cuda"
    b, t, d = (4, 128, 256) if small else (16, 512, 1024)
    numel = (
        2**22 if small else 2**27
    )  # as much as `dptorch.tape.gradients.base.in_parts` forms at once
    with torch.no_grad(), torch._C.DisableTorchFunction(), _one_thread(device):
        a = torch.ones(b, t, d, device=device, dtype=dtype)
        x = torch.ones(numel, device=device, dtype=dtype)
        product = _fastest(lambda: torch.bmm(a, a.transpose(1, 2)), device)
        traffic = _fastest(lambda: x.mul_(1.0), device)
    return DeviceCost(2 * b * t * t * d / product, 2 * x.numel() * x.element_size() / traffic)


def _fastest(work: Callable[[], object], device: torch.device, tries: int = 20) -> float:
    clock = time.perf_counter if device.type == "cuda" else time.thread_time
    times = []
    for _ in range(tries):
        _wait(device)
        start = clock()
        work()
        _wait(device)
        times.append(clock() - start)
    return max(min(times), 1e-9)


@contextlib.contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU torch uses this thread alone, whose own time is then the time of all that is done."""
    threads = torch.get_num_threads()
    if device.type != "cuda":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _processor() -> str:
    """The processor's model, where the system says it."""
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        if found:
            return found[1]
    return platform.processor()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_bytes(device: torch.device) -> float:
    """Memory that a process could still take on `device`; infinite where it cannot be asked."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + cached)
    try:
        with open("/proc/meminfo", "rb", buffering=0) as file:  # every forward pass asks
            found = re.search(rb"MemAvailable: *(\d+) kB", file.read(4096))
    except OSError:
        return math.inf
    return float(found[1]) * 1024 if found else math.inf


# The largest block that counts in `keep_freed_memory` (DEFAULT_MMAP_THRESHOLD_MAX of glibc), less what
# the C library and torch add to it.
_LARGEST_THAT_COUNTS = 2**25 - 2**16


def keep_freed_memory() -> None:
    """Let the C library keep up to 64 MiB that one step frees, for the next to use.

    glibc gives the free end of its heap back once it is longer than twice the largest block that it
    has seen freed, of those up to 32 MiB. Clipping frees what a backward kept all at once, at that end,
    and the next backward would take it again page by page. So such a block is made and freed here; no
    page of it is touched. Other C libraries do not look at it.
    """
    torch.empty(_LARGEST_THAT_COUNTS, dtype=torch.uint8, device="cpu")


def _cache_file() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "dptorch" / "device_cost.json"


def _remember(path: Path, entry: str, found: DeviceCost) -> None:
    """Add to the cache; a disk that cannot be written to costs a measurement in the next process."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            known = json.loads(path.read_text()).get(f"format {_FORMAT}", {})
        except (OSError, ValueError, AttributeError):
            known = {}
        new = path.with_name(f"{path.name}.{os.getpid()}")
        new.write_text(json.dumps({f"format {_FORMAT}": known | {entry: asdict(found)}}, indent=1))
        new.replace(path)
    except OSError:
        pass
