"""A pytest plugin: write the outcome of every test of a run, and the error of each that failed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

import tests.oracles.torchvision_on_cpu  # noqa: F401  (before transformers)
from tests.peers.launch import DATA, known_keys, prepare
from tests.peers.small_models import random_vision_weights

#: The environment variable with the path of the file.
FILE = "PEERS_OUTCOMES"
#: Cases that a Hypothesis test draws: the originals' own number takes hours on a small machine.
CASES = 3


class Outcomes:
    """Outcomes by test; a test with a failing part has failed."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[str, str]] = {}

    def note(self, test: str, outcome: str, message: str) -> None:
        """Keep an outcome, and write all of them: the run may not come to its end."""
        if self.found.get(test, ("passed",))[0] != "failed":
            self.found[test] = (outcome, message)
            Path(os.environ[FILE]).write_text(json.dumps(self.found))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Iterator[None]:
        report: Any = yield  # type: ignore[misc]
        if call.excinfo is not None and not report.skipped:
            self.note(item.nodeid, "failed", _shown(call.excinfo))
        elif report.skipped:
            self.note(item.nodeid, "skipped", _shown(call.excinfo) if call.excinfo else "")
        elif report.when == "call" and report.passed:
            self.note(item.nodeid, "passed", "")
        return report

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Parts of a test (``subTest``) are reported beside it."""
        if report.failed:
            self.note(report.nodeid, "failed", str(report.longrepr)[-1000:])

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.note(report.nodeid, "failed", _last_line(str(report.longrepr)))
        elif report.skipped:
            self.note(report.nodeid, "skipped", str(report.longrepr[2]))


def _shown(info: Any) -> str:
    """The error, and those that it is a group of, as Hypothesis raises them."""
    parts = [str(part) for part in getattr(info.value, "exceptions", ())]
    return "\n".join([f"{info.typename}: {info.value}", *parts])[:1000]


def _last_line(text: str) -> str:
    lines = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    return lines[-1] if lines else text[-500:]


def pytest_configure(config: pytest.Config) -> None:
    """Begin to note."""
    known_keys()
    random_vision_weights()
    if DATA in os.environ:
        prepare()
    settings.register_profile("peers", max_examples=CASES)
    settings.load_profile("peers")
    config.pluginmanager.register(Outcomes())
