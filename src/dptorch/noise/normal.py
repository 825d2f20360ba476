"""Standard normal numbers at fixed places of an endless sequence, from a keystream or a device.

Both sources cut the sequence into blocks of fixed length and always make a block whole, so number i
depends on the key and on i alone: not on how parameters, chunks or threads divide the work.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dptorch.noise.keystream import Keystream

__all__ = [
    "DEVICE_BLOCK",
    "KEYSTREAM_BLOCK",
    "DeviceNormals",
    "KeystreamNormals",
    "Transform",
    "to_float32",
]

KEYSTREAM_BLOCK: Final = 2**16
"""Normals of one keystream block; its buffers stay in the processor's second-level cache."""

DEVICE_BLOCK: Final = 2**22
"""Normals of one device block: one kernel launch, 16 MiB in float32."""

_PAIRS: Final = KEYSTREAM_BLOCK // 2
_BLOCK_BYTES: Final = 12 * _PAIRS

Transform = Callable[[NDArray[np.int32], NDArray[np.float32]], None]
"""Makes of the 96 random bits of each pair (int32 [3, pairs]) its two normals (float32 [2, pairs])."""

# sin(pi y / 2) / y in powers of y**2 on [0, 1]: minimax, relative error 5e-9.
SINE: Final = tuple(
    np.float32(c)
    for c in (
        1.5707963184477058,
        -0.6459637105999346,
        0.07968967894781238,
        -0.004673766612047606,
        0.00015148513045077584,
    )
)
# 2 log(1 + f) = q (4 + c1 q**2 + c2 q**4 + c3 q**6), q = f / (2 + f), for 1 + f in [sqrt(1/2),
# sqrt(2)]: minimax, relative error 8e-10.
LOG: Final = tuple(
    np.float32(c) for c in (1.3333355343425022, 0.799549911424176, 0.5974614694474802)
)
MINUS_TWICE_LOG_2: Final = np.float32(-2.0 * math.log(2.0))
ROOT_HALF_BITS: Final = 0x3F3504F3  # of sqrt(1/2) in float32


class KeystreamNormals:
    """Normals by the Box-Muller transform of a cryptographic keystream, on the CPU.

    A pair of normals takes 96 bits, as three numbers of 32: x (high and low half) for the radius
    ``sqrt(-2 log u)`` with ``u = x / 2**64``, and the turn. x is taken as a signed number, negative
    ones standing for u near 1, so that both u near 0, which makes the tail, and 1 - u near 0, which
    makes the small radii, are known to the relative precision of the type: a float32 u alone would
    round one radius in 2**25 to zero. (Of x the lowest bit is not used.) The turn gives the two
    signs and an angle in (0, pi / 2).

    Args:
        key: 32 bytes, used for this sequence only.
        dtype: float32 or float64; both give the same numbers up to rounding.
        transform: for float32, another executor of the same arithmetic than `to_float32`.

    Guarantees:
        - Tails: values reach 9.4 standard deviations, and up to there the tail is the normal one.
        - No number is exactly 0, so that every coordinate carries noise.
        - float32 numbers are the same bits on every machine and in every version of numpy: the
          transform consists of operations that IEEE 754 rounds correctly, and of nothing else.
        Held by `test_the_tail_reaches_eight_sigma`, `test_no_bits_give_zero_or_a_non_number` and
        `test_compiled_bits_are_numpy_bits`.

    Not claimed: floating-point outputs are a discrete set, whose low-order bits tell something
    about the value that noise was added to (Mironov 2012). A keystream does not change that.

    Example:
        >>> block = KeystreamNormals(bytes(32), np.dtype(np.float32)).block(3)
        >>> block.shape, block.dtype.name, bool(abs(block.std() - 1.0) < 0.02)
        ((65536,), 'float32', True)
    """

    def __init__(
        self, key: bytes, dtype: np.dtype[Any], transform: Transform | None = None
    ) -> None:
        self._stream = Keystream(key)
        self._raw = np.empty(_BLOCK_BYTES, np.uint8)
        self._bits = self._raw.view("<i4").reshape(3, _PAIRS)
        self._normals = np.empty((2, _PAIRS), dtype)
        self._transform = (transform or to_float32) if dtype == np.float32 else to_float64

    def block(self, index: int) -> NDArray[Any]:
        """Return the numbers [index, index + 1) * KEYSTREAM_BLOCK of the sequence.

        Returns:
            an array that the caller may change and the next call overwrites.
        """
        self._stream.read(index * _BLOCK_BYTES, self._raw)
        self._transform(self._bits, self._normals)
        return self._normals.reshape(-1)


def to_float32(bits: NDArray[np.int32], normals: NDArray[np.float32]) -> None:
    """The transform in numpy. `normal.c` does the same operations in the same order.

    numpy, because its loops release the interpreter lock and start no threads of their own, so that
    blocks can be made in several threads at once.

    Args:
        bits: int32 [3, pairs]: high and low half of x, turn.
        normals: float32 [2, pairs]; filled.
    """
    high, low, turn = bits
    one, minus_zero = np.float32(1.0), np.int32(-(2**31))
    # Only operations that IEEE 754 rounds correctly: a C library's log and sine differ in the last bit.
    # -1 for negative x and 0 otherwise, so that x ^ sign is never negative.
    sign = high >> 31
    v = (high ^ sign).astype(np.float32)  # -1 - x for negative x: 1 - u in place of u
    v *= np.float32(2.0**-32)
    # An int32 holds 31 bits of it: as a signed number the whole word could be negative.
    fine = ((low ^ sign).view(np.uint32) >> 1).view(np.int32).astype(np.float32)
    fine *= np.float32(2.0**-63)
    fine += np.float32(2.0**-64)  # off zero
    v += fine
    # Choices by masks of bits: numpy's own `where` takes as long as a dozen of these.
    signed = np.bitwise_xor(v.view(np.int32), sign & minus_zero, out=fine.view(np.int32))
    u = signed.view(np.float32)
    u -= sign.astype(np.float32)
    # Counted from sqrt(1/2), so that |f| stays below 0.42 and one short series serves.
    exponent = u.view(np.int32)  # u = (1 + f) 2**exponent
    exponent -= ROOT_HALF_BITS
    mantissa = exponent & 0x7FFFFF
    mantissa += ROOT_HALF_BITS
    exponent >>= 23
    f = mantissa.view(np.float32)
    f -= one
    # Where the exponent is 0, f = u - 1 = -v, which is exact though u was rounded.
    minus_v = v.view(np.int32)
    minus_v |= minus_zero
    rounded = np.right_shift(exponent, 31, out=sign)
    mantissa &= rounded
    minus_v &= np.invert(rounded, out=rounded)
    mantissa |= minus_v
    # log(1 + f) = 2 artanh(f / (2 + f)): an odd series, of half as many terms as one in f.
    q = np.add(f, np.float32(2.0), out=v)
    np.divide(f, q, out=q)
    z = np.multiply(q, q, out=f)
    series = z * LOG[2]
    for c in (LOG[1], LOG[0], np.float32(4.0)):
        series += c
        series *= z if c != 4.0 else q
    radius = exponent.astype(np.float32)
    radius *= MINUS_TWICE_LOG_2
    radius -= series
    np.sqrt(radius, out=radius)
    x = np.bitwise_and(turn, 0x3FFFFFFF, out=mantissa)
    signs = turn
    for normal in normals:
        y = x.astype(np.float32)
        y += np.float32(0.5)  # off the zero of the sine
        y *= np.float32(2.0**-30)
        square = np.multiply(y, y, out=series)
        np.multiply(square, SINE[4], out=normal)
        for c in SINE[3:0:-1]:
            normal += c
            normal *= square
        normal += SINE[0]
        normal *= y
        normal *= radius
        as_bits = normal.view(np.int32)
        as_bits ^= signs & np.int32(-(2**31))
        # The other normal takes the cosine, which is the sine of the complement.
        np.subtract(0x3FFFFFFF, x, out=x)
        signs = signs << 1


def to_float64(bits: NDArray[np.int32], normals: NDArray[np.float64]) -> None:
    """The same transform with the functions of the C library; see `to_float32`."""
    high, low, turn = bits
    x = (high.astype(np.int64) << 32) | low.view(np.uint32)
    v = ((np.where(x < 0, ~x, x) >> 1) + 0.5) * 2.0**-63
    # u near 1 is known as v = 1 - u: log(1 - v) would lose the digits of the small radii.
    radius = np.sqrt(-2.0 * np.where(x < 0, np.log1p(-v), np.log(v)))
    angle = ((turn & 0x3FFFFFFF) + 0.5) * (math.pi / 2.0**31)
    np.multiply(radius, np.copysign(np.sin(angle), turn), out=normals[0])
    np.multiply(radius, np.copysign(np.cos(angle), turn << 1), out=normals[1])


class DeviceNormals:
    """Normals from the device's own generator (Philox 4x32 with 10 rounds on CUDA).

    Block b is `normal_` under the 64-bit seed `seed_of(b)`. Philox is a counter-based generator
    that passes statistical tests but is no cipher, and a seed of 64 bits is shorter than the run's
    key. Numbers are the same on devices of the same model; torch promises no more.

    Args:
        seed_of: block index -> seed in [0, 2**64).
        device: where the numbers are made.
        dtype: float32 or float64.
    """

    def __init__(
        self, seed_of: Callable[[int], int], device: torch.device, dtype: torch.dtype
    ) -> None:
        self._seed_of = seed_of
        self._generator = torch.Generator(device)
        self._normals = torch.empty(DEVICE_BLOCK, device=device, dtype=dtype)

    def block(self, index: int) -> Tensor:
        """Return the numbers [index, index + 1) * DEVICE_BLOCK of the sequence.

        Returns:
            a tensor that the next call overwrites.
        """
        seed = self._seed_of(index)
        # torch takes seeds as signed 64-bit integers on some devices.
        self._generator.manual_seed(seed - 2**64 if seed >= 2**63 else seed)
        return self._normals.normal_(generator=self._generator)
