"""Files that are whole or absent: whatever interrupts a write leaves the old file."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["replacing"]


@contextlib.contextmanager
def replacing(path: str | Path, *, private: bool = False) -> Iterator[Path]:
    """Give a partial file in the same folder that replaces `path` if the block succeeds.

    Args:
        path: the file to write; its folder must exist.
        private: readable by its owner only (mode 0600, before the first byte is in it). Otherwise
            the permissions of any new file.

    Guarantees:
        After a crash, a power cut or an error at any instant `path` is the old file or the new one,
        whole, and after the block it is the new one even if the power fails: the file is forced to
        disk before it gets its name, and the name before this returns.
        Held by `test_whatever_instant_it_is_cut_off_the_file_is_whole` and
        `test_content_is_on_disk_before_its_name_and_its_name_before_the_end`.

    Raises:
        OSError: the folder is missing or read-only, or the disk is full; the old file is there.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing(Path(folder) / "a.txt") as partial:
        ...         _ = partial.write_text("whole")
        ...     (Path(folder) / "a.txt").read_text()
        'whole'
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        if not private:
            partial.chmod(0o666 & ~_umask())
        os.replace(partial, path)
        _sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):  # Windows has no such thing, and needs none
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
