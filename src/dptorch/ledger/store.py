"""Where entries are kept: SQLite in a file, or PostgreSQL by URL.

Only this module and `connection` speak to a database. A transaction that writes holds the ledger's one
write lock from its first statement (SQLite: BEGIN IMMEDIATE; PostgreSQL: the stored head, FOR
UPDATE), so what it reads cannot change before it appends, whoever else writes.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, IntegrityError, NoSuchModuleError, SQLAlchemyError

from dptorch.errors import ConfigurationError, DataError, LedgerError
from dptorch.ledger import chain
from dptorch.ledger.connection import (
    connect,
    copy_log_into_file,
    files_in_use,
    files_of,
    parse,
    without_password,
)
from dptorch.ledger.entry import GENESIS, Entry, canonical, seal

__all__ = ["FORMAT", "Store", "Transaction"]

FORMAT: Final = 1
_LOCK: Final = 0x6470746F  # PostgreSQL's advisory lock while the tables are made
_ROWS_AT_ONCE: Final = 5000

_metadata = sa.MetaData()
_Seq = sa.BigInteger().with_variant(sa.Integer, "sqlite")
_head = sa.Table(
    "dptorch_ledger_head",
    _metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("format", sa.Integer, nullable=False),
    sa.Column("keyed", sa.Integer, nullable=False),
    sa.Column("seq", _Seq, nullable=False),
    sa.Column("time", sa.Text, nullable=False),
    sa.Column("hash", sa.Text, nullable=False),
)
_entries = sa.Table(
    "dptorch_ledger_entries",
    _metadata,
    sa.Column("seq", _Seq, primary_key=True, autoincrement=False),
    sa.Column("time", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("dataset", sa.Text),
    sa.Column("run", sa.Text),
    sa.Column("session", _Seq),
    sa.Column("first", sa.BigInteger),
    sa.Column("steps", sa.BigInteger),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("previous", sa.Text, nullable=False),
    sa.Column("hash", sa.Text, nullable=False),
    sa.Index("dptorch_ledger_by_run", "run", "session"),
    sa.Index("dptorch_ledger_by_dataset", "dataset", "kind"),
)


class Transaction:
    """What can be done while the database holds still."""

    def __init__(self, connection: sa.Connection, key: bytes | None) -> None:
        self._connection = connection
        self._key = key
        query = sa.select(_head)
        if connection.get_execution_options().get("dptorch_writes"):
            query = query.with_for_update()  # SQLite has no such clause and leaves it out
        row = connection.execute(query).one_or_none()
        if row is None:
            raise LedgerError(
                "the ledger has lost its head, the row that names its last entry: it is damaged."
            )
        self._seq: int = row.seq
        self._time: str = row.time
        self._hash: str = row.hash

    @property
    def head(self) -> tuple[int, str]:
        """(seq, hash) of the last entry, as the stored head has them."""
        return self._seq, self._hash

    def append(
        self,
        kind: str,
        *,
        dataset: str | None = None,
        run: str | None = None,
        session: int | None = None,
        first: int | None = None,
        steps: int | None = None,
        body: dict[str, Any] | None = None,
    ) -> Entry:
        """Write one entry; it is durable when the transaction ends without an error.

        Args:
            session: by default the entry begins a session of its own, if it is about a run.
        """
        now, body = _utc_now(), dict(body or {})
        if now < self._time:
            body["clock_behind"] = now  # the clock went back: kept for whoever audits
            now = self._time
        seq = self._seq + 1
        if session is None and run is not None:
            session = seq
        entry = Entry(
            seq, now, kind, dataset, run, session, first, steps, canonical(body), self._hash
        )
        entry = replace(entry, hash=seal(entry, self._key))
        self._connection.execute(sa.insert(_entries), asdict(entry))
        self._connection.execute(
            sa.update(_head).where(_head.c.id == 1),
            {"seq": seq, "time": now, "hash": entry.hash},
        )
        self._seq, self._time, self._hash = seq, now, entry.hash
        return entry

    def entries(
        self,
        *,
        dataset: str | None = None,
        run: str | None = None,
        kinds: Sequence[str] | None = None,
        after: int = 0,
    ) -> Iterator[Entry]:
        """Entries in order, those that match all that is given and whose seq is above `after`."""
        query = sa.select(_entries).order_by(_entries.c.seq).where(_entries.c.seq > after)
        query = query.execution_options(yield_per=_ROWS_AT_ONCE)
        if dataset is not None:
            query = query.where(_entries.c.dataset == dataset)
        if run is not None:
            query = query.where(_entries.c.run == run)
        if kinds is not None:
            query = query.where(_entries.c.kind.in_(kinds))
        for row in self._connection.execute(query):
            yield Entry(**row._mapping)

    def last_session(self, run: str) -> int | None:
        """Seq of the last "begin", "reserve" or "close" of a run; None if it has none."""
        query = sa.select(sa.func.max(_entries.c.session)).where(_entries.c.run == run)
        found: int | None = self._connection.execute(query).scalar_one()
        return found

    def entry(self, seq: int) -> Entry | None:
        """The entry with this number, if there is one."""
        row = self._connection.execute(sa.select(_entries).where(_entries.c.seq == seq)).first()
        return None if row is None else Entry(**row._mapping)

    def holds(self, seq: int, hash: str) -> bool:
        """Whether the entry with this number has this hash."""
        query = sa.select(_entries.c.hash).where(_entries.c.seq == seq)
        return self._connection.execute(query).scalar_one_or_none() == hash

    def count(self) -> int:
        """How many entries there are."""
        counted: int = self._connection.execute(
            sa.select(sa.func.count()).select_from(_entries)
        ).scalar_one()
        return counted


class Store:
    """A ledger's database.

    Args:
        location: path of a SQLite file, or ``postgresql://user@host/database``.
        create: make the ledger if there is none.
        key: see `dptorch.ledger.entry.seal`.
        timeout_s: how long to wait for another writer.

    Guarantees:
        An entry that `append` wrote in a `write()` that returned is on disk: SQLite runs in WAL
        mode with synchronous=FULL, PostgreSQL with synchronous_commit=on. One whose `write()`
        raised is not in the ledger, unless the connection broke during the commit: then it may be,
        which counts a step too many and never one too few.
        Held by `test_200_kills_lose_no_step`.

        Processes that come to one file by different names, or after it or its log was moved or
        deleted, never admit more together than one could alone
        (`test_of_two_processes_on_one_file_each_sees_what_the_other_has_reserved`), nor does a copy of
        the file without its log (`test_a_copy_without_its_log_has_what_was_reserved`).

    Raises:
        DataError: there is no ledger there, or the file is something else.
        ConfigurationError: a URL that is not understood; a key that is missing or not needed.
        LedgerError: it cannot be opened, or was written by a newer version.
    """

    def __init__(
        self,
        location: str | Path,
        *,
        create: bool = True,
        key: bytes | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        self._key = key
        self._timeout_s = timeout_s
        self._process = os.getpid()
        self._checked = chain.START
        self._path, url = parse(location)
        self.location = str(self._path) if self._path else without_password(url)
        if self._path is not None:
            if not create and not self._path.exists():
                raise DataError(
                    f"There is no ledger at {self.location}. The first private run makes one. Give "
                    "the path or URL of yours with --ledger or DPTORCH_LEDGER."
                )
            if create and not self._path.parent.is_dir():
                raise DataError(
                    f"The ledger {self.location} cannot be made: {self._path.parent} is not a folder."
                )
        try:
            self._engine = connect(url, self._path, timeout_s)
        except (ImportError, NoSuchModuleError) as error:
            raise ConfigurationError(
                f"A PostgreSQL ledger needs psycopg ({error}): pip install 'dptorch[postgres]'."
            ) from None
        with self._errors("open"):
            self._refuse_forgetful_server()
            if not self._tables_exist():
                if not create:
                    raise DataError(f"{self.location} holds no dptorch ledger.")
                self._create()
                copy_log_into_file(self._engine)
            self._check_format()

    @property
    def backend(self) -> str:
        """ "sqlite" or "postgresql"."""
        return self._engine.dialect.name

    @contextlib.contextmanager
    def write(self) -> Iterator[Transaction]:
        """A transaction that nobody else writes beside; durable when the block ends.

        Raises:
            LedgerError: it could not be written; nothing of it was.
        """
        self._look_again()
        with self._errors("write"), self._engine.connect() as connection:
            writing = connection.execution_options(dptorch_writes=True)
            with writing.begin():
                yield Transaction(writing, self._key)

    @contextlib.contextmanager
    def decide(self) -> Iterator[Transaction]:
        """A `write()` that may rely on what it reads: the chain has been checked.

        Raises:
            LedgerError: the chain is broken, or it could not be written; nothing of it was.
        """
        with self.read() as transaction:  # the long part, while others may write
            self.verify(transaction)
        with self.write() as transaction:
            self.verify(transaction)
            yield transaction
        copy_log_into_file(self._engine)

    def verify(self, transaction: Transaction) -> None:
        """Raise LedgerError if the chain is broken.

        The first check of a process reads every entry, a later one those that were added since. It
        also finds entries that were deleted since; one that was edited since is found by the first
        check of another process, and by `verify`.
        """
        before = self._checked
        if before.seq and not transaction.holds(before.seq, before.hash):
            before = chain.START
        found, last = chain.verify(
            transaction.entries(after=before.seq), transaction.head, self._key, after=before
        )
        problems = found.problems
        missing = last.seq - transaction.count()
        if missing and not problems:
            problems = [f"{missing} entries are missing"]
        if problems:
            raise LedgerError(
                f"the ledger {self.location} is broken: {problems[0]}. What was spent cannot be "
                "known from it, so it admits nothing. Nothing was spent. Run `dptorch ledger verify`, "
                "and restore the newest copy that is whole."
            )
        self._checked = last

    @contextlib.contextmanager
    def read(self) -> Iterator[Transaction]:
        """A transaction that sees one state of the ledger."""
        self._look_again()
        with self._errors("read"), self._engine.connect() as connection:
            if self.backend == "postgresql":
                connection = connection.execution_options(isolation_level="REPEATABLE READ")
            with connection.begin():
                yield Transaction(connection, self._key)

    def close(self) -> None:
        """Let go of the database; the next use opens it again."""
        self._engine.dispose()

    def _look_again(self) -> None:
        """Refuse a fork of the process; open the file anew if another one was put in its place."""
        if os.getpid() != self._process:
            raise LedgerError(
                f"this ledger was opened in process {self._process} and is used in its fork "
                f"{os.getpid()}, which would share its connection. Open it again there."
            )
        if self._path is not None and files_of(self._path) != files_in_use(self._engine):
            self._engine.dispose()  # a connection would go on with a file or log that is gone

    def _refuse_forgetful_server(self) -> None:
        """Raise LedgerError where what is committed may be lost by a crash of a server."""
        if self.backend != "postgresql":
            return
        with self._engine.connect() as connection:
            for name, wanted in _DURABLE.items():
                found = connection.exec_driver_sql(f"SHOW {name}").scalar_one()
                if found != wanted:
                    raise LedgerError(
                        f"The server of the ledger {self.location} runs with {name}={found}, so that a "
                        f"crash may lose what it has confirmed. Set {name}={wanted}, and connect "
                        "without a pooler that drops the settings of connections."
                    )

    def _tables_exist(self) -> bool:
        with self._engine.connect() as connection:
            return sa.inspect(connection).has_table(_head.name)

    def _create(self) -> None:
        first = Entry(
            1,
            _utc_now(),
            "open",
            None,
            None,
            None,
            None,
            None,
            canonical({"format": FORMAT, "id": secrets.token_hex(16)}),
            GENESIS,
        )
        first = replace(first, hash=seal(first, self._key))
        with self._engine.connect() as connection:
            writing = connection.execution_options(dptorch_writes=True)
            with writing.begin():
                if self.backend == "postgresql":
                    writing.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
                if sa.inspect(writing).has_table(_head.name):
                    return  # somebody else was faster
                _metadata.create_all(writing)
                writing.execute(sa.insert(_entries), asdict(first))
                writing.execute(
                    sa.insert(_head),
                    {
                        "id": 1,
                        "format": FORMAT,
                        "keyed": int(self._key is not None),
                        "seq": 1,
                        "time": first.time,
                        "hash": first.hash,
                    },
                )

    def _check_format(self) -> None:
        with self._engine.connect() as connection:
            # Only these: a newer version may have other columns.
            query = sa.text(f"SELECT format FROM {_head.name} WHERE id = 1")
            found = connection.execute(query).scalar_one_or_none()
            if found is None or found > FORMAT:
                raise LedgerError(
                    f"The ledger {self.location} has format {found}, written by a newer dptorch. This "
                    f"one knows format {FORMAT}. Upgrade dptorch. Nothing was changed."
                )
            keyed = bool(connection.execute(sa.select(_head.c.keyed)).scalar_one())
        if keyed and self._key is None:
            raise ConfigurationError(
                f"The ledger {self.location} was made with a key. Give the file that holds it with "
                "--key-file or DPTORCH_LEDGER_KEY_FILE."
            )
        if not keyed and self._key is not None:
            raise ConfigurationError(
                f"The ledger {self.location} was made without a key. It cannot be given one later. "
                "Leave the key out, or begin a new ledger."
            )

    @contextlib.contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except IntegrityError:
            raise LedgerError(
                f"The ledger {self.location} contradicts itself (its stored head is behind its "
                "entries): it has been edited or restored in part. Run `dptorch ledger verify`."
            ) from None
        except DBAPIError as error:
            reason = str(error.orig).strip().splitlines()[0] if error.orig else str(error)
            kind = DataError if "not a database" in reason else LedgerError
            raise kind(
                f"The ledger {self.location} could not be {_PAST[doing]}: {reason}. "
                f"{self._way_out(reason)}"
                + (" Nothing was released, and nothing was spent." if doing == "write" else "")
            ) from error
        except SQLAlchemyError as error:
            raise LedgerError(
                f"The ledger {self.location} could not be {_PAST[doing]}: {error}"
            ) from (error)

    def _way_out(self, reason: str) -> str:
        for sign, advice in _ADVICE.items():
            if sign in reason.lower():
                return advice.format(timeout=self._timeout_s)
        return "Check the path or URL, and that the database answers."


_DURABLE = {"fsync": "on", "full_page_writes": "on", "synchronous_commit": "on"}  # of PostgreSQL
_PAST = {"open": "opened", "write": "written", "read": "read"}
_ADVICE = {
    "locked": "Another process has held it for {timeout:g} s: let it finish, or end it if it hangs.",
    "lock timeout": "Another process has held it for {timeout:g} s: let it finish, or end it.",
    "readonly": "It is read-only: change its permissions (the folder's too), or give another one.",
    "read-only": "It is read-only: connect to the primary server, or as a user who may write.",
    "permission denied": "Give this user the right to write to it.",
    "full": "Free some space on its disk and go on from the last checkpoint.",
    "disk i/o": "The disk is full, over quota, or failing: free some space and go on from the last "
    "checkpoint.",
    "unable to open": "Check that its folder exists and that this user may write to it.",
    "not a database": "That file is something else: give the path of a ledger, or of a new file.",
    "malformed": "The file is damaged: restore it from a backup and run `dptorch ledger verify`.",
    "refused": "Start the PostgreSQL server, or check host and port.",
}


def _utc_now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")
