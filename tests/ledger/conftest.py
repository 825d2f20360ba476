"""Ledgers on both backends."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from uuid import uuid4

import pytest
import sqlalchemy as sa

from tests.ledger.servers import in_memory


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder of the test's own, where no entry has to wait for the disk."""
    with tempfile.TemporaryDirectory(prefix="dptorch-ledger-", dir=in_memory()) as name:
        yield Path(name)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a ledger can be made; one for each backend."""
    if request.param == "sqlite":
        return str(tmp_path / "ledger.db")
    return new_database(request.getfixturevalue("postgres"))


@pytest.fixture(scope="session")
def small_process() -> Iterator[Executor]:
    """Calls functions of a test module in a process of its own, for those that fork hundreds of times.

    A fork copies what it touches of the memory of all that its parent has imported. This process has
    imported what the functions need; a worker of the tests has what all tests before need.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as executor:
        yield executor


def new_database(server: str) -> str:
    """URL of a fresh database."""
    name = f"ledger_{uuid4().hex}"
    engine = sa.create_engine(
        sa.make_url(server).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT"
    )
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return sa.make_url(server).set(database=name).render_as_string(hide_password=False)
