"""Check the chain of hashes: every entry is as it was written, and none is missing.

Each entry holds the hash of the one before it, and its own hash covers all of it. The stored head
names the last one. So an entry that was edited, deleted, inserted or reordered is found, and so is
an end that was cut off, unless the whole chain is rebuilt with it.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from dataclasses import dataclass

from dptorch.ledger.entry import GENESIS, Entry, seal

__all__ = ["START", "Link", "Verification", "verify"]


@dataclass(frozen=True)
class Link:
    """An entry up to which a chain was checked: its number, time and hash."""

    seq: int
    time: str
    hash: str


START = Link(0, "", GENESIS)


@dataclass(frozen=True)
class Verification:
    """What a check of the chain found.

    Attributes:
        entries: how many there are.
        head: hash of the last entry. Keep it elsewhere, and what comes before it cannot be changed
            unnoticed.
        problems: empty if the chain holds.
        clock_went_back: entries written while the clock was behind the entry before.
    """

    entries: int
    head: str
    problems: list[str]
    clock_went_back: list[int]


def verify(
    entries: Iterable[Entry],
    head: tuple[int, str],
    key: bytes | None,
    *,
    pinned_head: str | None = None,
    after: Link = START,
) -> tuple[Verification, Link]:
    """Recompute the hashes of `entries`, which are all that follow `after`.

    Args:
        entries: in order.
        head: (seq, hash) of the last entry, as the stored head has them.
        key: of the ledger, if it has one.
        pinned_head: a hash kept from earlier; some entry must have it.
        after: the entry up to which the chain was checked before.

    Returns:
        What was found, and the last entry, after which a later check can go on.

    Guarantees:
        Editing, deleting, inserting or reordering entries is found, and so is cutting off the end
        without setting the stored head back (`test_every_kind_of_edit_is_found`). Whoever can write
        to the database can rebuild all of it consistently, unless the ledger has a key that they
        lack (`test_with_a_key_nobody_else_can_rebuild_the_chain`) or `pinned_head` is given: then
        only what came after it can be rebuilt
        (`test_a_consistent_cut_is_found_by_a_pinned_head_only`).
    """
    problems: list[str] = []
    behind: list[int] = []
    last = after
    pin_found = pinned_head is None
    for entry in entries:
        problems += _problems(entry, last, key)
        if '"clock_behind"' in str(entry.body):
            behind.append(entry.seq)
        pin_found = pin_found or entry.hash == pinned_head
        last = Link(last.seq + 1, entry.time, entry.hash)
    if head != (last.seq, last.hash):
        problems.append(
            f"the stored head says that {head[0]} entries end in {head[1][:16]}..., but {last.seq} "
            f"end in {last.hash[:16]}...: entries were cut off or added"
        )
    if not pin_found:
        problems.append(
            f"no entry has the pinned hash {str(pinned_head)[:16]}...: the ledger was cut off before "
            "it, rewritten, or restored from an older copy"
        )
    return Verification(last.seq, last.hash, problems, behind), last


def _problems(entry: Entry, before: Link, key: bytes | None) -> list[str]:
    found = []
    seq = before.seq + 1
    if entry.seq != seq:
        found.append(f"entry {seq} is missing or out of place: entry {entry.seq} is there")
    if not _sealed(entry, key):
        found.append(f"entry {entry.seq} was edited: its hash does not fit it")
    if entry.previous != before.hash:
        found.append(f"entry {entry.seq} does not follow the entry before it")
    if str(entry.time) < str(before.time):
        found.append(f"entry {entry.seq} is dated before the entry before it")
    return found


def _sealed(entry: Entry, key: bytes | None) -> bool:
    """Whether the hash of an entry fits it, whatever somebody may have written into its row."""
    try:
        return hmac.compare_digest(seal(entry, key).encode(), entry.hash.encode())
    except (TypeError, ValueError, AttributeError):  # bytes where there was text
        return False
