"""The normal transform, number by number, against the formula it stands for."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from dptorch.noise.normal import (
    DEVICE_BLOCK,
    KEYSTREAM_BLOCK,
    DeviceNormals,
    KeystreamNormals,
    to_float32,
    to_float64,
)

PAIRS = KEYSTREAM_BLOCK // 2
FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
EXTREMES_64 = np.array([0, 1, -1, 2, 2**31, 2**62, 2**63 - 1, -(2**63), -(2**63) + 1], np.int64)
EXTREMES_32 = np.array([0, 1, -1, 2**30, -(2**30), 2**30 - 1, 2**31 - 1, -(2**31)], np.int32)


def transform(dtype: np.dtype[Any], radius: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """The normals of chosen bits, as a [2, len(radius)] array."""
    high, low = (radius >> 32).astype(np.int32), radius.astype(np.uint32).view(np.int32)
    bits = np.stack([high, low, np.broadcast_to(angle, high.shape).astype(np.int32)])
    normals = np.empty((2, len(radius)), dtype)
    (to_float32 if dtype == FLOAT32 else to_float64)(bits, normals)
    return normals


@pytest.mark.parametrize(("dtype", "tolerance"), [(FLOAT32, 5e-7), (FLOAT64, 1e-14)])
def test_block_is_box_muller_of_the_keystream(dtype: np.dtype[Any], tolerance: float) -> None:
    """Oracle: the bits decrypted independently, the formula in Python floats."""
    key, index = bytes(range(32)), 5
    block = KeystreamNormals(key, dtype).block(index).copy()
    counter = (index * PAIRS * 12 // 16).to_bytes(16, "big")
    bits = Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor().update(bytes(12 * PAIRS))
    high, low, turn = struct.iter_unpack(f"<{PAIRS}I", bits)
    for i in [0, 1, 77, *range(1000, 1100), PAIRS - 1]:
        x = (high[i] << 32 | low[i]) >> 1
        u = (x + 0.5) / 2**63 if x < 2**62 else -(2**63 - x - 0.5) / 2**63
        log_u = math.log(u) if u > 0 else math.log1p(u)
        radius = math.sqrt(-2.0 * log_u)
        angle = ((turn[i] & (2**30 - 1)) + 0.5) / 2**30 * math.pi / 2
        first = radius * math.sin(angle) * (-1 if turn[i] >> 31 else 1)
        second = radius * math.cos(angle) * (-1 if turn[i] >> 30 & 1 else 1)
        assert block[i] == pytest.approx(first, rel=tolerance, abs=0)
        assert block[PAIRS + i] == pytest.approx(second, rel=tolerance, abs=0)


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64])
def test_no_bits_give_zero_or_a_non_number(dtype: np.dtype[Any]) -> None:
    radius, angle = (a.ravel() for a in np.meshgrid(EXTREMES_64, EXTREMES_32))
    normals = transform(dtype, radius, angle)
    assert np.isfinite(normals).all()
    assert (normals != 0).all()
    assert np.abs(normals).max() < 9.6


def reach(normals: np.ndarray) -> float:
    return float(np.hypot(normals[0], normals[1]).max())


def test_the_tail_reaches_eight_sigma() -> None:
    smallest = np.array([0, 1, 2, 3], np.int64)
    assert reach(transform(FLOAT32, smallest, np.zeros(4, np.int32))) > 8.0


def test_a_tail_of_24_bits_is_caught() -> None:
    """Negative control: the usual float32 uniform ends the tail at 5.8 sigma."""
    u = np.array([1, 2, 3], np.float32) / np.float32(2**24)
    radius = np.sqrt(-2 * np.log(u))
    assert not reach(np.stack([radius, np.zeros(3, np.float32)])) > 8.0


@pytest.mark.parametrize("exponent", [2, 8, 20, 32, 40, 46, 52, 60])
def test_tail_probabilities_are_exact_at_every_scale(exponent: int) -> None:
    """P(radius > r) = exp(-r**2 / 2): the threshold between bits falls where the law puts it."""
    limit = math.sqrt(2.0 * exponent * math.log(2.0))  # probability 2**-exponent
    edge = 2 ** (64 - exponent)
    below, above = np.array([edge - max(1, edge >> 20)]), np.array([edge + max(1, edge >> 20)])
    angle = np.array([0], np.int32)
    assert reach(transform(FLOAT64, below, angle)) > limit
    assert reach(transform(FLOAT64, above, angle)) < limit


def test_small_radii_are_fine_grained() -> None:
    """Near u = 1, where a logarithm of float32 numbers would round 2**-25 of all radii to 0."""
    x = np.array([-(2**k) for k in range(7, 63)], np.int64)
    radius = np.hypot(*transform(FLOAT32, x, np.full(len(x), 12345, np.int32)).astype(np.float64))
    expected = np.sqrt(-2.0 * np.log1p(x / 2.0**64))
    assert np.allclose(radius, expected, rtol=0.02, atol=0)
    assert np.allclose(radius[16:], expected[16:], rtol=1e-6, atol=0)


def test_precisions_agree() -> None:
    a = KeystreamNormals(bytes(32), FLOAT32).block(2).astype(np.float64)
    b = KeystreamNormals(bytes(32), FLOAT64).block(2)
    assert np.abs(a / b - 1).max() < 5e-7


def test_blocks_do_not_depend_on_what_was_read_before() -> None:
    one, other = KeystreamNormals(bytes(32), FLOAT32), KeystreamNormals(bytes(32), FLOAT32)
    expected = [one.block(i).copy() for i in range(4)]
    for i in (3, 0, 2, 2, 1):
        assert (other.block(i) == expected[i]).all()


def test_device_blocks_are_functions_of_their_seed() -> None:
    """On the CPU, whose generator is another one; the addressing is what is tested."""
    seeds = {0: 2**64 - 1, 1: 2**63, 2: 5}
    normals = DeviceNormals(seeds.__getitem__, torch.device("cpu"), torch.float32)
    blocks = {i: normals.block(i).clone() for i in (2, 0, 1)}
    assert blocks[0].shape == (DEVICE_BLOCK,)
    assert torch.equal(normals.block(0), blocks[0])
    for a, b in [(0, 1), (0, 2), (1, 2)]:
        assert (blocks[a] == blocks[b]).double().mean() < 1e-3
    assert abs(blocks[0].double().std().item() - 1.0) < 5 / math.sqrt(2 * DEVICE_BLOCK)
