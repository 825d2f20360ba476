"""Run the test files of a peer, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.peers.launch import DATA
from tests.peers.recorder import FILE
from tests.source import REPOSITORY

__all__ = ["Outcome", "run_files"]

Outcome = tuple[str, str]  # "passed", "failed" or "skipped", and the error


def environment(*paths: Path) -> dict[str, str]:
    """This process's, with dptorch's source and `paths` importable."""
    found = [str(p) for p in (*paths, REPOSITORY / "src", REPOSITORY)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(found), "OMP_NUM_THREADS": "1"}


def run_files(
    folder: Path, files: Iterable[str], data: Path | None, only: str = "", *paths: Path
) -> Iterator[dict[str, Outcome]]:
    """Outcomes by test, ``file::Class::test``, of test files below `folder`.

    Each file has a process of its own; small files of one folder share one. A file whose process was
    ended from outside counts as one failed test, beside those that it ran.

    Args:
        folder: where pytest runs.
        files: test files in it.
        data: where they need data or published weights: the folder of `data_files.write_all`.
        only: an expression for pytest's ``-k``.
        paths: further folders to import from.

    Yields:
        What came of the tests of one process.
    """
    given = {} if data is None else {DATA: str(data)}
    for group in _processes(files):
        with tempfile.NamedTemporaryFile(suffix=".json") as out:
            command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.peers.recorder"]
            command += ["-p", "no:cacheprovider", "--rootdir", str(folder), "-c", os.devnull]
            command += [*group, *(["-k", only] if only else [])]
            done = subprocess.run(
                command, cwd=folder, env=environment(*paths) | {FILE: out.name} | given,
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            outcomes = json.loads(Path(out.name).read_text() or "{}")
        for file in group:
            of_file = [test for test in outcomes if test.partition("::")[0] == file]
            if done.returncode < 0:
                outcomes[file] = ("failed", "not run to its end")
            elif not of_file and not only:
                outcomes[file] = ("failed", (done.stdout + done.stderr)[-500:])
        counts = [outcome for outcome, _ in outcomes.values()]
        print(f"{' '.join(group)}: {counts.count('passed')} of {len(counts)}", file=sys.stderr)
        yield {test: (outcome, message) for test, (outcome, message) in outcomes.items()}


def _processes(files: Iterable[str]) -> list[list[str]]:
    """The files by process: those two folders down by their folder, the others alone."""
    groups: dict[str, list[str]] = {}
    for file in files:
        folder, _, _ = file.rpartition("/")
        groups.setdefault(folder if folder.count("/") else file, []).append(file)
    return list(groups.values())
