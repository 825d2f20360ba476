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
