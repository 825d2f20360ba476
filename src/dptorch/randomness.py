"""The root key of a run, and the independent streams derived from it.

One secret of 256 bits decides everything random that the privacy of a run rests on: which examples
enter a batch and which noise is added. Each use derives its own key by purpose and counters, so
that a stream can be recomputed from (root key, purpose, step) alone: a resumed run continues the
streams of the run that stopped, and no position of any stream serves two releases.
"""

from __future__ import annotations

import hashlib
import hmac
import operator
import os
from collections.abc import Mapping
from enum import Enum
from typing import Any, Final, NoReturn

from dptorch.errors import ConfigurationError, PrivacyError

__all__ = ["KEY_BYTES", "KeySource", "RootKey"]

#: Bytes of a root key.
KEY_BYTES: Final = 32

# BLAKE2's personalisation field separates these hashes from every other use of BLAKE2 on the same
# key.
_DERIVE: Final = b"dptorch.derive.1"
_SEED: Final = b"dptorch.seed.1"


class KeySource(Enum):
    """Where a root key comes from, and so whether it is secret.

    The value is the text for it, in statements, checkpoints and run files.

    Example:
        >>> KeySource("operating system").is_private, KeySource.SEED.is_private
        (True, False)
    """

    OS = "operating system"
    SEED = "user seed (not private)"

    @property
    def is_private(self) -> bool:
        """Whether nobody can recompute the key."""
        return self is KeySource.OS

    @classmethod
    def _missing_(cls, value: object) -> NoReturn:
        valid = ", ".join(repr(source.value) for source in cls)
        raise ConfigurationError(f"key source {value!r} is not known. Valid: {valid}.")


class RootKey:
    """A 256-bit secret from which every private random stream of a run is derived.

    Make one with `from_os` (what a private run needs) or `from_seed` (tests, reproductions). The
    key never shows in `repr`, `str` or a pickle; `export` is the one way out, for a checkpoint that
    is kept as safe as the data. Instances are immutable; two with the same secret are equal.

    Attributes:
        source: where it comes from; belongs in the statement.

    Guarantees:
        - *Separation*: `derive` is keyed BLAKE2b over an injective encoding of (purpose, counters),
          a pseudo-random function of 256-bit keys: two different argument lists never give related
          streams, so sampling and noise, or two steps, share nothing an observer could use.
        - *No accidental reuse*: a process forked after the key was made cannot use it (parent and
          child would otherwise add the same noise to different sums).
        Held by `test_different_arguments_never_share_a_stream` and
        `test_a_fork_cannot_use_the_key_but_may_restore_it`.

    Example:
        >>> key = RootKey.from_seed(0)
        >>> key
        RootKey(source=<KeySource.SEED: 'user seed (not private)'>)
        >>> key.derive("noise", 3) == key.derive("noise", 3)
        True
        >>> key.derive("noise", 3) == key.derive("sampling", 3)
        False
    """

    __slots__ = ("_process", "_secret", "source")

    _process: int
    _secret: bytes
    source: KeySource

    def __init__(self, secret: bytes, source: KeySource) -> None:
        if not isinstance(secret, bytes) or len(secret) != KEY_BYTES:
            raise ConfigurationError(
                f"a root key needs {KEY_BYTES} bytes; use RootKey.from_os(), or "
                "RootKey.from_seed(n) in tests"
            )
        if not isinstance(source, KeySource):
            raise ConfigurationError(
                f"source={source!r} must be KeySource.OS or KeySource.SEED: it decides whether a run "
                "is called private."
            )
        object.__setattr__(self, "_secret", secret)
        object.__setattr__(self, "_process", os.getpid())
        object.__setattr__(self, "source", source)

    @classmethod
    def from_os(cls) -> RootKey:
        """A fresh key from the operating system's generator."""
        return cls(os.urandom(KEY_BYTES), KeySource.OS)

    @classmethod
    def from_seed(cls, seed: int) -> RootKey:
        """A key that anybody who knows `seed` can recompute: for tests, never for a release.

        Args:
            seed: any non-negative integer.

        Raises:
            ConfigurationError: `seed` is no non-negative integer.
        """
        number = _counter("seed", seed, bits=None)
        encoded = number.to_bytes(max(1, (number.bit_length() + 7) // 8), "big")
        secret = hashlib.blake2b(encoded, digest_size=KEY_BYTES, person=_SEED).digest()
        return cls(secret, KeySource.SEED)

    @classmethod
    def restore(cls, exported: Mapping[str, str]) -> RootKey:
        """The key that `export` wrote.

        Raises:
            ConfigurationError: `exported` is not what `export` returns.
        """
        try:
            secret, source = bytes.fromhex(exported["key"]), exported["provenance"]
        except (KeyError, TypeError, ValueError):
            # The value is a secret or a mangled one, so neither it nor the cause may reach a log.
            raise ConfigurationError(
                "this is not an exported root key; pass the mapping that RootKey.export() returned"
            ) from None
        return cls(secret, KeySource(source))

    def export(self) -> dict[str, str]:
        """The secret in the clear (hex) with its source, for a checkpoint and for `restore`.

        Who holds it can subtract the noise of every step: store it as safely as the training data,
        and never beside a published model.
        """
        return {"key": self._secret.hex(), "provenance": self.source.value}

    def derive(self, purpose: str, *counters: int) -> bytes:
        """The 32-byte key of one stream.

        Args:
            purpose: what the stream is for, e.g. `"noise"`, `"sampling"`; not empty.
            counters: position of the stream, e.g. the step; each in [0, 2**64).

        Raises:
            ConfigurationError: `purpose` is empty or a counter is no integer in range.
            PrivacyError: this process was forked after the key was made.
        """
        if os.getpid() != self._process:
            raise PrivacyError(
                f"this root key was made in process {self._process} and is used in its fork "
                f"{os.getpid()}: both would draw the same noise. Make the key after forking, or "
                "give one process the key's work and the other RootKey.restore(key.export()) if "
                "they are meant to share the stream"
            )
        if not isinstance(purpose, str) or not purpose:
            raise ConfigurationError(f"purpose={purpose!r} must be a non-empty string")
        name = purpose.encode()
        # Lengths first: otherwise ("a", 1) and a purpose ending in the bytes of 1 would coincide.
        parts = [len(name).to_bytes(8, "big"), name, len(counters).to_bytes(8, "big")]
        parts += [_counter("counter", c, bits=64).to_bytes(8, "big") for c in counters]
        return hashlib.blake2b(
            b"".join(parts), key=self._secret, digest_size=KEY_BYTES, person=_DERIVE
        ).digest()

    def __repr__(self) -> str:
        return f"RootKey(source={self.source!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RootKey):
            return NotImplemented
        return hmac.compare_digest(self._secret, other._secret) and self.source is other.source

    def __hash__(self) -> int:
        return hash((self._secret, self.source))

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"RootKey is immutable: cannot set {name!r}; make a new key instead")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"RootKey is immutable: cannot delete {name!r}")

    def __copy__(self) -> RootKey:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> RootKey:
        return self

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "a RootKey is not pickled, so that the secret of the noise cannot slip into a file or "
            "another process; where that is meant, pass key.export() and RootKey.restore() it there"
        )


def _counter(name: str, value: object, *, bits: int | None) -> int:
    """`value` as an integer in [0, 2**bits), or in [0, inf) when `bits` is None."""
    wanted = "a non-negative integer" + (f" below 2**{bits}" if bits else "")
    if isinstance(value, bool):
        raise ConfigurationError(f"{name}={value!r} must be {wanted}")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ConfigurationError(f"{name}={value!r} must be {wanted}") from None
    if number < 0 or (bits is not None and number >= 1 << bits):
        raise ConfigurationError(f"{name}={value!r} must be {wanted}")
    return number
