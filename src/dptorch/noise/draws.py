"""Noise for answers, one after the other from one keystream: normal, Laplace and Gumbel numbers.

Training places its noise by coordinate and step, so that a resumed run repeats it. Answers are given
once, in the order in which they are asked for, and never again: here each number of the stream is used
once, by whichever thread comes next.
"""

from __future__ import annotations

import math
import os
import threading
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dptorch.errors import PrivacyError
from dptorch.noise.keystream import CIPHER_BLOCK, Keystream
from dptorch.noise.normal import KEYSTREAM_BLOCK, KeystreamNormals
from dptorch.randomness import RootKey

__all__ = ["Draws"]

PURPOSE: Final = "prediction"
_NORMALS, _WORDS = 0, 1  # streams of their own
_BUFFER: Final = 4096  # words read at once; a multiple of two, for whole cipher blocks


class Draws:
    """Numbers of a key's streams for predictions; no number is given out twice.

    Args:
        key: root key, used by one predictor. Two predictors with one key would draw the same noise.

    Guarantees:
        No two calls, of any threads, share a number of the stream
        (`test_threads_never_share_a_number`), nor do two processes
        (`test_a_fork_draws_no_number_of_its_parent`).

    Not claimed: as for training, that the floating-point numbers are continuous (Mironov 2012).

    Example:
        >>> draws = Draws(RootKey.from_seed(0))
        >>> draws.normal((2, 3)).shape, bool((draws.normal((3,)) != draws.normal((3,))).all())
        ((2, 3), True)
    """

    def __init__(self, key: RootKey) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._normals = KeystreamNormals(key.derive(PURPOSE, _NORMALS), np.dtype(np.float64))
        self._words = Keystream(key.derive(PURPOSE, _WORDS))
        self._blocks = self._reads = 0
        self._left: NDArray[Any] = np.empty(0)
        self._left_words: NDArray[Any] = np.empty(0, np.uint64)

    def normal(self, shape: tuple[int, ...]) -> NDArray[np.float64]:
        """Standard normal numbers."""
        self._refuse_fork()
        size, parts = math.prod(shape), list[NDArray[Any]]()
        with self._lock:
            while size:
                if not self._left.size:
                    self._left = self._normals.block(self._blocks).copy()
                    assert self._left.size == KEYSTREAM_BLOCK
                    self._blocks += 1
                parts.append(self._left[:size])
                self._left = self._left[size:]
                size -= parts[-1].size
        return np.concatenate([np.empty(0), *parts]).reshape(shape)

    def exponential(self, shape: tuple[int, ...]) -> NDArray[np.float64]:
        """Exponential numbers of mean 1, to the relative precision of float64 near 0 too."""
        words = self._uniform_words(math.prod(shape))
        return _exponential(words).reshape(shape)

    def laplace(self, shape: tuple[int, ...]) -> NDArray[np.float64]:
        """Laplace numbers of scale 1: the difference of two exponential ones."""
        both = self.exponential((2, *shape))
        return both[0] - both[1]

    def gumbel(self, shape: tuple[int, ...]) -> NDArray[np.float64]:
        """Gumbel numbers of scale 1: the largest of scores with them is drawn by softmax."""
        return -np.log(self.exponential(shape))

    def _refuse_fork(self) -> None:
        """The keys of the streams are here already, so that the root key is not asked any more."""
        if os.getpid() != self._process:
            raise PrivacyError(
                f"this predictor was made in process {self._process} and is used in its fork "
                f"{os.getpid()}: both would draw the same noise, and each would spend the budget. Make "
                "the predictor after forking, in each process, with one ledger and one name for all."
            )

    def _uniform_words(self, size: int) -> NDArray[np.uint64]:
        self._refuse_fork()
        parts = list[NDArray[Any]]()
        with self._lock:
            while size:
                if not self._left_words.size:
                    raw = np.empty(8 * _BUFFER, np.uint8)
                    assert raw.size % CIPHER_BLOCK == 0
                    self._words.read(self._reads * raw.size, raw)
                    self._reads += 1
                    self._left_words = raw.view("<u8")
                parts.append(self._left_words[:size])
                self._left_words = self._left_words[size:]
                size -= parts[-1].size
        return np.concatenate([np.empty(0, np.uint64), *parts])


def _exponential(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """-log u of u = (word + 1/2) / 2^64, where both u and 1 - u keep their digits."""
    half = np.uint64(2**63)
    low = words < half
    # The distance from the nearer end of (0, 1): never 0.
    nearer = (np.where(low, words, ~words).astype(np.float64) + 0.5) * 2.0**-64
    return np.where(low, -np.log(nearer), -np.log1p(-nearer))
