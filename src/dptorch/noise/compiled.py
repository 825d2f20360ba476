"""The normal transform as machine code: `normal.c`, compiled once per machine where it can be.

A C compiler is not part of dptorch, so its absence changes the speed and nothing else: the machine
code is used only if it makes, of random bits and of extreme ones, the same bits as numpy does.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dptorch.noise.normal import LOG, MINUS_TWICE_LOG_2, ROOT_HALF_BITS, SINE, Transform, to_float32

__all__ = ["SWITCH", "compiled_transform"]

SWITCH: Final = "DPTORCH_COMPILE"
"""Environment variable; "0" keeps dptorch from running a C compiler."""

SOURCE: Final = Path(__file__).with_name("normal.c")

_OPTIONS: Final = (
    "-std=c99",
    "-O3",
    "-shared",
    "-fPIC",
    "-ffp-contract=off",  # a fused multiply-add rounds once where numpy rounds twice
    "-fno-math-errno",
    "-fno-trapping-math",
)
_PATIENCE_S: Final = 20.0  # it takes 0.2 s; beyond this something is wrong


@functools.lru_cache(maxsize=1)
def compiled_transform() -> Transform | None:
    """`to_float32` in machine code, or None where there is no compiler or it makes other numbers.

    The first call on a machine runs ``cc`` for some 0.2 s and keeps the result in the user's cache
    folder (``$XDG_CACHE_HOME/dptorch``, by default ``~/.cache/dptorch``).
    """
    if os.environ.get(SWITCH) == "0" or sys.byteorder != "little":
        return None
    try:
        transform = _bind(_library())
    except (OSError, subprocess.SubprocessError, AttributeError):
        return None
    return transform if _same_bits(transform) else None


def _library() -> ctypes.CDLL:
    """Load the library, compiled if it is not in the cache."""
    source = SOURCE.read_bytes()
    options = [*_OPTIONS, *(f"-D{name}={value}" for name, value in _constants().items())]
    made_of = repr((source, options, sys.platform, platform.machine()))
    name = f"normal-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    cache = _private_folder()
    if cache is not None and (cache / name).exists():
        with contextlib.suppress(OSError):  # cut short, say: then make it anew
            return ctypes.CDLL(str(cache / name))
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise FileNotFoundError("no C compiler")
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        (Path(folder) / "normal.c").write_bytes(source)
        made = Path(folder) / name
        subprocess.run(
            [compiler, *options, "normal.c", "-o", name, "-lm"],
            cwd=folder,
            check=True,
            capture_output=True,
            timeout=_PATIENCE_S,
        )
        library = ctypes.CDLL(str(made))
        if cache is not None:
            os.replace(made, cache / name)
        return library


def _constants() -> dict[str, str]:
    """The numbers of the transform, written exactly."""
    named = {
        **{f"SINE_{i}": c for i, c in enumerate(SINE)},
        **{f"LOG_{i}": c for i, c in enumerate(LOG, 1)},
        "MINUS_TWICE_LOG_2": MINUS_TWICE_LOG_2,
    }
    exact = {name: f"({float(value).hex()}f)" for name, value in named.items()}
    return {**exact, "ROOT_HALF_BITS": hex(ROOT_HALF_BITS)}


def _private_folder() -> Path | None:
    """The cache folder, if nobody else can put code there."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(root) / "dptorch"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.stat()
    except OSError:
        return None
    return folder if about.st_uid == os.getuid() and not about.st_mode & 0o022 else None


def _bind(library: ctypes.CDLL) -> Transform:
    function = library.normals
    function.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64]
    function.restype = None

    def transform(bits: NDArray[np.int32], normals: NDArray[np.float32]) -> None:
        function(*(row.ctypes.data for row in (*bits, *normals)), bits.shape[1])

    return transform


def _same_bits(transform: Transform) -> bool:
    """Whether it makes the numbers of `to_float32`, on bits that reach all of its branches."""
    bits = np.random.default_rng(0).integers(-(2**31), 2**31, (3, 2**14), np.int32)
    # Numbers of all magnitudes, of both signs, and the edges.
    bits[:, : 2**13] >>= np.arange(2**13, dtype=np.int32) % 32
    bits[:2, 2**12 : 2**13] ^= bits[0, 2**12 : 2**13] >> 31
    bits[:, :4] = (0, -1, 2**31 - 1, -(2**31))
    expected, found = np.empty((2, 2**14), np.float32), np.empty((2, 2**14), np.float32)
    to_float32(bits, expected)
    transform(bits, found)
    return bool((expected.view(np.int32) == found.view(np.int32)).all())
