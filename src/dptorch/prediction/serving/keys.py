"""API keys: random, shown once, and hashed at rest."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Mapping
from pathlib import Path

from dptorch.atomic_files import replacing
from dptorch.errors import ConfigurationError, DataError

__all__ = ["add_key", "client_of", "read_keys"]


def add_key(path: Path, client: str) -> str:
    """Make a key for a client, add its hash to the file, and return the key.

    A key has 256 random bits, so that a plain hash of it tells nothing and needs no salt.

    Raises:
        ConfigurationError: the client's name cannot be one, or has a key.
        DataError: the file is something else.
    """
    if not re.fullmatch(r"[\w][\w.@\-]{0,63}", client):
        raise ConfigurationError(
            f"client={client!r} must have 1 to 64 letters, digits and . @ - _, and begin with a letter "
            "or digit."
        )
    keys = read_keys(path) if path.exists() else {}
    if client in keys:
        raise ConfigurationError(
            f"{path} has a key for {client!r}. It cannot be shown again: take its line out of the file "
            "and make a new one."
        )
    key = f"dpt_{secrets.token_urlsafe(32)}"
    text = json.dumps({**keys, client: _hashed(key)}, indent=2) + "\n"
    with replacing(path, private=True) as partial:
        partial.write_text(text)
    return key


def read_keys(path: Path) -> dict[str, str]:
    """The hash of each client's key.

    Raises:
        DataError: there is no such file, or it is something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not all(
            isinstance(hashed, str) and len(hashed) == 64 for hashed in found.values()
        ):
            raise ValueError("it holds something else")
    except (OSError, ValueError) as error:
        raise DataError(
            f"the keys {path} cannot be read ({error}). Make one: dptorch serve RUN --new-key CLIENT"
        ) from None
    return found


def client_of(keys: Mapping[str, str], given: str) -> str | None:
    """Whose key was given; None if nobody's. Every key is compared, in constant time."""
    hashed, found = _hashed(given), None
    for client, known in keys.items():
        if hmac.compare_digest(hashed, known):
            found = client
    return found


def _hashed(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
