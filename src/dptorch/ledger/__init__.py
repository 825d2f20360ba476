"""The privacy ledger: everything released about a data set, written down before it is visible.

Example:
    >>> import tempfile
    >>> from dptorch.ledger import Cap, open_ledger
    >>> folder = tempfile.TemporaryDirectory()
    >>> patients = open_ledger(f"{folder.name}/ledger.db").dataset("patients-2026")
    >>> patients.set_cap(Cap(epsilon=8.0, delta=1e-6))
    >>> patients.total().committed
    0.0

Give `patients` to `PrivacyEngine(..., ledger=patients)`.
"""

from __future__ import annotations

from pathlib import Path

from dptorch.accounting.arguments import number, positive, positive_int
from dptorch.errors import ConfigurationError
from dptorch.ledger.budget import Cap
from dptorch.ledger.chain import Verification
from dptorch.ledger.dataset_id import beside
from dptorch.ledger.datasets import DatasetLedger, Ledger, RunSummary, Total
from dptorch.ledger.record import RunLedger

__all__ = [
    "Cap",
    "DatasetLedger",
    "Ledger",
    "RunLedger",
    "RunSummary",
    "Total",
    "Verification",
    "beside",
    "open_ledger",
]


def open_ledger(
    location: str | Path,
    *,
    create: bool = True,
    key_file: str | Path | None = None,
    steps_per_write: int = 1,
    timeout_s: float = 30.0,
) -> Ledger:
    """Open the ledger at a path (SQLite) or URL (PostgreSQL), or make it.

    Args:
        location: such as "ledger.db" or "postgresql://user@host/database". SQLite needs a local
            disk; for many machines use PostgreSQL.
        create: False: only open one that exists.
        key_file: a file of at least 32 secret bytes: hashes are then HMACs, which only its holders
            can compute. It is settled when the ledger is made.
        steps_per_write: how many steps one durable write covers. More is faster where a write is
            slow, and a run that is killed loses up to that many steps: they count as spent.
        timeout_s: how long to wait for another writer.

    Raises:
        DataError, ConfigurationError, LedgerError: see `dptorch.ledger.store.Store`.
    """
    from dptorch.ledger.store import Store  # SQLAlchemy is imported by those who need it

    steps_per_write = positive_int("steps_per_write", steps_per_write)
    positive("timeout_s", number("timeout_s", timeout_s))
    if not isinstance(location, str | Path) or not str(location).strip():
        raise ConfigurationError(
            f"location={location!r} is no place of a ledger. Give a path such as 'ledger.db', or "
            "'postgresql://user@host/database'."
        )
    key = None if key_file is None else _read_key(Path(key_file))
    store = Store(location, create=create, key=key, timeout_s=timeout_s)
    return Ledger(store, key=key, steps_per_write=steps_per_write)


def _read_key(path: Path) -> bytes:
    try:
        key = path.read_bytes()
    except OSError as error:
        raise ConfigurationError(
            f"the ledger's key {path} cannot be read ({error.strerror})."
        ) from None
    if len(key) < 32:
        raise ConfigurationError(
            f"the ledger's key {path} has {len(key)} bytes. It needs at least 32. Make one with "
            f"`head -c 32 /dev/urandom > {path}`."
        )
    return key
