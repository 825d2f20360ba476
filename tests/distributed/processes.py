"""Several ranks for a test: forked processes with a gloo group, and what each of them returned."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from tests.ledger.processes import spawn, wait

__all__ = ["on_ranks", "start", "start_rank"]


def start_rank(rank: int, size: int, folder: Path) -> None:
    """Make this process a rank of a gloo group that meets in `folder`."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=size,
    )


def start(size: int, folder: Path, work: Callable[[int], object]) -> list[int]:
    """Fork `size` ranks; each does ``work(rank)`` and leaves in a file what that returns or raises."""

    def child(rank: int) -> None:
        torch.manual_seed(0)
        start_rank(rank, size, folder)
        try:
            found: object = work(rank)
        except Exception as error:
            found = error
        (folder / f"rank-{rank}").write_bytes(pickle.dumps(found))

    return [spawn(lambda rank=rank: child(rank)) for rank in range(size)]  # type: ignore[misc]


def on_ranks(size: int, work: Callable[[int], object]) -> list[Any]:
    """What ``work(rank)`` returned on each of `size` ranks; an exception, where it raised one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        codes = [wait(pid) for pid in start(size, folder, work)]
        assert codes == [0] * size, f"exit codes of the ranks: {codes}"
        return [pickle.loads((folder / f"rank-{rank}").read_bytes()) for rank in range(size)]


def found_on_ranks(size: int, work: Callable[[int], dict[str, Any]]) -> list[dict[str, Any]]:
    """What ``work(rank)`` returned on each of `size` ranks; raises what one of them raised."""
    by_rank = on_ranks(size, work)
    for found in by_rank:
        if isinstance(found, Exception):
            raise found
    return by_rank
