"""Files are the old one or the new one, whole, wherever the writing is cut off."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dptorch.atomic_files import replacing
from tests.ledger.processes import spawn, wait

OLD, NEW = "old " * 1000, "new " * 2000
Writing = Callable[..., Any]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "file.txt"
    file.write_text(OLD)
    return file


def write(path: Path, how: Writing = replacing) -> None:
    """Write the new text in two halves."""
    with how(path) as partial, partial.open("w") as file:
        for half in (NEW[:4000], NEW[4000:]):
            file.write(half)
            file.flush()


@contextmanager
def in_place(path: Path) -> Iterator[Path]:
    """The broken twin: the file itself is what is written."""
    yield path
    with path.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(path, path)


def dies_at(call: int, path: Path, how: Writing = replacing) -> int:
    """Write in a child that ends before its `call`-th flush or system call; returns its exit code."""
    seen = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == call:
                os._exit(9)
            return real(*args, **kwargs)

        return wrapped

    def child() -> None:
        os.fsync, os.replace = counted(os.fsync), counted(os.replace)
        plain = Path.open

        def opened(self: Path, *args: Any, **kwargs: Any) -> Any:
            file = plain(self, *args, **kwargs)
            if "w" in args:
                kept = file.flush
                file.flush = counted(kept)
            return file

        Path.open = opened  # type: ignore[method-assign,assignment]
        write(path, how)

    return wait(spawn(child))


def test_whatever_instant_it_is_cut_off_the_file_is_whole(path: Path) -> None:
    found = []
    for call in range(1, 10):
        path.write_text(OLD)
        if dies_at(call, path) == 0:
            break
        found.append(path.read_text())
    # Three flushes, the file to disk, its name: the old one. The folder to disk: the new one.
    assert found == [OLD] * 5 + [NEW]
    assert path.read_text() == NEW


def test_writing_in_place_is_caught(path: Path) -> None:
    assert dies_at(2, path, in_place) == 9
    assert path.read_text() not in (OLD, NEW)


def test_content_is_on_disk_before_its_name_and_its_name_before_the_end(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a power cut could leave an empty file under the name."""
    calls: list[str] = []

    def noting(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            folder = name == "fsync" and stat.S_ISDIR(os.fstat(args[0]).st_mode)
            calls.append("fsync of the folder" if folder else name)
            return real(*args, **kwargs)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, noting(name))
    write(path)
    assert calls == ["fsync", "replace", "fsync of the folder"]


def test_an_error_keeps_the_old_file_and_leaves_nothing_behind(path: Path) -> None:
    def half() -> None:
        with replacing(path) as partial:
            partial.write_text("half")
            raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        half()
    assert path.read_text() == OLD
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_permissions_are_those_of_a_new_file_or_the_owners_alone(path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        (path.parent / "plain").touch()
        write(path)
        expected = (path.parent / "plain").stat().st_mode
        assert path.stat().st_mode == expected
        with replacing(path, private=True) as partial:
            assert stat.S_IMODE(partial.stat().st_mode) == 0o600, "before the first byte"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert os.umask(mask) == mask, "the process's own mask is as it was"
    finally:
        os.umask(before)
