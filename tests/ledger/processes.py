"""Child processes that share a table of what they did with the test, and can be killed.

They are forked, so that each costs milliseconds and not an import of torch. What a child writes to the
shared table survives its death by any signal.
"""

from __future__ import annotations

import gc
import os
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing.shared_memory import SharedMemory

import numpy as np
import torch

__all__ = ["kill", "shared", "spawn", "until", "wait"]


def shared(shape: tuple[int, ...]) -> np.ndarray:
    """An int32 table of zeros that forked children write to. It lives as long as the process."""
    memory = SharedMemory(create=True, size=4 * int(np.prod(shape)))
    memory.unlink()
    table: np.ndarray = np.ndarray(shape, np.int32, buffer=memory.buf)
    table[:] = 0
    _KEEP.append(memory)
    return table


_KEEP: list[SharedMemory] = []


def spawn(work: Callable[[], None]) -> int:
    """Fork a child that does `work` and ends with 0, or 1 and a traceback; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        gc.freeze()  # a collection would copy the memory of all that the parent has
        torch.set_num_threads(1)  # OpenMP would wait for threads that a fork leaves behind
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(pid: int) -> int:
    """The exit code of a child; negative: the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill(pid: int) -> int:
    """End a child at once, whatever it is doing; returns its exit code."""
    os.kill(pid, signal.SIGKILL)
    return wait(pid)


def until(reached: Callable[[], object], *pids: int) -> None:
    """Look again and again, however long it takes; if `pids` are given, until these have all ended."""
    while not reached() and (not pids or any(map(_running, pids))):
        time.sleep(0.0003)


def _running(pid: int) -> bool:
    """Whether a child still runs; one that has ended is left for `wait`."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
