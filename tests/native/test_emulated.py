"""Every path of the C sources on any processor: compiled with its vector instructions in plain C.

`tests/noise/test_compiled.py` and `tests/tape/gradients/test_gram.py` run the paths that the processor
has. Here `emulated.h` stands in for the processor, so that those are run that it lacks. What the
compiler makes of loops without such instructions is no part of it.
"""

from __future__ import annotations

import ctypes
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch

from dptorch.native import HEADER, Units, build
from dptorch.noise.compiled import SOURCES, Compiled, _constants, _same_bits
from dptorch.tape.gradients import norm_sums
from dptorch.tape.gradients.gram_native import SOURCE, GramLibrary, _agrees, gram_library

EMULATED = Path(__file__).with_name("emulated.h")
ALL = Units.AES | Units.AVX2 | Units.AVX512 | Units.VAES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("cc") is None and shutil.which("gcc") is None, reason="no C compiler here"
    ),
]


def without_instructions(text: str) -> str:
    """A C source that names no instruction of a processor."""
    text = re.sub(r'__attribute__\(\(target\("[^"]*"\)\)\)', "", text)
    text = re.sub(
        r"(?s)#if defined\(__x86_64__\)\n#include <cpuid.h>.*?#else",
        f'#if 1\n#include "{EMULATED.name}"\n'
        f"static inline int units_of_the_processor(void) {{ return {int(ALL)}; }}\n#else",
        text,
    )
    text = text.replace("defined(__x86_64__)", "1")
    assert not re.search(r"target\(|immintrin|cpuid|x86", text)
    return text


def emulated(
    folder: Path, sources: Sequence[Path], constants: Mapping[str, str], change: tuple[str, str]
) -> ctypes.CDLL:
    """The library of `sources`, all instruction sets emulated, with `change` made to their text."""
    files = [EMULATED]
    for source in sources:
        files.append(folder / source.name)
        files[-1].write_text(without_instructions(source.read_text()).replace(*change))
    library = build(
        "emulated", files, constants, "-O1", "-ffp-contract=off", "-fno-strict-aliasing"
    )
    assert library is not None, "the emulated sources do not compile"
    return library


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("DPTORCH_COMPILE", raising=False)
        patch.delenv("DPTORCH_CPU", raising=False)
        yield


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return emulated(tmp_path_factory.mktemp("noise"), SOURCES, _constants(), ("", ""))


@pytest.fixture(scope="module")
def gram(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return emulated(tmp_path_factory.mktemp("gram"), [HEADER, SOURCE], {}, ("", ""))


def named(sets: str) -> Units:
    units = Units(0)
    for name in filter(None, sets.split(",")):
        units |= Units[name.upper()]
    return units


@pytest.mark.parametrize(
    "sets", ["", "avx2", "avx512", "aes", "aes,avx2", "aes,avx2,vaes", "aes,avx512,avx2,vaes"]
)
def test_noise_and_hash_of_every_processor_have_numpys_bits(noise: ctypes.CDLL, sets: str) -> None:
    """With the keystream one block at a time, two, four; without AES the noise is numpy's."""
    assert _same_bits(Compiled(noise, named(sets)))


@pytest.mark.parametrize("sets", ["avx2", "avx2,avx512"])
def test_gram_norms_of_every_processor_are_those_of_formed_gradients(
    gram: ctypes.CDLL, sets: str
) -> None:
    assert _agrees(GramLibrary(gram, named(sets)))


@pytest.mark.parametrize("sets", ["avx2", "avx2,avx512"])
def test_what_is_emulated_is_what_the_processor_does(gram: ctypes.CDLL, sets: str) -> None:
    """To the bit, though sums of floating-point numbers depend on their order."""
    gram_library.cache_clear()
    real = gram_library()
    if real is None or named(sets) not in real.units:
        pytest.skip(f"this processor lacks {sets}: the emulation is all that is tested")
    torch.manual_seed(0)
    left, right = torch.randn(2, 21, 40), torch.randn(2, 21, 1100)
    expected = real.limited(named(sets)).norms(left, right, 1)
    found = GramLibrary(gram, named(sets)).norms(left, right, 1)
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("right", "wrong", "seen", "unseen"),
    [
        # The second block of each pair, one of four, a keystream without VAES.
        ("PLACE(2 * i + 1), 0", "PLACE(2 * i), 0", "aes,avx2,vaes", "aes,avx2"),
        ("PLACE(4 * i + 3), 0", "PLACE(4 * i), 0", "aes,avx512,vaes", "aes,avx2,vaes"),
        ("_mm_set_epi64x(PLACE(i), 0)", "_mm_set_epi64x(0, 0)", "aes", "aes,avx2,vaes"),
        ("_mm512_srli_epi64(keyed, 32)", "_mm512_srli_epi64(keyed, 31)", "avx512", "avx2"),
    ],
)
def test_a_path_that_errs_is_seen_on_any_processor(
    tmp_path: Path, right: str, wrong: str, seen: str, unseen: str
) -> None:
    assert sum(right in source.read_text() for source in SOURCES) == 1
    library = emulated(tmp_path, SOURCES, _constants(), (right, wrong))
    assert not _same_bits(Compiled(library, named(seen)))
    assert _same_bits(Compiled(library, named(unseen)))


@pytest.mark.parametrize(
    ("right", "wrong", "seen", "unseen"),
    [
        ("_mm256_hadd_ps(c, d)", "_mm256_hadd_ps(d, c)", "avx2", "avx2,avx512"),
        ("_MM_SHUFFLE(2, 3, 0, 1)", "_MM_SHUFFLE(3, 2, 1, 0)", "avx2,avx512", "avx2"),
    ],
)
def test_a_gram_norm_that_errs_is_seen_on_any_processor(
    tmp_path: Path, right: str, wrong: str, seen: str, unseen: str
) -> None:
    assert right in SOURCE.read_text()
    library = emulated(tmp_path, [HEADER, SOURCE], {}, (right, wrong))
    assert not _agrees(GramLibrary(library, named(seen)))
    assert _agrees(GramLibrary(library, named(unseen)))


@pytest.mark.parametrize(("right", "wrong"), [("", ""), ("(g2 + g3)", "(g2 + g1)")])
def test_sums_of_a_layer_norm_are_seen_to_agree_or_not(
    tmp_path: Path, right: str, wrong: str
) -> None:
    assert right in norm_sums.SOURCE.read_text()
    library = emulated(tmp_path, [HEADER, norm_sums.SOURCE], {}, (right, wrong))
    assert norm_sums._agrees(norm_sums.NormLibrary(library, ALL)) == (right == wrong)
