"""NH, a hash that is fast because it is mostly one multiplication for each two words.

Black, Halevi, Krawczyk, Krovetz & Rogaway 1999, *UMAC: Fast and Secure Message Authentication*,
section 4: NH with two Toeplitz passes.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["CHUNK", "KEY_WORDS", "nh"]

CHUNK: Final = 2**14
"""Words of 32 bits that are hashed into two numbers of 64."""

KEY_WORDS: Final = CHUNK + 2
"""Words of the key; the second pass uses it from the third word on."""


def nh(words: NDArray[np.uint32], key: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """Two sums ``(w[2i] + k[2i]) (w[2i+1] + k[2i+1])`` for each chunk of words, [chunks, 2].

    Words and keys are added modulo 2^32, products modulo 2^64. A last chunk that is short counts as
    if zeros followed; the caller must hash the number of words.

    Args:
        words: uint32 [n].
        key: uint32 [KEY_WORDS], random.

    Guarantees:
        Under a random key, different words of one length have equal sums with probability at most
        2^-64 (theorem 2 there, w = 32, two passes). `hash.c` does the same.
        Held by `test_hash_by_the_definition` and `test_compiled_hash_is_numpys`.

    Example:
        >>> nh(np.arange(4, dtype=np.uint32), np.zeros(KEY_WORDS, np.uint32))
        array([[6, 6]], dtype=uint64)
    """
    sums = np.zeros((-(-len(words) // CHUNK), 2), np.uint64)
    for i, row in enumerate(sums):
        part = words[i * CHUNK : (i + 1) * CHUNK]
        # The caller hashes the number of words, which tells this zero from one of theirs.
        if len(part) % 2:
            part = np.append(part, np.uint32(0))
        # Two passes under keys two words apart square the chance of a collision for two words of key
        # (Toeplitz). Additions and products wrap as the theorem's do.
        for j in range(2):
            keyed = (part + key[2 * j : 2 * j + len(part)]).astype(np.uint64)
            row[j] = np.sum(keyed[0::2] * keyed[1::2], dtype=np.uint64)
    return sums
