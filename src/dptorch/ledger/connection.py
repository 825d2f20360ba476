"""Connections to a ledger's database: SQLite in a file, or PostgreSQL by URL."""

from __future__ import annotations

import contextlib
import os
import time
import weakref
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event as sa_event
from sqlalchemy.exc import SQLAlchemyError

from dptorch.errors import ConfigurationError, LedgerError

__all__ = [
    "Files",
    "connect",
    "copy_log_into_file",
    "files_in_use",
    "files_of",
    "parse",
    "without_password",
]

Files = tuple[str, tuple[int, int], tuple[int, int] | None]


def parse(location: str | Path) -> tuple[Path | None, sa.URL]:
    """The file of a ledger, None on a server; and its URL for SQLAlchemy.

    Raises:
        ConfigurationError: a URL that is not understood.
    """
    text = str(location)
    if "://" not in text:
        path = Path(text).absolute()  # whatever the working directory becomes
        return path, sa.URL.create("sqlite+pysqlite", database=str(path))
    try:
        url = sa.make_url(text)
    except SQLAlchemyError:
        url = None
    kind = url.get_backend_name() if url is not None else None
    if url is not None and kind == "sqlite" and url.database:
        return parse(url.database)
    if url is not None and kind in ("postgresql", "postgres"):
        return None, url.set(drivername="postgresql+psycopg")
    raise ConfigurationError(
        f"the ledger's URL (of kind {text.split('://')[0]!r}) is not understood. Expected the path of "
        "a file, or postgresql://user@host:5432/database."
    )


def without_password(url: sa.URL) -> str:
    """The URL as it may be shown."""
    # `set(password=None)` would leave it as it is.
    return sa.URL.create(
        "postgresql",
        username=url.username,
        host=url.host,
        port=url.port,
        database=url.database,
    ).render_as_string(hide_password=False)


def connect(url: sa.URL, path: Path | None, timeout_s: float) -> sa.Engine:
    """Connections on which what is committed is on disk.

    A transaction with the execution option "dptorch_writes" holds SQLite's write lock from its
    beginning.
    """
    if url in _in_use_by_the_parent:
        raise LedgerError(
            f"the ledger {path or without_password(url)} was being written when this process was "
            "forked, and SQLite's locks do not survive that. Fork before the ledger is used, or start "
            "the process by the method 'spawn'."
        )
    engine = _engine(url, path, timeout_s)
    _engines.add(engine)
    return engine


def files_of(path: Path) -> Files:
    """What the path of a SQLite ledger leads to: where, which file, and which log beside it.

    SQLite looks for the log (``-wal``) beside the file, under the file's name. Processes that come to
    one file by different names therefore write two logs, and do not see each other's entries: links
    are followed, and a file with a second name is refused.

    Raises:
        LedgerError: the file is gone, or has several names.
    """
    real = os.path.realpath(path)
    try:
        found = os.stat(real)
    except OSError as error:
        raise LedgerError(
            f"The ledger {path} is gone ({error.strerror}). Put it back where it was. "
            "Nothing was released, and nothing was spent."
        ) from None
    if found.st_nlink > 1:
        raise LedgerError(
            f"The ledger {path} has {found.st_nlink} names (hard links). Processes that use another "
            "of them would not see what is written here. Nothing was released, and nothing was spent. "
            "Delete the other names (`find . -samefile` lists them), or make symbolic links of them."
        )
    return real, (found.st_dev, found.st_ino), _file(f"{real}-wal")


def files_in_use(engine: sa.Engine) -> Files | None:
    """What `files_of` found when the newest connection of `engine` was made; None before, and on a
    server."""
    newest = _files.get(engine)
    return newest[0] if newest else None


def copy_log_into_file(engine: sa.Engine) -> None:
    """Bring the file of a SQLite ledger up to date, as far as no process reads an older state of it.

    What is committed is on disk before, in the log. A file that is copied or moved without its log has
    what it had at the last such call.
    """
    if engine.dialect.name == "sqlite":
        failures = (SQLAlchemyError, engine.dialect.loaded_dbapi.Error)
        with contextlib.suppress(*failures), engine.connect() as connection:
            connection.connection.cursor().execute("PRAGMA wal_checkpoint(PASSIVE)")


def _file(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


_engines: weakref.WeakSet[sa.Engine] = weakref.WeakSet()
_files: weakref.WeakKeyDictionary[sa.Engine, list[Files]] = weakref.WeakKeyDictionary()
_in_use_by_the_parent: set[sa.URL] = set()


def _let_go() -> None:
    """Close what is not in use before a fork; the next use opens it again.

    SQLite notes in memory which locks its process holds. A fork inherits the notes and not the locks,
    and so writes without any: whoever closes the ledger next takes itself for the last one, and
    deletes the log to which the fork still writes. What it was told is on disk would be lost.
    """
    for engine in list(_engines):
        if not _in_use(engine):
            engine.dispose()


def _note_what_is_in_use() -> None:
    """In a fork: remember which ledgers were in the middle of a transaction."""
    _in_use_by_the_parent.update(engine.url for engine in list(_engines) if _in_use(engine))


def _in_use(engine: sa.Engine) -> bool:
    pool = engine.pool
    assert isinstance(pool, sa.QueuePool)
    return pool.checkedout() > 0


if hasattr(os, "register_at_fork"):  # not on Windows, where there is no fork
    os.register_at_fork(before=_let_go, after_in_child=_note_what_is_in_use)


def _engine(url: sa.URL, path: Path | None, timeout_s: float) -> sa.Engine:
    if path is None:
        settings = (
            f"-c synchronous_commit=on -c lock_timeout={round(timeout_s * 1000)} "
            "-c default_transaction_isolation=read\\ committed"
        )
        connect_args = {"options": settings, "connect_timeout": max(2, round(timeout_s))}
        return sa.create_engine(url, connect_args=connect_args, pool_pre_ping=True)
    engine = sa.create_engine(url, connect_args={"timeout": timeout_s})
    newest = _files[engine] = []

    @sa_event.listens_for(engine, "connect")
    def prepare(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # the "begin" hook below decides what is begun
        _wal_mode(connection, timeout_s)
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("SELECT 1 FROM sqlite_master").fetchall()  # opens the log
        newest[:] = [files_of(path)]

    @sa_event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        writes = connection.get_execution_options().get("dptorch_writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _wal_mode(connection: Any, timeout_s: float) -> None:
    # Two processes that switch at once: SQLite tells one of them "locked" without waiting.
    import sqlite3

    deadline = time.monotonic() + timeout_s
    while connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if "readonly" in str(error):
                return  # to be read only; writing to it says so
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
