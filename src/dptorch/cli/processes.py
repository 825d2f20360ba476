"""`dptorch train --nproc N`: one run on several processes, which torch's own launcher starts.

Each process runs the same command. The first says what happens and writes the run's folder. A command
that was started by ``torchrun`` is one of several processes in the same way, on as many machines as
that was told of.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import typer

from dptorch.errors import ConfigurationError

__all__ = ["ARGUMENTS", "ENTRY", "joined", "launch", "place"]

#: Where `dptorch.cli.app` leaves the words of the command line, in a context's `meta`.
ARGUMENTS: Final = "dptorch.arguments"
#: Where a command that is none of `dptorch` leaves the Python code that runs it with those words.
ENTRY: Final = "dptorch.entry"
_COMMAND: Final = "from dptorch.cli.app import main; main()"


def place() -> tuple[int, int]:
    """Return the number of this process and how many there are, by what the launcher has said.

    Example:
        >>> place()
        (0, 1)
    """
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def launch(ctx: typer.Context, nproc: int | None, device: str) -> bool:
    """Run this command on `nproc` processes and wait for them, if that is asked for.

    Returns:
        False where this process is to run the command itself: alone, or as one of several.

    Raises:
        ConfigurationError: `nproc` does not fit.
        typer.Exit: the processes have failed.
    """
    _, size = place()
    if nproc is None or size > 1:
        if nproc not in (None, size):
            raise ConfigurationError(
                f"--nproc {nproc}, but the launcher has started {size} processes. Leave --nproc out "
                "under torchrun: it says how many there are."
            )
        return False
    _check(nproc, device)
    if nproc == 1:
        return False
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # What went wrong in a process it says itself.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id="dptorch",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # a free port
        max_restarts=0,
        shutdown_timeout=300,  # after Ctrl-C, for the batch that is under way and the report
    )
    words: Sequence[str] = ctx.meta[ARGUMENTS]
    try:
        elastic_launch(config, sys.executable)("-c", ctx.meta.get(ENTRY, _COMMAND), *words)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        raise typer.Exit(first.exitcode if first.exitcode > 0 else 1) from None
    except SignalException:
        raise typer.Exit(130) from None
    return True


@contextmanager
def joined(device: str) -> Iterator[Any]:
    """Return the ranks of this command: itself, or the processes that a launcher has started.

    Args:
        device: what was asked for; "auto" is a GPU for each process, where there are any.
    """
    from dptorch.distributed import Ranks

    _, size = place()
    if size == 1:
        yield Ranks.of()
        return
    import torch
    from torch import distributed as dist

    on_gpus = device in ("auto", "cuda") and torch.cuda.is_available()
    if on_gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if on_gpus else "gloo")
    try:
        yield Ranks.of()
    finally:
        dist.destroy_process_group()


def _check(nproc: int, device: str) -> None:
    if nproc < 1:
        raise ConfigurationError(f"--nproc {nproc}: expected a number of processes, 1 or more.")
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigurationError(
            f"--device {device} is one device, and --nproc {nproc} needs one for each process. Use "
            "--device auto, and CUDA_VISIBLE_DEVICES to choose among GPUs."
        )
    import torch

    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if device == "cuda" or gpus:
        most, of = gpus, "GPUs"
    else:
        most, of = os.cpu_count() or 1, "processors"
    if nproc > most:
        raise ConfigurationError(
            f"--nproc {nproc}, but this machine has {most} {of}, one for each process. Use at "
            f"most --nproc {max(1, most)}; on several machines start `dptorch train` by torchrun."
        )
