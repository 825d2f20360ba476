"""The instruction sets that compiled loops choose by: the processor's, or fewer on request."""

from __future__ import annotations

import ctypes
import os
from enum import IntFlag
from pathlib import Path
from typing import Final

from dptorch.errors import one_of

__all__ = ["HEADER", "LIMIT", "Units", "units"]

LIMIT: Final = "DPTORCH_CPU"
"""Environment variable: the instruction sets that may be used, with commas between ("aes,avx2"), to
measure them. Without it all are. The results are the same."""

HEADER: Final = Path(__file__).with_name("units.h")


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
