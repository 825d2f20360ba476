"""Connections to a ledger's database: SQLite in a file, or PostgreSQL by URL."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event as sa_event
from sqlalchemy.exc import SQLAlchemyError

from dptorch.errors import ConfigurationError

__all__ = ["connect", "parse", "without_password"]


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
    if path is None:
        settings = (
            f"-c synchronous_commit=on -c lock_timeout={round(timeout_s * 1000)} "
            "-c default_transaction_isolation=read\\ committed"
        )
        connect_args = {"options": settings, "connect_timeout": max(2, round(timeout_s))}
        return sa.create_engine(url, connect_args=connect_args, pool_pre_ping=True)
    engine = sa.create_engine(url, connect_args={"timeout": timeout_s})

    @sa_event.listens_for(engine, "connect")
    def prepare(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # the "begin" hook below decides what is begun
        _wal_mode(connection, timeout_s)
        connection.execute("PRAGMA synchronous=FULL")

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
