"""Runs a C function in several threads at once: in torch's own, where they can be reached.

After each of its loops torch's threads wait for the next one busily, for some milliseconds; threads
of our own would share the processor with them.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

__all__ = ["run_in_team"]

_OPENMP = re.compile(r"lib(gomp|iomp5|omp)[-.]")


def run_in_team(function: Any, job: ctypes.Structure, threads: int) -> None:
    """Call ``function(&job)`` in `threads` threads, and wait for all of them.

    Args:
        function: of a ctypes library, void, with one pointer as its argument.
        job: shared by all threads.
        threads: at least 1.
    """
    address = ctypes.addressof(job)
    start = _openmp_start() if threads > 1 else None
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
    """``GOMP_parallel`` of the OpenMP library that this process has loaded; None without one.

    GNU's OpenMP defines it as ``void (void (*)(void *), void *, unsigned threads, unsigned flags)``;
    LLVM's and Intel's have it too.
    """
    with contextlib.suppress(OSError, AttributeError):
        for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
            path = line.split(maxsplit=5)[-1]
            if path.startswith("/") and _OPENMP.match(Path(path).name):
                start = ctypes.CDLL(path).GOMP_parallel
                start.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
                start.restype = None
                return start
    return None
