"""Fixtures for every test."""

import signal
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _pytest.doctest import DoctestModule
from hypothesis import HealthCheck, settings

from dptorch.training import run_charts
from tests.forked_python import forking_python
from tests.ledger import servers

# No example fails because the machine is busy.
settings.register_profile("no clock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("quick", parent=settings.get_profile("no clock"), max_examples=8)
settings.load_profile("no clock")


@pytest.hookimpl(wrapper=True)
def pytest_collect_file() -> Generator[None, list[pytest.Collector], list[pytest.Collector]]:
    """Docstrings of tests have no examples: they need not be imported and searched for them."""
    found = yield
    return [each for each in found if not isinstance(each, DoctestModule)]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse names of tests that are other ones in another process, where xdist looks for them."""
    named = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if named:
        raise pytest.UsageError(f"{named[0]}: an address is in its name; give ids= to parametrize.")


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


_CHARTS: dict[str, Callable[..., str]] = {
    name: getattr(run_charts, name)
    for name in (
        "accuracy_against_epsilon", "diagnostic", "epsilon_against_steps",
        "perplexity_against_epsilon", "results_against_epsilon",
    )
}  # fmt: skip


def _blank(chart: Callable[..., str]) -> Callable[..., str]:
    """The chart made and not drawn. Nobody who imports `data_uri` gets one that does not draw."""

    def made(*points: Any, **how: Any) -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run_charts, "data_uri", lambda figure: "data:image/svg+xml;base64,")
            return chart(*points, **how)

    return made


@pytest.fixture(autouse=True, scope="module")
def charts_are_left_blank() -> Iterator[None]:
    """The charts of a run's page are made and not drawn: that takes half a second of a processor, more
    than all else in most tests that train by a command. Tests of pages ask for `drawn`."""
    with pytest.MonkeyPatch.context() as patch:
        for name, chart in _CHARTS.items():
            patch.setattr(run_charts, name, _blank(chart))
        yield


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the charts of a run's page be drawn, as they are for users."""
    for name, chart in _CHARTS.items():
        monkeypatch.setattr(run_charts, name, chart)


@pytest.fixture(scope="session")
def forking() -> Iterator[Path]:
    """A Python, and the commands that are made of it, that have the imports of training behind them."""
    commands = {
        "dptorch": ["-c", "from dptorch.cli.app import main; main()"],
        "torchrun": ["-m", "torch.distributed.run"],
    }
    with forking_python(commands=commands) as python:
        yield python


@pytest.fixture
def python_forks(forking: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let `sys.executable` be that Python, for programs whose imports are not what is tested."""
    monkeypatch.setattr(sys, "executable", str(forking))
    return forking


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
