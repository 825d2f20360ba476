"""What the ledger calls a data set. It must not say anything about the data.

A hash of the data would: whoever guesses a data set, or one record of it, can hash the guess and
compare; and two equal hashes say that nothing was added in between. Keyed with a secret it would
still say the latter. So the fingerprint is either a name that somebody chose, or a random number
drawn once and kept in a small file beside the data. It identifies the data set as an asset, not its
contents: records that come and go stay under one budget, as they should, since most stay.

What follows from that: a copy of the data without its file, or under another name, has an account
of its own, and nobody but you can know that their costs add up.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from pathlib import Path

from dptorch.errors import ConfigurationError, DataError

__all__ = ["beside", "named", "neighbours", "nested", "of_path", "sidecar_of"]

_SUFFIX = ".dptorch-id.json"


def named(name: str) -> str:
    """The fingerprint of a data set with a name. The name is public.

    Raises:
        ConfigurationError: it is empty, long, or has characters that do not print.

    Example:
        >>> named("patients-2026")
        'patients-2026'
    """
    if not isinstance(name, str) or not re.fullmatch(r"\w([\w .:/@+\-]{0,198}[\w.:/@+\-])?", name):
        raise ConfigurationError(
            f"dataset={name!r} cannot name a data set. Expected 1 to 200 letters, digits, spaces and "
            ". : / @ + - _, beginning with a letter or digit and not ending in a space. The name is "
            "public."
        )
    return name


def sidecar_of(data: str | Path) -> Path:
    """Where the fingerprint of a file or folder is kept.

    Example:
        >>> sidecar_of("data/patients.csv").name
        'patients.csv.dptorch-id.json'
    """
    path = Path(data)
    return path.parent / f"{path.name or 'data'}{_SUFFIX}"


def beside(data: str | Path) -> str:
    """The fingerprint of a file or folder: random, drawn once, kept beside it.

    Move and copy the file together with the data.

    Raises:
        DataError: it is not there and cannot be written, or cannot be read.
    """
    sidecar = sidecar_of(Path(data).resolve())
    if not sidecar.exists():
        _draw(sidecar)
    try:
        found = json.loads(sidecar.read_text(encoding="utf-8"))["dataset"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{sidecar}: not the identity of a data set ({error}). Restore it, or name the data set "
            "yourself with --dataset."
        ) from None
    return named(str(found))


def of_path(data: str | Path) -> str | None:
    """The fingerprint that a file or folder has; None where none was drawn, or none can be read."""
    sidecar = sidecar_of(Path(data).resolve())
    return _read(sidecar) if sidecar.exists() else None


def neighbours(data: str | Path) -> dict[str, str]:
    """The fingerprints of other files and folders beside this one, by name.

    The same people may be in several of them: as CSV and as Parquet, in a copy. Nothing but their owner
    can tell.
    """
    path = Path(data).resolve()
    found = _in_folder(path.parent)
    found.pop(path, None)
    return {other.name: name for other, name in found.items()}


def nested(data: str | Path) -> dict[str, str]:
    """The fingerprints of folders that this file or folder is in, and of what is in it, by path.

    Unlike those of neighbours, they have records in common with it: ``data`` and
    ``data/cifar-10-batches-py`` are one data set.
    """
    path = Path(data).resolve()
    found = {folder: name for folder in path.parents if (name := of_path(folder))}
    if path.is_dir():
        found |= _in_folder(path)
    return {str(other): name for other, name in found.items() if other != path}


def _in_folder(folder: Path) -> dict[Path, str]:
    """What of a folder has a fingerprint."""
    found = {}
    for sidecar in sorted(folder.glob(f"*{_SUFFIX}")):
        data = sidecar.with_name(sidecar.name.removesuffix(_SUFFIX))
        if data.exists() and (name := _read(sidecar)) is not None:
            found[data] = name
    return found


def _read(sidecar: Path) -> str | None:
    try:
        return str(json.loads(sidecar.read_text(encoding="utf-8"))["dataset"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _draw(sidecar: Path) -> None:
    partial = sidecar.with_name(f".{sidecar.name}.{secrets.token_hex(4)}")
    content = {
        "dataset": f"id:{secrets.token_hex(16)}",
        "about": "Random identity of the data beside this file, for dptorch's privacy ledger. It says "
        "nothing about the data. Keep the two together.",
    }
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(partial, sidecar)  # of two runs that begin at once, one wins
        except FileExistsError:
            pass
        finally:
            partial.unlink()
    except OSError as error:
        raise DataError(
            f"The data set's identity {sidecar} cannot be written ({error.strerror}). Name the data "
            "set yourself with --dataset NAME (always the same), or use --no-ledger."
        ) from None
