"""The discrete Gaussian mechanism: integer noise on an integer sum, both exact.

A floating-point Gaussian has gaps that depend on what it was added to (Mironov 2012); integers have
none. The sampler is exact: its law is N_Z(0, s^2) itself and no approximation, given uniform bits.

Canonne, Kamath & Steinke 2020, *The Discrete Gaussian for Differential Privacy*, arXiv:2004.00010;
on clipped, rounded vectors: Kairouz, Liu & Steinke 2021, arXiv:2102.06387.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dptorch.clipping.sums import ClippedSum, RoundedSum
from dptorch.errors import ConfigurationError, PrivacyError
from dptorch.noise.gaussian import GaussianNoise, check_divisor, divided
from dptorch.noise.keystream import CIPHER_BLOCK, Keystream
from dptorch.noise.noisy_gradient import NoisyGradient
from dptorch.noise.spans import Offsets, pieces_by_block, place_spans
from dptorch.randomness import RootKey

__all__ = ["DISCRETE_BLOCK", "DiscreteGaussianNoise", "DiscreteNormals"]

PURPOSE: Final = "discrete noise"
DISCRETE_BLOCK: Final = 2**14

_EXTENSION: Final = 2**68  # a region of the keystream that candidates never reach
# Relative error that float64 may have made in a probability; it makes some ten thousand times less.
_DOUBT: Final = 2.0**-36
_LARGEST_SCALE: Final = 2**44


class DiscreteNormals:
    """Draws of N_Z(0, scale**2) at fixed places of an endless sequence, from keystreams.

    A candidate from the two-sided geometric law of scale t is accepted with probability
    ``exp(-(|y| - scale**2 / t)**2 / (2 scale**2))`` (Canonne, Kamath & Steinke 2020, algorithm 3; any t
    is right, a power of two near the scale makes few rejections and an exact uniform number below
    t). Each decision "a uniform number is below exp(-x)" is made in float64 where that is certain,
    and with as many more bits and digits as it takes where it is not, some once in 10**10.

    Args:
        key_of: block index -> the 32-byte key of the block's own keystream.
        scale: s > 0; a float stands for exactly the number it is.

    Example:
        >>> block = DiscreteNormals(lambda index: bytes([index]) * 32, 3.0).block(0)
        >>> block.dtype.name, block.shape, bool(abs(block.std() - 3.0) < 0.1)
        ('int64', (16384,), True)
    """

    def __init__(self, key_of: Callable[[int], bytes], scale: float | Fraction) -> None:
        exact = Fraction(scale)
        if not 0 < exact <= _LARGEST_SCALE:
            raise ConfigurationError(f"scale={scale!r} must be above 0 and at most 2**44.")
        self._key_of = key_of
        self._log_t = max(0, round(math.log2(float(exact))))
        self._variance = exact**2
        self._centre = self._variance / 2**self._log_t
        # Thresholds rounded down: a word that equals one is decided with more digits, in `_geometric`.
        with decimal.localcontext(decimal.Context(prec=60)):
            tops = [int((-decimal.Decimal(v)).exp() * 2**64) for v in range(1, 45)]
        self._tops = np.array(tops[::-1], np.uint64)  # floor(2**64 exp(-v)), ascending

    def block(self, index: int) -> NDArray[np.int64]:
        """Return the numbers [index, index + 1) * DISCRETE_BLOCK of the sequence."""
        words = _Words(self._key_of(index))
        kept: list[NDArray[np.int64]] = []
        missing = DISCRETE_BLOCK
        while missing > 0:
            found = self._candidates(words, int(2.4 * missing) + 64)
            kept.append(found[:missing])
            missing -= len(found)
        return np.concatenate(kept)

    def _candidates(self, words: _Words, count: int) -> NDArray[np.int64]:
        """Those of `count` candidates that are accepted, in order."""
        first, decide, height, last = words.take(count)
        k = self._log_t
        low = (first >> np.uint64(64 - k)).astype(np.int64) if k else np.zeros(count, np.int64)
        # |y| = low + t * geometric: the geometric law of scale t (their algorithm 2).
        x: NDArray[np.float64] = low.astype(np.float64) * 2.0**-k
        chosen = self._below(decide, x, lambda i: Fraction(int(low[i]), 2**k), words).nonzero()[0]
        low, first, last = low[chosen], first[chosen], last[chosen]
        size = low + (self._geometric(height[chosen], words) << k)
        negative = (first & np.uint64(1)).astype(bool)
        distance = size - float(self._centre)
        x = distance * distance / (2.0 * float(self._variance))

        def exact(i: int) -> Fraction:
            return (int(size[i]) - self._centre) ** 2 / (2 * self._variance)

        # Zero has one sign: with two it would be drawn twice as often as the law says.
        accepted = self._below(last, x, exact, words) & ~(negative & (size == 0))
        return np.where(negative, -size, size)[accepted]

    def _geometric(self, word: NDArray[np.uint64], words: _Words) -> NDArray[np.int64]:
        """The number of v >= 1 for which the uniform number of `word` is below exp(-v)."""
        at = np.searchsorted(self._tops, word, side="right")
        found = (len(self._tops) - at).astype(np.int64)
        # A word that equals a rounded threshold, or is 0, says too little.
        unclear = (word == 0) | ((at > 0) & (self._tops[np.maximum(at, 1) - 1] == word))
        for i in unclear.nonzero()[0]:
            number, v = _Uniform(int(word[i]), words.more), 0
            while number.below_exp(Fraction(v + 1)):
                v += 1
            found[i] = v
        return found

    def _below(
        self,
        word: NDArray[np.uint64],
        x: NDArray[np.float64],
        exact: Callable[[int], Fraction],
        words: _Words,
    ) -> NDArray[np.bool_]:
        """Whether the uniform numbers of `word` are below exp(-x); `exact` gives x where asked."""
        # Where exp is 0 in float64, a word of 0 still asks.
        top = np.maximum(np.exp(-x), 1e-300) * 2.0**64
        number = word.astype(np.float64)
        sure = number * (1 + _DOUBT) + 1.0 <= top * (1 - _DOUBT)
        unclear = ~sure & (number * (1 - _DOUBT) < top * (1 + _DOUBT))
        for i in unclear.nonzero()[0]:
            sure[i] = _Uniform(int(word[i]), words.more).below_exp(exact(int(i)))
        return sure


class _Words:
    """The 64-bit words of one keystream, in order; and, apart from them, more bits when asked."""

    def __init__(self, key: bytes) -> None:
        self._stream, self._extension = Keystream(key), Keystream(key)
        self._at, self._more_at = 0, _EXTENSION

    def take(self, count: int) -> NDArray[np.uint64]:
        """Return the next words, as uint64 [4, count]."""
        raw = np.empty(32 * count, np.uint8)
        self._stream.read(self._at, raw)
        self._at += raw.size
        words: NDArray[np.uint64] = raw.view("<u8").reshape(4, count)
        return words

    def more(self) -> int:
        """Return 64 bits that nothing else uses."""
        raw = np.empty(CIPHER_BLOCK, np.uint8)
        self._extension.read(self._more_at, raw)
        self._more_at += CIPHER_BLOCK
        return int.from_bytes(raw[:8].tobytes(), "little")


class _Uniform:
    """A uniform number in [0, 1), of which as many bits are drawn as questions about it need."""

    def __init__(self, word: int, more: Callable[[], int]) -> None:
        self._number, self._bits, self._more = word, 64, more

    def below_exp(self, x: Fraction) -> bool:
        """Return whether the number is below exp(-x), x >= 0. The answer is exact."""
        while x > 0:
            digits = 30 + self._bits // 3
            wide = decimal.Context(digits, Emin=-decimal.MAX_EMAX, Emax=decimal.MAX_EMAX)
            with decimal.localcontext(wide):
                p = (-(decimal.Decimal(x.numerator) / x.denominator)).exp()
                # Division and exp round in the last digit; x multiplies the error of the former.
                doubt = p * decimal.Decimal(10) ** (4 - digits) * (1 + math.ceil(x))
                low, high = int((p - doubt) * 2**self._bits), int((p + doubt) * 2**self._bits) + 1
            if self._number < low:
                return True
            if self._number >= high:
                return False
            self._number = self._number << 64 | self._more()
            self._bits += 64
        return True


class DiscreteGaussianNoise:
    """Adds to each coordinate of a rounded sum an independent draw of the discrete Gaussian.

    Its scale is ``noise_multiplier * RoundedSum.UNITS``, exactly. The numbers are made on the CPU from
    keystreams, wherever the sum is.

    Guarantees:
        - Sum and noise are integers, and their sum is exact: no rounding depends on the data after
          that of each contribution, which `RoundedSum` bounds.
        - The noise is a function of (key, step, context, position, noise_multiplier * scale), as that
          of `GaussianNoise`.
        Held by `test_sum_and_noise_are_added_exactly` and
        `test_noise_has_the_stated_size_and_place`.

    Raises:
        ConfigurationError: `noise_multiplier` is out of range.

    Example:
        >>> sums = RoundedSum({"w": torch.zeros(1000, dtype=torch.int64)}, max_norm=0.5)
        >>> noisy = DiscreteGaussianNoise(2.0).privatize(sums, RootKey.from_seed(0), step=0)
        >>> noisy.stddev, noisy.values["w"].dtype
        ({'w': 1.0}, torch.float32)
    """

    def __init__(self, noise_multiplier: float, *, secure_rng: bool = True) -> None:
        self.noise_multiplier = GaussianNoise(noise_multiplier).noise_multiplier
        self.scale = Fraction(self.noise_multiplier) * RoundedSum.UNITS
        if self.scale > _LARGEST_SCALE:
            raise ConfigurationError(
                f"noise_multiplier={noise_multiplier!r} is too large. Integer noise has at most 2**20."
            )

    def privatize(
        self,
        clipped: ClippedSum,
        key: RootKey,
        step: int,
        *,
        context: int = 0,
        offsets: Offsets | None = None,
        divisor: float = 1.0,
    ) -> NoisyGradient:
        """Add the noise of `step`, and divide; see `GaussianNoise.privatize`.

        Raises:
            TypeError: `clipped` is not a `RoundedSum`.
        """
        check_divisor(divisor)
        if not isinstance(clipped, RoundedSum):
            raise TypeError(
                f"discrete noise is added to a RoundedSum, not to a {type(clipped).__name__}: round "
                "each contribution first (dptorch.clipping.rounding)."
            )
        for name, value in clipped.values.items():
            if value.dtype != torch.int64:
                raise PrivacyError(f"the rounded sum of {name!r} is {value.dtype}, not int64.")
        stddev = {n: self.noise_multiplier * clipped.scale(n) for n in clipped.values}
        if self.noise_multiplier:
            self._add(clipped.values, key, (step, context), offsets)
        released = {
            n: (v.double() * (clipped.scale(n) / RoundedSum.UNITS) / divisor).float()
            for n, v in clipped.values.items()
        }
        return divided(clipped, released, stddev, divisor)

    def _add(
        self,
        values: Mapping[str, Tensor],
        key: RootKey,
        place: tuple[int, int],
        offsets: Offsets | None,
    ) -> None:
        normals = DiscreteNormals(lambda index: key.derive(PURPOSE, *place, index), self.scale)
        spans = place_spans(values, dict.fromkeys(values, 1.0), offsets)
        blocks = list(pieces_by_block(spans, DISCRETE_BLOCK))
        with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
            for found, (_, pieces) in zip(
                pool.map(normals.block, [index for index, _ in blocks]), blocks, strict=True
            ):
                for piece in pieces:
                    noise = torch.from_numpy(found[piece.in_block : piece.in_block + piece.size])
                    part = piece.span.flat[piece.in_span : piece.in_span + piece.size]
                    part.add_(noise.to(part.device))
        for span in spans:
            span.write_back()

    def __repr__(self) -> str:
        return f"DiscreteGaussianNoise(noise_multiplier={self.noise_multiplier})"
