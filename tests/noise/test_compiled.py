"""The compiled noise and hash make numpy's bits, or are not used."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dptorch.clipping.sums import ClippedSum
from dptorch.errors import ConfigurationError
from dptorch.native import LIMIT, SWITCH, Units, compiler, units
from dptorch.native import threads as team
from dptorch.noise import GaussianNoise
from dptorch.noise.compiled import SOURCES, Compiled, _same_bits, compiled, compiled_for
from dptorch.noise.fingerprint import fingerprint
from dptorch.noise.keystream import Keystream
from dptorch.noise.nh import CHUNK, KEY_WORDS, nh
from dptorch.noise.normal import to_float32
from dptorch.randomness import RootKey
from tests.ledger.processes import spawn, wait

needs_compiler = pytest.mark.skipif(
    shutil.which("cc") is None and shutil.which("gcc") is None, reason="no C compiler here"
)


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder of this file's, so that the right library is compiled once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def looked_for_again(shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a new process, no library is loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(shared_cache))
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.delenv(LIMIT, raising=False)
    compiled.cache_clear()
    yield
    compiled.cache_clear()


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looked_for_again: None) -> Path:
    """A cache folder of the test's own, in which there is no library yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "dptorch"


def libraries(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.so")) if cache.exists() else []


@pytest.mark.slow
@needs_compiler
def test_compiled_bits_are_numpy_bits() -> None:
    library = compiled()
    assert library is not None
    generator = np.random.default_rng(3)
    for size in (1, 7, 8, 1000, 2**18):
        bits = generator.integers(-(2**31), 2**31, (3, size), np.int32)
        bits[0, : size // 2] >>= generator.integers(0, 32, size // 2, np.int32)
        expected, found = np.empty((2, size), np.float32), np.empty((2, size), np.float32)
        to_float32(bits, expected)
        library.transform(bits, found)
        assert (expected.view(np.int32) == found.view(np.int32)).all()


def noisy_sum(divisor: float = 1.0) -> tuple[torch.Tensor, int]:
    """A sum of several parameters after the noise, in one tensor, and its fingerprint."""
    generator = torch.Generator().manual_seed(0)
    values = {
        name: torch.randn(size, generator=generator)
        for name, size in {"a": 300_001, "b": 3, "c": 70_000, "d": 200_000}.items()
    }
    key = RootKey.from_seed(1)
    mark = fingerprint(values, key, 4)
    sums = ClippedSum(values, 1.0, {"a": 1.0, "b": 0.5, "c": 2.0, "d": 0.1})
    noisy = GaussianNoise(1.3).privatize(sums, key, 4, divisor=divisor)
    return torch.cat(list(noisy.values.values())), mark


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("divisor", [1.0, 256.0, 17.3])
@pytest.mark.parametrize("without", ["compiler", "cipher", "threads of torch"])
def test_a_step_is_the_same_without(
    monkeypatch: pytest.MonkeyPatch, without: str, divisor: float
) -> None:
    with_all = noisy_sum(divisor)
    library = compiled()
    assert library is not None
    if without == "compiler":
        monkeypatch.setenv(SWITCH, "0")
        compiled.cache_clear()
        assert compiled() is None
    elif without == "cipher":
        monkeypatch.setattr(library, "has_cipher", False)
    else:
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
        monkeypatch.setattr(team, "_openmp_start", lambda: None)
    again = noisy_sum(divisor)
    assert torch.equal(with_all[0], again[0])
    assert with_all[1] == again[1]


@pytest.mark.slow
@needs_compiler
def test_division_is_that_of_the_undivided_noisy_sum() -> None:
    assert torch.equal(noisy_sum(256.0)[0] * 256.0, noisy_sum()[0])


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("size", [1, 2, 3, CHUNK - 1, CHUNK, CHUNK + 1, 40 * CHUNK + 7])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_compiled_hash_is_numpys(size: int, threads: int) -> None:
    library = compiled()
    assert library is not None
    generator = np.random.default_rng(size)
    words, key = (generator.integers(0, 2**32, n, np.uint32) for n in (size, KEY_WORDS))
    assert (library.nh([words], key, threads) == nh(words, key)).all()


@needs_compiler
def test_a_forked_process_does_not_wait_for_threads_that_it_does_not_have() -> None:
    """GNU's OpenMP would: a fork inherits its notes of threads, and not the threads."""
    library = compiled()
    assert library is not None
    words, key = (np.arange(n, dtype=np.uint32) for n in (CHUNK, KEY_WORDS))
    expected = library.nh([words], key, threads=2)

    def child() -> None:
        assert team._was_forked()
        asked = []
        team._openmp_start = lambda: asked.append(1)  # type: ignore[assignment]
        assert (library.nh([words], key, threads=2) == expected).all()
        assert not asked

    assert wait(spawn(child)) == 0
    assert subprocess.run([sys.executable, "-c", _SAY_WHETHER_FORKED]).returncode == 0


_SAY_WHETHER_FORKED = """
import sys
from dptorch.native.threads import _was_forked
sys.exit(_was_forked())
"""


def test_hash_by_the_definition() -> None:
    """Python's integers, word by word."""
    generator = np.random.default_rng(0)
    words, key = (generator.integers(0, 2**32, n, np.uint32) for n in (CHUNK + 3, KEY_WORDS))
    rows = []
    for chunk in (words[:CHUNK], words[CHUNK:]):
        padded = [int(w) for w in chunk] + [0] * (len(chunk) % 2)
        row = []
        for shift in (0, 2):
            total = 0
            for i in range(0, len(padded), 2):
                left = (padded[i] + int(key[i + shift])) % 2**32
                right = (padded[i + 1] + int(key[i + 1 + shift])) % 2**32
                total += left * right
            row.append(total % 2**64)
        rows.append(row)
    assert nh(words, key).tolist() == rows


@pytest.mark.slow
@needs_compiler
def test_the_cipher_is_aes_256() -> None:
    """FIPS 197's own key, and the keystream of the library that everything else uses."""
    library = compiled()
    if library is None or not library.has_cipher:
        pytest.skip("this processor has no AES instructions; the library's own cipher is used")
    calls = library._library
    for key in (bytes(range(32)), os.urandom(32)):
        cipher = np.zeros(15 * 16 + 16 + 16, np.uint8)  # round keys, a flag, room to align
        at = -cipher.ctypes.data % 16
        has = units(calls)
        calls.expand_key(key, int(has), ctypes.c_void_p(cipher.ctypes.data + at))
        flag = cipher[at + 240 : at + 244].view(np.int32)
        for first in (0, 5 * 32, 2**33 - 32):  # the numbers of the last carry within 64 blocks
            expected = np.empty(16 * 64, np.uint8)
            Keystream(key).read(16 * first, expected)
            for without in (Units(0), Units.AVX512, Units.VAES):  # four blocks at once, two, one
                flag[0] = has & ~without
                found = np.zeros_like(expected)
                calls.keystream(
                    ctypes.c_void_p(cipher.ctypes.data + at),
                    ctypes.c_uint64(first),
                    ctypes.c_void_p(found.ctypes.data),
                    ctypes.c_int64(64),
                )
                assert (found == expected).all()


@pytest.fixture
def quickly_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistakes are mistakes, and files are files, however well the code is optimised."""
    options = ["-O1" if option == "-O3" else option for option in compiler._OPTIONS]
    assert options != list(compiler._OPTIONS)
    monkeypatch.setattr(compiler, "_OPTIONS", options)


@pytest.mark.slow
@needs_compiler
@pytest.mark.usefixtures("quickly_compiled")
def test_right_code_is_used_however_it_was_optimised() -> None:
    assert compiled() is not None


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("0x1p-64f", "0.0f"),  # numbers that are zero
        ("float v = (float)(high[i] ^ sign)", "float v = (float)(high[i] & 0x7fffffff)"),
        ("? -v : f", "? f : f"),  # small radii rounded
        ("<< 1) & INT32_MIN", "<< 2) & INT32_MIN"),
        ("float w = y * y;", "float w = y * y * 1.0000001f;"),
        # of the pass
        ("0xaa", "0xff"),
        ("round < 14", "round < 13"),
        ("(i) << 56", "(i) << 55"),  # numbers of blocks
        ("(2 * block + half) * PAIRS", "(2 * block) * PAIRS"),  # two numbers get one noise
        ("((3 * block + row) * PAIRS + at) / 4", "(row * PAIRS + at) / 4"),  # blocks repeat
        ("noise + (from - place)", "noise"),
        ("to[i] += noise[i] * stddev", "to[i] = to[i]"),
        ("+ noise[i] * stddev) / divisor", "+ noise[i] * stddev / divisor)"),
        ("job->stddevs[key * job->span_count + span]", "job->stddevs[span]"),
        ("key + 1 == job->key_count", "key + 1 <= job->key_count"),  # divided after each
        # of noise that recurs
        ("job->weights + k * job->row_count", "job->weights"),
        ("weights + j, left", "weights + k, left"),
        ("sum, rows + j, at", "sum, rows + k, at"),
        ("- c[i] * w[2]) }", ") }"),
        ("-(a[i] * w[0])", "(a[i] * w[0])"),
        ("memcpy(rows[k] + at", "memcpy(rows[0] + at"),
        ("rows[j] + at, noise", "rows[j], noise"),
        ("row[i] * decay + noise[i]", "(row[i] + noise[i]) * decay"),
        ("memcpy(rows[0] + at", "memcpy(rows[job->row_count - 1] + at"),
        # of the hash
        ("key + 2 * (i + pass)", "key + 2 * i"),
        ("srli_epi64(keyed, 32)", "srli_epi64(keyed, 31)"),
        ("job->key + size - 1", "job->key + size - 2"),
        ("job->chunks[message + 1] <= taken", "job->chunks[message + 1] < taken"),
    ],
)
@pytest.mark.usefixtures("quickly_compiled")
def test_code_that_makes_other_bits_is_not_used(
    monkeypatch: pytest.MonkeyPatch, right: str, wrong: str
) -> None:
    read = Path.read_bytes

    def changed(path: Path) -> bytes:
        return read(path).replace(right.encode(), wrong.encode())

    assert sum(right.encode() in path.read_bytes() for path in SOURCES) == 1
    monkeypatch.setattr(type(SOURCES[0]), "read_bytes", changed)
    assert compiled() is None


@needs_compiler
def test_it_is_loaded_where_it_saves_more_than_that_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a large step at once; for small ones after some, so that two steps do not compile."""
    loaded = object()
    monkeypatch.setattr("dptorch.noise.compiled.compiled", lambda: loaded)
    monkeypatch.setattr("dptorch.noise.compiled._asked_blocks", 0)
    assert compiled_for(4) is loaded
    monkeypatch.setattr("dptorch.noise.compiled._asked_blocks", 0)
    asked = [compiled_for(0) for _ in range(40)]
    assert asked == [None] * 31 + [loaded] * 9


@pytest.mark.slow
@needs_compiler
@pytest.mark.usefixtures("quickly_compiled")
def test_it_is_compiled_once(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiled() is not None
    [library] = libraries(own_cache)
    assert own_cache.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("PATH", "")
    compiled.cache_clear()
    assert compiled() is not None
    assert libraries(own_cache) == [library]


@pytest.mark.slow
@needs_compiler
@pytest.mark.usefixtures("quickly_compiled")
def test_a_library_that_was_cut_short_is_made_again(own_cache: Path) -> None:
    assert compiled() is not None
    [library] = libraries(own_cache)
    whole = library.read_bytes()
    library.unlink()  # it is mapped: writing into it would change what runs
    library.write_bytes(whole[:100])
    compiled.cache_clear()
    assert compiled() is not None
    assert libraries(own_cache)[0].stat().st_size == len(whole)


@pytest.mark.slow
@needs_compiler
@pytest.mark.usefixtures("quickly_compiled")
def test_a_folder_that_others_can_write_is_not_trusted(own_cache: Path) -> None:
    own_cache.mkdir()
    own_cache.chmod(0o777)
    assert compiled() is not None
    assert libraries(own_cache) == []


@pytest.mark.slow
@needs_compiler
@pytest.mark.usefixtures("quickly_compiled")
def test_a_library_that_others_can_write_is_made_again(own_cache: Path) -> None:
    assert compiled() is not None
    [library] = libraries(own_cache)
    assert library.stat().st_mode & 0o777 == 0o700
    library.chmod(0o775)
    compiled.cache_clear()
    assert compiled() is not None
    assert libraries(own_cache)[0].stat().st_mode & 0o777 == 0o700


@pytest.mark.slow
@needs_compiler
@pytest.mark.usefixtures("quickly_compiled")
def test_a_user_without_a_home_compiles_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nowhere)
    assert compiled() is not None


@pytest.mark.parametrize("problem", ["no compiler", "broken compiler", "switched off"])
@pytest.mark.usefixtures("own_cache")
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
    assert compiled() is None


@pytest.mark.slow
@needs_compiler
def test_every_instruction_set_makes_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that this processor has, without one and another of them."""
    library = compiled()
    assert library is not None
    with_all, has = noisy_sum(), units(library._library)
    for names in ("aes", "aes,avx2", "aes,avx512", "aes,avx2,vaes", "aes,avx512,vaes", "avx2"):
        monkeypatch.setenv(LIMIT, names)
        limited = Compiled(library._library, units(library._library))
        assert limited.has_cipher == (Units.AES in has and "aes," in f"{names},")
        assert _same_bits(limited)  # of correlated noise too
        for user in ("gaussian", "fingerprint"):
            monkeypatch.setattr(
                f"dptorch.noise.{user}.compiled_for", lambda blocks, limited=limited: limited
            )
        again = noisy_sum()
        assert torch.equal(with_all[0], again[0])
        assert with_all[1] == again[1]


def test_a_limit_names_instruction_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        def units_found(self) -> int:
            return int(Units.AES | Units.AVX2 | Units.VAES)

    library: Any = Library()
    assert units(library) == Units.AES | Units.AVX2 | Units.VAES
    monkeypatch.setenv(LIMIT, "AES, avx512,")
    assert units(library) == Units.AES
    monkeypatch.setenv(LIMIT, "")
    assert units(library) == Units(0)
    monkeypatch.setenv(LIMIT, "avx5")
    with pytest.raises(ConfigurationError, match="avx2"):
        units(library)
