"""Runs a C function in several threads at once: in torch's own, where they can be reached.

After each of its loops torch's threads wait for the next one busily, for some milliseconds; threads
of our own would share the processor with them.

A process that was forked inherits OpenMP's notes of its threads and not the threads: GNU's OpenMP
would wait for them for ever. There the threads are our own.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

__all__ = ["run_in_team"]

_OPENMP = re.compile(r"lib(gomp|iomp5|omp)[-.]")
_PF_FORKNOEXEC = 0x40  # include/linux/sched.h


def _was_forked() -> bool:
    """Whether this process is a fork that has begun no program since. False where Linux is not there
    to ask."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        after_name = Path("/proc/self/stat").read_text(errors="replace").rpartition(")")[2].split()
        return bool(int(after_name[6]) & _PF_FORKNOEXEC)
    return False


_forked = _was_forked()  # before this module was imported


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):  # not on Windows, where there is no fork
    os.register_at_fork(after_in_child=_note_fork)


def run_in_team(function: Any, job: ctypes.Structure, threads: int) -> None:
    """Call ``function(&job)`` in `threads` threads, and wait for all of them.

    Args:
        function: of a ctypes library, void, with one pointer as its argument.
        job: shared by all threads.
        threads: at least 1.
    """
    address = ctypes.addressof(job)
    start = _openmp_start() if threads > 1 and not _forked else None
    if threads == 1:
        function(ctypes.c_void_p(address))
    elif start is not None:
        start(ctypes.cast(function, ctypes.c_void_p), address, threads, 0)
    else:
        with ThreadPoolExecutor(threads, thread_name_prefix="dptorch") as pool:
            # list, so that an error in a thread is raised here.
            list(pool.map(lambda _: function(ctypes.c_void_p(address)), range(threads)))


@functools.cache
def _openmp_start() -> Callable[..., None] | None:
    """``GOMP_parallel`` of the OpenMP library that torch uses; None without one.

    GNU's OpenMP defines it as ``void (void (*)(void *), void *, unsigned threads, unsigned flags)``;
    LLVM's and Intel's have it too. Other packages may have loaded a copy of their own, which would do,
    but in other threads.
    """
    with contextlib.suppress(OSError, AttributeError):
        lines = Path("/proc/self/maps").read_text(errors="replace").splitlines()
        mapped = {line.split(maxsplit=5)[-1] for line in lines}
        paths = sorted(p for p in mapped if p.startswith("/") and _OPENMP.match(Path(p).name))
        for path in sorted(paths, key=lambda p: "/torch/" not in p):
            start = ctypes.CDLL(path).GOMP_parallel
            start.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            start.restype = None
            return start
    return None
