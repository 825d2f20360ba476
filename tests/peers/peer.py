"""What is run of a peer: its test files and its examples, with which imports changed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.peers.examples import Example, run_examples
from tests.peers.imports import copy_tree
from tests.peers.reasons import Reason
from tests.peers.suites import Outcome, run_files

__all__ = ["Peer", "run_peer"]


@dataclass(frozen=True)
class Peer:
    """A library whose tests and examples are run.

    Attributes:
        name: on the page.
        packages: its top-level packages -> the modules that stand for them.
        tests: folder of its tests in a checkout, and the pattern of their files.
        examples: its scripts.
        reasons: why some do not pass.
        folders: folders of a checkout that are copied.
        weights: whether its tests need published weights, in whose place are small random models.
    """

    name: str
    packages: Mapping[str, str]
    tests: tuple[str, str]
    examples: tuple[Example, ...]
    reasons: tuple[Reason, ...]
    folders: tuple[str, ...]
    weights: bool = False


def run_peer(
    peer: Peer, checkout: Path, work: Path, data: Path, only: str = ""
) -> Iterator[tuple[str, dict[str, Outcome]]]:
    """What comes of its tests and examples, from a copy below `work` with other import lines.

    The tests are copied to a folder of their own, so that no file of the peer can be imported in the
    place of the adapter's.

    Args:
        peer: the library.
        checkout: its folder.
        work: an empty folder.
        data: the folder of `data_files.write_all`.
        only: a pattern that is found in the test files and titles of examples to run; after ``::``
            an expression for pytest's ``-k``.

    Yields:
        ("tests" or "examples", outcomes), as soon as they are known.
    """
    wanted, _, tests = only.partition("::")
    folder, pattern = peer.tests
    place = work / "tests_of_peer"
    if (checkout / folder).is_dir():
        copy_tree(checkout / folder, place / "suite", peer.packages)
        found = sorted(str(p.relative_to(place)) for p in (place / "suite").rglob(pattern))
        files = [file for file in found if re.search(wanted, file)]
        for outcomes in run_files(place, files, data if peer.weights else None, tests):
            yield "tests", outcomes
    for each in peer.folders:
        source, target = checkout / each, work / "checkout" / each
        if source.is_dir():
            copy_tree(source, target, peer.packages)
        elif source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
            copy_file(target, peer.packages)
    (work / "checkout").mkdir(exist_ok=True)
    there = [e for e in peer.examples if (work / "checkout" / e.script).exists()]
    examples = [e for e in there if re.search(wanted, e.title)]
    for outcomes in run_examples(work / "checkout", examples, data):
        yield "examples", outcomes


def copy_file(path: Path, packages: Mapping[str, str]) -> None:
    """Change the import lines of one copied file."""
    from tests.peers.imports import with_other_imports

    path.write_text(with_other_imports(path.read_text(), packages))
