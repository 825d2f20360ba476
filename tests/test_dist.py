"""What is published installs, and works without a compiler."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

import pytest

import dptorch
from tests.dist import build, data_files, tried


@pytest.mark.slow
def test_the_wheel_works_in_an_environment_of_its_own(tmp_path: Path) -> None:
    sdist, wheel = sorted(build(tmp_path), key=lambda file: file.suffix)
    assert (sdist.suffixes[-1], wheel.suffix) == (".gz", ".whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {f"dptorch/{name}" for name in data_files()} <= set(names)
    assert all(name.startswith("dptorch") for name in names)
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
    root = names[0].split("/")[0]
    assert {f"{root}/src/dptorch/{name}" for name in data_files()} <= set(names)
    assert tried(wheel, tmp_path / "trial") == f"dptorch {dptorch.__version__}"
