"""One entry of the ledger, and the hash that chains it to the one before."""

from __future__ import annotations

import hashlib
import hmac
import json
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["GENESIS", "Entry", "canonical", "seal"]

GENESIS: Final = "0" * 64  # what the first entry names as its predecessor
_ENCODER: Final = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
)


@dataclass(frozen=True)
class Entry:
    """What the ledger says happened once. Entries are appended, never changed.

    Attributes:
        seq: 1, 2, 3, ... without gaps.
        time: UTC, ISO 8601; never before the time of the entry before.
        kind: "open" (the ledger was made), "cap", "begin", "reserve", "steps" or "close".
        dataset: fingerprint of the data set, see `dptorch.ledger.dataset_id`.
        run: the run's id.
        session: seq of the "begin", "reserve" or "close" that the entry belongs to. Whoever wrote
            the last one of a run owns the run.
        first, steps: "steps": the interval of step indices about to be released. "close": the end
            of the last interval that was not used.
        body: the rest, as canonical JSON.
        previous: hash of the entry before.
        hash: SHA-256 of all of the above, or their HMAC where the ledger has a key.
    """

    seq: int
    time: str
    kind: str
    dataset: str | None
    run: str | None
    session: int | None
    first: int | None
    steps: int | None
    body: str
    previous: str
    hash: str = ""

    @property
    def detail(self) -> dict[str, Any]:
        """`body`, parsed."""
        parsed: dict[str, Any] = json.loads(self.body)
        return parsed


def canonical(value: Any) -> str:
    """JSON with one spelling for equal values; refuses NaN and infinities.

    Example:
        >>> canonical({"b": 1.5, "a": [True, None]})
        '{"a":[true,null],"b":1.5}'
    """
    return _ENCODER.encode(value)


def seal(entry: Entry, key: bytes | None) -> str:
    """The hash of an entry, over everything in it but the hash itself.

    Args:
        entry: its `hash` is ignored.
        key: without it, anybody can compute the hash; with it, its holders only (HMAC).
    """
    content = {name: value for name, value in vars(entry).items() if name != "hash"}
    message = canonical(content).encode()
    if key is None:
        return hashlib.sha256(message).hexdigest()
    return hmac.new(key, message, hashlib.sha256).hexdigest()
