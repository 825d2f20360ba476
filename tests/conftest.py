"""Fixtures for every test."""

import signal
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.ledger import servers

# No example fails because the machine is busy.
settings.register_profile("no clock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("quick", parent=settings.get_profile("no clock"), max_examples=8)
settings.load_profile("no clock")


@pytest.fixture
def float64() -> Iterator[None]:
    """Make float64 torch's default for the test, and its generator start at zero."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Let SIGINT interrupt, as from a terminal. Under nohup, or behind &, a process ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """URL of a PostgreSQL server for the session."""
    try:
        context = servers.server()
        url = context.__enter__()
    except servers.NoServer as reason:
        servers.give_up(str(reason))
    yield url
    context.__exit__(None, None, None)
