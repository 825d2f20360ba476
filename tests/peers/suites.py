"""Run the test files of a peer, each in a process of its own."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.peers.forks import run
from tests.peers.launch import DATA
from tests.peers.recorder import FILE

__all__ = ["Outcome", "run_files"]

Outcome = tuple[str, str]  # "passed", "failed" or "skipped", and the error


def run_files(
    folder: Path, files: Iterable[str], data: Path | None, only: str = ""
) -> Iterator[dict[str, Outcome]]:
    """Outcomes by test, ``file::Class::test``, of test files below `folder`.

    Each file has a process of its own. One whose process was ended from outside counts as one failed
    test, beside those that it ran.

    Args:
        folder: where pytest runs.
        files: test files in it.
        data: where they need data or published weights: the folder of `data_files.write_all`.
        only: an expression for pytest's ``-k``.

    Yields:
        What came of the tests of one file.
    """
    given = {} if data is None else {DATA: str(data)}
    for file in files:
        with tempfile.NamedTemporaryFile(suffix=".json") as out:
            arguments = ["-q", "-p", "tests.peers.recorder", "-p", "no:cacheprovider"]
            arguments += ["--rootdir", str(folder), "-c", os.devnull, file]
            arguments += ["-k", only] if only else []
            status, printed = run(_pytest, arguments, folder, given | {FILE: out.name})
            outcomes = json.loads(Path(out.name).read_text() or "{}")
        if status < 0:
            outcomes[file] = ("failed", "not run to its end")
        elif not outcomes and not only:
            outcomes[file] = ("failed", printed[-500:])
        counts = [outcome for outcome, _ in outcomes.values()]
        print(f"{file}: {counts.count('passed')} of {len(counts)}", file=sys.stderr)
        yield {test: (outcome, message) for test, (outcome, message) in outcomes.items()}


def _pytest(arguments: list[str]) -> int:
    """With the plugins of Hypothesis and of the arguments alone: looking for others takes seconds."""
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    return int(pytest.main(["-p", "_hypothesis_pytestplugin", *arguments]))
