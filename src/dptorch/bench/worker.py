"""One engine in a process of its own: ``python -m dptorch.bench.worker`` answers a `Question` in JSON.

Libraries print as they like; the answer goes where nothing else does, to the original standard output.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dptorch.bench.all_engines import engines
from dptorch.bench.engines import start
from dptorch.bench.memory import Question, allocator_peak, largest_batch, live_bytes, resident_peak
from dptorch.bench.timing import Clock
from dptorch.bench.workloads import Size, Unavailable, get_workload

__all__ = ["answer", "main"]


def answer(question: Question) -> dict[str, Any]:
    """What `memory.ask` returns; ``unavailable`` with a reason if the engine cannot run."""
    torch.set_num_threads(question.threads)
    device, dtype = torch.device(question.device), getattr(torch, question.dtype)
    engine = engines({n: Path(p) for n, p in question.peers.items()})[question.engine]
    made, size = get_workload(question.workload), Size(**question.size)  # type: ignore[arg-type]

    def begin(B: int) -> Callable[[], None]:
        work = made.make(size.with_("B", B), device=device, dtype=dtype)
        return start(engine, work)

    try:
        if question.cap is not None:
            batch = largest_batch(begin, question.cap, device)
            return {"batch": batch, "step_us": _step_us(begin(batch), device) if batch else None}
        work = made.make(size, device=device, dtype=dtype)
        before = live_bytes(device)
        step = start(engine, work)
        kept = max(0, live_bytes(device) - before)
        resident = resident_peak(step) if device.type == "cpu" else None
        return {"allocator": kept + allocator_peak(step, device), "resident": resident}
    except Unavailable as error:
        return {"unavailable": str(error)}


def _step_us(step: Callable[[], None], device: torch.device) -> int:
    """Median time of a step in microseconds."""
    return round(1e6 * statistics.median(Clock(device)(step)[0] for _ in range(5)))


def main() -> None:
    """Read a question, answer it."""
    warnings.simplefilter("ignore")
    question = Question(**json.load(sys.stdin))
    out = os.dup(1)
    os.dup2(2, 1)
    result = answer(question)
    os.write(out, (json.dumps(result) + "\n").encode())


if __name__ == "__main__":
    main()
