"""One engine in a process of its own: ``python -m dptorch.bench.worker`` answers one `Job` in JSON.

Libraries print as they like; the answer goes where nothing else does, to the original standard output.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dptorch.bench.all_engines import engines
from dptorch.bench.engines import start
from dptorch.bench.memory import Job, allocator_peak, largest_batch, live_bytes, resident_peak
from dptorch.bench.workloads import Size, Unavailable, get_workload

__all__ = ["answer", "main"]


def answer(job: Job) -> dict[str, Any]:
    """What `memory.ask` returns; ``unavailable`` with a reason if the engine cannot run."""
    torch.set_num_threads(job.threads)
    device, dtype = torch.device(job.device), getattr(torch, job.dtype)
    engine = engines({n: Path(p) for n, p in job.peers.items()})[job.engine]
    made, size = get_workload(job.workload), Size(**job.size)  # type: ignore[arg-type]

    def begin(B: int) -> Callable[[], None]:
        work = made.make(size.with_("B", B), device=device, dtype=dtype)
        return start(engine, work)

    try:
        if job.cap is not None:
            return {"batch": largest_batch(begin, job.cap, device)}
        work = made.make(size, device=device, dtype=dtype)
        before = live_bytes(device)
        step = start(engine, work)
        kept = max(0, live_bytes(device) - before)
        resident = resident_peak(step) if device.type == "cpu" else None
        return {"allocator": kept + allocator_peak(step, device), "resident": resident}
    except Unavailable as error:
        return {"unavailable": str(error)}


def main() -> None:
    """Read a job, answer it."""
    warnings.simplefilter("ignore")
    job = Job(**json.load(sys.stdin))
    out = os.dup(1)
    os.dup2(2, 1)
    result = answer(job)
    os.write(out, (json.dumps(result) + "\n").encode())


if __name__ == "__main__":
    main()
