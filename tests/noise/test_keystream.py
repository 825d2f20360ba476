"""The keystream against the published test vectors, and its addressing."""

from __future__ import annotations

import numpy as np
import pytest

from dptorch.errors import ConfigurationError
from dptorch.noise.keystream import Keystream


def read(stream: Keystream, offset: int, size: int) -> np.ndarray:
    out = np.empty(size, np.uint8)
    stream.read(offset, out)
    return out


def test_nist_vector() -> None:
    """NIST SP 800-38A, F.5.5 (CTR-AES256.Encrypt)."""
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    counter = 0xF0F1F2F3F4F5F6F7F8F9FAFBFCFDFEFF
    plain = bytes.fromhex("6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51")
    cipher = bytes.fromhex("601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5")
    stream = read(Keystream(key), counter * 16, 32)
    assert bytes(stream ^ np.frombuffer(plain, np.uint8)) == cipher


def test_every_reader_sees_the_same_bytes() -> None:
    key = bytes(range(32))
    whole = read(Keystream(key), 0, 4096)
    stream = Keystream(key)
    for offset, size in [(0, 16), (16, 160), (176, 3), (1024, 1024), (0, 4096), (4080, 16)]:
        assert (read(stream, offset, size) == whole[offset : offset + size]).all()


def test_keys_give_different_bytes() -> None:
    assert (read(Keystream(bytes(32)), 0, 64) != read(Keystream(bytes(31) + b"\1"), 0, 64)).any()


@pytest.mark.slow
def test_no_block_repeats() -> None:
    blocks = read(Keystream(bytes(32)), 0, 16 * 2**18).view(np.uint64).reshape(-1, 2)
    assert len(np.unique(blocks, axis=0)) == len(blocks)


@pytest.mark.parametrize("offset", [-16, 1, 8])
def test_offsets_between_blocks_are_refused(offset: int) -> None:
    with pytest.raises(ConfigurationError, match="multiple of 16"):
        read(Keystream(bytes(32)), offset, 16)


@pytest.mark.parametrize("key", [bytes(16), bytes(33), "0" * 32, None])
def test_other_keys_are_refused(key: object) -> None:
    with pytest.raises(ConfigurationError, match="32 bytes"):
        Keystream(key)  # type: ignore[arg-type]
