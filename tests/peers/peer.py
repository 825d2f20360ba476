"""What is run of a peer: its test files and its examples, with which imports changed."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
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
    peer: Peer, checkout: Path, work: Path, data: Path
) -> tuple[dict[str, Outcome], dict[str, Outcome]]:
    """(outcomes of its tests, of its examples) from a copy below `work` with other import lines.

    The tests are copied to a folder of their own, so that no file of the peer can be imported in the
    place of the adapter's.
    """
    folder, pattern = peer.tests
    place = work / "tests_of_peer"
    tests: dict[str, Outcome] = {}
    if (checkout / folder).is_dir():
        copy_tree(checkout / folder, place / "suite", peer.packages)
        files = sorted(str(p.relative_to(place)) for p in (place / "suite").rglob(pattern))
        tests = run_files(place, files, data if peer.weights else None)
    for each in peer.folders:
        source, target = checkout / each, work / "checkout" / each
        if source.is_dir():
            copy_tree(source, target, peer.packages)
        elif source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
            copy_file(target, peer.packages)
    (work / "checkout").mkdir(exist_ok=True)
    found = [e for e in peer.examples if (work / "checkout" / e.script).exists()]
    return tests, run_examples(work / "checkout", found, data)


def copy_file(path: Path, packages: Mapping[str, str]) -> None:
    """Change the import lines of one copied file."""
    from tests.peers.imports import with_other_imports

    path.write_text(with_other_imports(path.read_text(), packages))
