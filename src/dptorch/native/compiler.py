"""Compiling C sources into a library that is kept for the next process, and what it may use.

A C compiler is not part of dptorch: its absence changes the speed and nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from enum import IntFlag
from pathlib import Path
from typing import Final, TypeVar

from dptorch.errors import one_of

__all__ = ["HEADER", "LIMIT", "SWITCH", "Units", "build", "units"]

SWITCH: Final = "DPTORCH_COMPILE"
"""Environment variable; "0" keeps dptorch from running a C compiler."""

LIMIT: Final = "DPTORCH_CPU"
"""Environment variable: the instruction sets that may be used, with commas between ("aes,avx2"), to
measure them. Without it all are. The results are the same."""

HEADER: Final = Path(__file__).with_name("units.h")

_OPTIONS: Final = ("-std=c11", "-O3", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
_PATIENCE_S: Final = 300.0  # it takes 2 s of a processor, of which a busy machine may give little


def build(
    name: str, sources: Sequence[Path], constants: Mapping[str, str], *options: str
) -> ctypes.CDLL | None:
    """The library of `sources`, or None where it cannot be made.

    The first call on a machine runs ``cc``, for a second or so, and keeps the result in the
    user's cache folder (``$XDG_CACHE_HOME/dptorch``, by default ``~/.cache/dptorch``), if nobody else
    can write there.

    Args:
        name: what its file is called; sources, constants and options are told apart by their hash.
        sources: C files, and headers that they include.
        constants: macros.
        options: of the compiler, beside the usual ones.
    """
    if os.environ.get(SWITCH) == "0" or sys.byteorder != "little" or os.name != "posix":
        return None
    try:
        texts = {path.name: path.read_bytes() for path in sources}
        macros = [f"-D{macro}={value}" for macro, value in constants.items()]
        return _library(name, texts, [*_OPTIONS, *options, *macros])
    except (OSError, subprocess.SubprocessError):
        return None


def _library(name: str, sources: Mapping[str, bytes], options: Sequence[str]) -> ctypes.CDLL:
    made_of = repr((dict(sources), list(options), sys.platform, platform.machine()))
    file = f"{name}-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    cache = _private_folder()
    if cache is not None and (cache / file).exists() and _only_ours(cache / file):
        with contextlib.suppress(OSError):  # cut short, say: then make it anew
            return ctypes.CDLL(str(cache / file))
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise FileNotFoundError("no C compiler")
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        for source, text in sources.items():
            (Path(folder) / source).write_bytes(text)
        made = Path(folder) / file
        # As one, so that the compiler's own long headers are read once: half the time.
        together = "".join(f'#include "{source}"\n' for source in sources if source.endswith(".c"))
        (Path(folder) / "together.c").write_text(together)
        subprocess.run(
            [compiler, *options, "together.c", "-o", file, "-lm"],
            cwd=folder,
            check=True,
            capture_output=True,
            timeout=_PATIENCE_S,
        )
        library = ctypes.CDLL(str(made))
        if cache is not None:
            made.chmod(0o700)  # whatever the umask is
            os.replace(made, cache / file)
        return library


def _private_folder() -> Path | None:
    """The cache folder, if nobody else can put code there."""
    try:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(root) / "dptorch"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder if _only_ours(folder) else None
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        return None


def _only_ours(path: Path) -> bool:
    """Whether nobody else may write to it."""
    about = path.stat()
    return about.st_uid == os.getuid() and not about.st_mode & 0o022


class Units(IntFlag):
    """Instruction sets; the numbers are those of units.h."""

    AES = 1
    AVX2 = 2
    AVX512 = 4
    VAES = 8


def units(library: ctypes.CDLL) -> Units:
    """The instruction sets that a library may use, which says by `units_found` what the processor has.

    Raises:
        ConfigurationError: `DPTORCH_CPU` names none of them.
    """
    found = Units(library.units_found())
    limit = os.environ.get(LIMIT)
    if limit is None:
        return found
    allowed = Units(0)
    for name in filter(None, (part.strip().lower() for part in limit.split(","))):
        allowed |= Units[one_of(LIMIT, name, [n.lower() for n in Units.__members__]).upper()]
    return found & allowed


_L = TypeVar("_L")


def checked_library(
    source: Path, make: Callable[[ctypes.CDLL, Units], _L], agrees: Callable[[_L], bool]
) -> _L | None:
    """What `make` makes of a compiled source that needs AVX2; None where there is no compiler, the
    processor lacks AVX2, or it errs.

    Args:
        source: a C file beside the header; the library has its name.
        make: from the library and the instruction sets that it may use.
        agrees: compares it with torch. What a compiler got wrong would clip too little and raise
            nothing, so that is done here, on the machine that uses it.
    """
    found = build(source.stem, [HEADER, source], {})
    if found is None or Units.AVX2 not in units(found):
        return None
    library = make(found, units(found))
    return library if agrees(library) else None
