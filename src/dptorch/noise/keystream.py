"""A cryptographic stream of uniform bits that can be read from any position."""

from __future__ import annotations

from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from dptorch.errors import ConfigurationError

__all__ = ["CIPHER_BLOCK", "Keystream"]

CIPHER_BLOCK: Final = 16
"""Bytes of one AES block: positions are multiples of it."""

_KEY_BYTES: Final = 32


class Keystream:
    """The AES-256 counter-mode keystream of one key.

    Byte i of the stream is a fixed function of (key, i), so that readers at different positions, in
    any order, see parts of the same stream.

    Args:
        key: 32 bytes, used for this stream only (`RootKey.derive`).

    Guarantees:
        - Under the usual assumption on AES-256, the bytes cannot be told from uniform ones, nor be
          predicted from any number of others, by anyone without the key.
        - No 16-byte block occurs twice (the cipher is a permutation of the 2**128 counters).
        Held by `test_nist_vector` and `test_no_block_repeats`.

    Example:
        >>> stream = Keystream(bytes(32))
        >>> whole, part = np.empty(64, np.uint8), np.empty(32, np.uint8)
        >>> stream.read(0, whole)
        >>> stream.read(32, part)
        >>> bool((whole[32:] == part).all())
        True
    """

    def __init__(self, key: bytes) -> None:
        if not isinstance(key, bytes) or len(key) != _KEY_BYTES:
            raise ConfigurationError(f"a keystream needs a key of {_KEY_BYTES} bytes.")
        self._algorithm = algorithms.AES(key)
        self._zeros = b""
        self._position = -1

    def read(self, offset: int, out: NDArray[np.uint8]) -> None:
        """Fill `out` with the stream's bytes from `offset` on.

        Args:
            offset: a multiple of 16, >= 0.
            out: contiguous one-dimensional uint8 array.
        """
        if offset < 0 or offset % CIPHER_BLOCK:
            raise ConfigurationError(f"offset={offset} must be a multiple of {CIPHER_BLOCK}, >= 0.")
        if offset != self._position:
            # A reader that goes on where it was needs no new cipher. Counter mode counts in big-endian
            # order, and by its number a block can be reached without those before it.
            counter = (offset // CIPHER_BLOCK).to_bytes(CIPHER_BLOCK, "big")
            self._encryptor = Cipher(self._algorithm, modes.CTR(counter)).encryptor()
        # Kept, as reads are mostly of one length.
        if len(self._zeros) != out.size:
            self._zeros = bytes(out.size)
        # The keystream is the encryption of zeros.
        self._encryptor.update_into(self._zeros, out.data)
        self._position = offset + out.size
