"""The compiled transform makes numpy's bits, or is not used."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from dptorch.noise import GaussianNoise, compiled
from dptorch.noise.compiled import SWITCH, compiled_transform
from dptorch.noise.normal import to_float32
from dptorch.randomness import RootKey
from dptorch.release import ClippedSum

needs_compiler = pytest.mark.skipif(
    shutil.which("cc") is None and shutil.which("gcc") is None, reason="no C compiler here"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of the test's own, and a library that is looked for again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(SWITCH, raising=False)
    compiled_transform.cache_clear()
    yield tmp_path / "dptorch"
    compiled_transform.cache_clear()


def libraries(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.so")) if cache.exists() else []


@needs_compiler
def test_compiled_bits_are_numpy_bits() -> None:
    transform = compiled_transform()
    assert transform is not None
    generator = np.random.default_rng(3)
    for size in (1, 7, 8, 1000, 2**18):
        bits = generator.integers(-(2**31), 2**31, (3, size), np.int32)
        bits[0, : size // 2] >>= generator.integers(0, 32, size // 2, np.int32)
        expected, found = np.empty((2, size), np.float32), np.empty((2, size), np.float32)
        to_float32(bits, expected)
        transform(bits, found)
        assert (expected.view(np.int32) == found.view(np.int32)).all()


@needs_compiler
def test_noise_is_the_same_with_and_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def noise() -> torch.Tensor:
        sums = ClippedSum({"w": torch.zeros(500_000)}, 1.0)
        return GaussianNoise(1.3).privatize(sums, RootKey.from_seed(1), 4).values["w"]

    with_compiler = noise()
    assert compiled_transform() is not None
    monkeypatch.setenv(SWITCH, "0")
    compiled_transform.cache_clear()
    assert compiled_transform() is None
    assert torch.equal(with_compiler, noise())


@needs_compiler
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("0x1p-64f", "0.0f"),  # numbers that are zero
        ("float v = (float)(high[i] ^ sign)", "float v = (float)(high[i] & 0x7fffffff)"),
        ("? -v : f", "? f : f"),  # small radii rounded
        ("<< 1) & INT32_MIN", "<< 2) & INT32_MIN"),
        ("float w = y * y;", "float w = y * y * 1.0000001f;"),
    ],
)
def test_code_that_makes_other_bits_is_not_used(
    monkeypatch: pytest.MonkeyPatch, right: str, wrong: str
) -> None:
    read = Path.read_bytes

    def changed(path: Path) -> bytes:
        source = read(path)
        assert right.encode() in source
        return source.replace(right.encode(), wrong.encode())

    monkeypatch.setattr(type(compiled.SOURCE), "read_bytes", changed)
    assert compiled_transform() is None


@needs_compiler
def test_it_is_compiled_once(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiled_transform() is not None
    [library] = libraries(own_cache)
    assert own_cache.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("PATH", "")
    compiled_transform.cache_clear()
    assert compiled_transform() is not None
    assert libraries(own_cache) == [library]


@needs_compiler
def test_a_library_that_was_cut_short_is_made_again(own_cache: Path) -> None:
    assert compiled_transform() is not None
    [library] = libraries(own_cache)
    whole = library.read_bytes()
    library.unlink()  # it is mapped: writing into it would change what runs
    library.write_bytes(whole[:100])
    compiled_transform.cache_clear()
    assert compiled_transform() is not None
    assert libraries(own_cache)[0].stat().st_size == len(whole)


@needs_compiler
def test_a_folder_that_others_can_write_is_not_trusted(own_cache: Path) -> None:
    own_cache.mkdir()
    own_cache.chmod(0o777)
    assert compiled_transform() is not None
    assert libraries(own_cache) == []


@pytest.mark.parametrize("problem", ["no compiler", "broken compiler", "switched off"])
def test_without_a_compiler_numpy_does_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    fake = tmp_path / "bin"
    fake.mkdir()
    if problem == "broken compiler":
        (fake / "cc").write_text("#!/bin/sh\nexit 1\n")
        (fake / "cc").chmod(0o755)
    if problem == "switched off":
        monkeypatch.setenv(SWITCH, "0")
    else:
        monkeypatch.setenv("PATH", f"{fake}{os.pathsep}/nowhere")
    assert compiled_transform() is None
