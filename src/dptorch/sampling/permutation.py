"""A keyed permutation of range(n), evaluated at the positions asked for only."""

from __future__ import annotations

import hashlib
import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["KeyedPermutation"]

_EXACT_UP_TO: Final = 1 << 16
_ROUNDS: Final = 32
_MOST: Final = 1 << 40

Indices = NDArray[np.int64]


class KeyedPermutation:
    """A permutation of [0, size) that a secret key chooses; [n] positions to [n] values.

    Up to 2**16 elements the permutation is uniform: the order of `size` 64-bit words of SHAKE-256
    under the key. Beyond that no vector of the size of the population is formed. An element is then
    written as a pair (l, r) in Z_a x Z_b with a, b close to the square root of `size`, and passed
    through a Feistel network of 32 rounds, l += F(r) and r += G(l) in turn, whose round functions are
    tables of keyed random numbers; a result outside [0, size) is passed through again (cycle walking:
    Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). Work and memory: O(n) for n
    positions, and O(sqrt(size)) to set up.

    Args:
        size: number of elements, in [1, 2**40].
        key: secret bytes; equal keys give equal permutations.

    Guarantees:
        - A bijection, whatever the key.
        - Up to 2**16 elements: uniform over all permutations, if SHAKE-256 is a random function of
          its key, but for the chance of two equal words (below 2**-32).
        - Beyond: pseudo-random. No attack on as many rounds is known, but nobody has proved that all
          outputs together look uniform; this is the standing of every cipher on a small domain.
        Held by `test_it_is_a_bijection`, `test_every_order_is_equally_likely` and
        `test_pairs_of_a_larger_network_are_uniform`.

    Example:
        >>> order = KeyedPermutation(10**9, b"a key")
        >>> order(np.arange(3)).shape
        (3,)
        >>> sorted(KeyedPermutation(5, b"a key")(np.arange(5)).tolist())
        [0, 1, 2, 3, 4]
    """

    def __init__(self, size: int, key: bytes, *, exact_up_to: int = _EXACT_UP_TO) -> None:
        if not 1 <= size <= _MOST:
            raise ValueError(f"size={size!r} must be in [1, 2**40]")
        self._size = size
        self._order: Indices | None = None
        if size <= exact_up_to:
            self._order = np.argsort(_words(key, size), kind="stable")
            return
        self._a = math.isqrt(size - 1) + 1
        self._b = -(-size // self._a)
        half = _ROUNDS // 2
        words = _words(key, half * (self._a + self._b))
        left, right = np.split(words, [half * self._b])
        # The bias of the remainder is below a / 2**64.
        self._left = (left % np.uint64(self._a)).astype(np.int64).reshape(half, self._b)
        self._right = (right % np.uint64(self._b)).astype(np.int64).reshape(half, self._a)

    def __call__(self, positions: Indices) -> Indices:
        """int64 values at int64 `positions` in [0, size)."""
        if self._order is not None:
            return self._order[positions]
        values = self._pass(positions)
        outside = np.flatnonzero(values >= self._size)
        while len(outside):
            values[outside] = self._pass(values[outside])
            outside = outside[values[outside] >= self._size]
        return values

    def _pass(self, values: Indices) -> Indices:
        a, b = self._a, self._b
        r, left = np.divmod(values, a)
        for to_left, to_right in zip(self._left, self._right, strict=True):
            left = left + to_left[r]
            left -= a * (left >= a)
            r = r + to_right[left]
            r -= b * (r >= b)
        result: Indices = left + a * r
        return result


def _words(key: bytes, count: int) -> NDArray[np.uint64]:
    """`count` 64-bit words, a pseudo-random function of the key."""
    return np.frombuffer(hashlib.shake_256(key).digest(8 * count), dtype="<u8")
