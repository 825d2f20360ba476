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

__all__ = ["DEVICE_BLOCK", "KEYSTREAM_BLOCK", "DeviceNormals", "KeystreamNormals"]

KEYSTREAM_BLOCK: Final = 2**16
"""Normals of one keystream block; its buffers stay in the processor's second-level cache."""

DEVICE_BLOCK: Final = 2**22
"""Normals of one device block: one kernel launch, 16 MiB in float32."""

_PAIRS: Final = KEYSTREAM_BLOCK // 2
_RADIUS_BYTES: Final = 8 * _PAIRS
_BLOCK_BYTES: Final = 12 * _PAIRS

# Small enough to change no number that is not already at the edge of float32's precision.
_OFF_ZERO: Final = 2.0**-66


class KeystreamNormals:
    """Normals by the Box-Muller transform of a cryptographic keystream, on the CPU.

    A pair of normals takes 12 bytes: 64 bits for the radius sqrt(-2 log u), 32 bits for the angle.
    The uniform u is the fractional part of the 64-bit signed integer over 2**64. Both u near 0,
    which makes the tail, and 1 - u near 0, which makes the small radii, are known to the relative
    precision of `dtype`: a float32 u alone would round one radius in 2**25 to zero.

    numpy does the arithmetic, because its loops release the interpreter lock and start no threads
    of their own, so that blocks can be made in several threads at once.

    Args:
        key: 32 bytes, used for this sequence only.
        dtype: float32 or float64; both give the same numbers up to rounding.

    Guarantees:
        - Tails: values reach 9.4 standard deviations, and up to there the tail is the normal one.
        - No radius and no sine or cosine is exactly 0, so that every number carries noise.

    Not claimed: floating-point outputs are a discrete set, whose low-order bits tell something
    about the value that noise was added to (Mironov 2012). A keystream does not change that.

    Example:
        >>> block = KeystreamNormals(bytes(32), np.dtype(np.float32)).block(3)
        >>> block.shape, block.dtype.name, bool(abs(block.std() - 1.0) < 0.02)
        ((65536,), 'float32', True)
    """

    def __init__(self, key: bytes, dtype: np.dtype[Any]) -> None:
        self._stream = Keystream(key)
        self._raw = np.empty(_BLOCK_BYTES, np.uint8)
        self._scratch = np.empty((3, _PAIRS), dtype)
        self._normals = np.empty((2, _PAIRS), dtype)

    def block(self, index: int) -> NDArray[Any]:
        """Numbers [index, index + 1) * KEYSTREAM_BLOCK of the sequence.

        Returns:
            an array that the caller may change and the next call overwrites.
        """
        self._stream.read(index * _BLOCK_BYTES, self._raw)
        self._transform(
            self._raw[:_RADIUS_BYTES].view("<i8"), self._raw[_RADIUS_BYTES:].view("<i4")
        )
        return self._normals.reshape(-1)

    def _transform(self, radius_bits: NDArray[np.int64], angle_bits: NDArray[np.int32]) -> None:
        normals = self._normals
        number = normals.dtype.type
        signed, rest, radius = self._scratch
        np.copyto(signed, radius_bits, casting="unsafe")
        np.multiply(signed, number(2.0**-64), out=signed)
        np.add(signed, number(_OFF_ZERO), out=signed)
        np.floor(signed, out=rest)
        np.subtract(signed, rest, out=radius)  # u
        np.add(rest, number(1.0), out=rest)
        np.subtract(rest, signed, out=rest)  # 1 - u, exact where u was rounded
        # -log(u) as -log(u) / (1 - u) * rest, in which the rounding of u cancels (Kahan's log1p; D.
        # Goldberg 1991, What Every Computer Scientist Should Know About Floating-Point Arithmetic,
        # theorem 4). If u was rounded to 1, the two small terms make the quotient 1.
        np.subtract(number(1.0), radius, out=signed)
        np.add(signed, number(_OFF_ZERO), out=signed)
        np.log(radius, out=radius)
        np.subtract(number(_OFF_ZERO), radius, out=radius)
        np.multiply(radius, rest, out=radius)
        np.divide(radius, signed, out=radius)
        np.sqrt(radius, out=radius)
        np.multiply(radius, number(math.sqrt(2.0)), out=radius)
        angle = signed
        np.copyto(angle, angle_bits, casting="unsafe")
        np.add(angle, number(0.5), out=angle)  # off the zero of the sine
        np.multiply(angle, number(2.0 * math.pi / 2.0**32), out=angle)
        np.cos(angle, out=normals[0])
        np.sin(angle, out=normals[1])
        np.multiply(normals, radius, out=normals)


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
        """Numbers [index, index + 1) * DEVICE_BLOCK of the sequence.

        Returns:
            a tensor that the next call overwrites.
        """
        seed = self._seed_of(index)
        # torch takes seeds as signed 64-bit integers on some devices.
        self._generator.manual_seed(seed - 2**64 if seed >= 2**63 else seed)
        return self._normals.normal_(generator=self._generator)
