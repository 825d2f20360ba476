"""Count the 16-byte blocks of noise keystreams that occur more than once.

    python -m tests.noise.repeated_blocks 1e9

A block feeds the noise of less than three coordinates, so that no repeated block means no repeated
noise. By argument there is none: within a stream the cipher permutes its counters, and each step has a
key of its own; this looks. Blocks are told apart by their first 8 bytes: among the 4 * 10**8 blocks of
10**9 values, two different ones agree in these by accident once in 230 runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from dptorch.noise.gaussian import PURPOSE
from dptorch.noise.keystream import CIPHER_BLOCK, Keystream
from dptorch.randomness import RootKey

BYTES_PER_VALUE = 6
STEPS = 10
_READ = 3 * 2**20
Key = Callable[[int], bytes]


def step_key(step: int) -> bytes:
    """The key of a step's noise, as `GaussianNoise` derives it."""
    return RootKey.from_seed(77).derive(PURPOSE, step, 0)


def prefixes(values: int, key: Key) -> Iterator[NDArray[np.uint64]]:
    """The first 8 bytes of every block behind `values` numbers, over STEPS steps."""
    per_step = values * BYTES_PER_VALUE // STEPS // CIPHER_BLOCK * CIPHER_BLOCK
    raw = np.empty(_READ, np.uint8)
    for step in range(STEPS):
        stream = Keystream(key(step))
        for at in range(0, per_step, _READ):
            stream.read(at, raw)
            yield raw.view("<u8")[: min(_READ, per_step - at) // 8 : 2]


def repeated_blocks(values: int, key: Key = step_key) -> int:
    """How many blocks occur that occurred before."""
    parts = max(1, values * BYTES_PER_VALUE // CIPHER_BLOCK // 2**26)  # 512 MiB at a time
    found = 0
    for part in range(parts):
        chosen = [
            p[p % np.uint64(parts) == part] if parts > 1 else p.copy()
            for p in prefixes(values, key)
        ]
        seen = np.concatenate(chosen)
        seen.sort()
        found += int((seen[1:] == seen[:-1]).sum())
    return found


if __name__ == "__main__":
    wanted = int(float(sys.argv[1]))
    print(f"{repeated_blocks(wanted)} repeated blocks in {wanted:,} values over {STEPS} steps")
