"""Noise and hash as machine code: the C sources beside this file.

The machine code is used only if it makes the same bits as numpy does, on inputs that reach all of its
branches.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dptorch.native import HEADER, Units, build, run_in_team, units
from dptorch.noise.nh import CHUNK, KEY_WORDS, nh
from dptorch.noise.normal import (
    KEYSTREAM_BLOCK,
    LOG,
    MINUS_TWICE_LOG_2,
    ROOT_HALF_BITS,
    SINE,
    KeystreamNormals,
    to_float32,
)

__all__ = ["MOST_KEYS", "Compiled", "Memory", "Target", "compiled", "compiled_for"]

#: Keystreams that one pass adds.
MOST_KEYS: Final = 32

SOURCES: Final = (
    HEADER,
    *(
        Path(__file__).with_name(name)
        for name in ("kernels.h", "normal.c", "keystream.c", "add_noise.c", "hash.c")
    ),
)


@dataclass(frozen=True)
class Target:
    """Numbers in memory that get noise, and their place in the sequence of the noise.

    Args:
        values: float32 [n], contiguous; changed in place. None: only the rows of a memory go on.
        start: number of the sequence that the first of them gets.
        stop: the number after that of the last.
        stddev: of its noise.
    """

    values: NDArray[np.float32] | None
    start: int
    stop: int
    stddev: float


@dataclass(frozen=True)
class Memory:
    """What noise that is correlated over steps keeps; see `dptorch.noise.recursive`.

    Args:
        rows: those of each target, float32 [n], contiguous; changed in place.
        weights: what the step takes back of each; and after it, what a later step does, a sum that
            takes the place of row 1, 2, ... and has nothing of the rows before.
        decays: what is left of each; None: the first becomes the step's noise, the others stay.
    """

    rows: Sequence[Sequence[NDArray[np.float32]]]
    weights: Sequence[Sequence[float]]
    decays: Sequence[float] | None


class Compiled:
    """The functions of the compiled library. They release the interpreter lock.

    Args:
        units: instruction sets that it may use.

    Attributes:
        has_cipher: whether the processor has AES instructions, without which `add_noise` is not to
            be called.
    """

    def __init__(self, library: ctypes.CDLL, units: Units) -> None:
        self._library = library
        self._units = units
        library.normals.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64, ctypes.c_int]
        for function in (library.normals, library.add_noise, library.hash_words):
            function.restype = None
        self.has_cipher = Units.AES in units

    def transform(self, bits: NDArray[np.int32], normals: NDArray[np.float32]) -> None:
        """`dptorch.noise.normal.to_float32`."""
        self._library.normals(
            *(row.ctypes.data for row in (*bits, *normals)), bits.shape[1], self._units
        )

    def add_noise(
        self,
        keys: Mapping[bytes, float],
        blocks: Sequence[int],
        targets: Sequence[Target],
        divisor: float,
        threads: int,
        memory: Memory | None = None,
    ) -> None:
        """``values = (values + noise * stddev) / divisor``, with the numbers of `KeystreamNormals`.

        Args:
            keys: of at most `MOST_KEYS` keystreams, and the factor of each one's stddev. Their noise
                is added in their order, and the sum divided then.
            blocks: numbers of all blocks that targets reach into.
            targets: in the order of their places, which are disjoint.
            divisor: one for all.
            threads: how many to use.
            memory: with one key, the noise is what the numbers and the rows give.
        """
        rows = [] if memory is None else [row.ctypes.data for own in memory.rows for row in own]
        # The list holds the arrays until the call has returned: C has no more than their addresses.
        columns: list[NDArray[Any]] = [
            np.array(blocks, np.int64),
            np.array([0 if t.values is None else t.values.ctypes.data for t in targets], np.uintp),
            np.array([t.start for t in targets], np.int64),
            np.array([t.stop for t in targets], np.int64),
            np.array([[t.stddev * f for t in targets] for f in keys.values()], np.float32),
            np.array(rows, np.uintp),
            np.array([[]] if memory is None else memory.weights, np.float32),
            np.array([] if memory is None else memory.decays or [], np.float32),
        ]
        numbers, data, starts, stops, stddevs, kept, weights, decays = (
            c.ctypes.data for c in columns
        )
        job = _Noise(
            b"".join(keys), len(keys), numbers, len(blocks), data, starts, stops, stddevs,
            len(targets), kept, columns[6].shape[-1], columns[6].shape[0], weights,
            decays if columns[7].size else None, divisor, self._units, 0,
        )  # fmt: skip
        run_in_team(self._library.add_noise, job, threads)

    def nh(
        self, messages: Sequence[NDArray[np.uint32]], key: NDArray[np.uint32], threads: int
    ) -> NDArray[np.uint64]:
        """`dptorch.noise.nh.nh` of each message, below one another; messages of no word have none."""
        sizes = np.array([len(m) for m in messages], np.int64)
        chunks = np.concatenate([np.zeros(1, np.int64), np.cumsum(-(-sizes // CHUNK))])
        words = np.array([m.ctypes.data for m in messages], np.uintp)
        sums = np.empty((int(chunks[-1]), 2), np.uint64)
        # Named, so that no array is freed while C reads it.
        arrays: list[NDArray[Any]] = [words, sizes, chunks, key, sums]
        data, counts, firsts, secret, out = (a.ctypes.data for a in arrays)
        job = _Hash(data, counts, firsts, len(messages), secret, out, self._units, 0)
        run_in_team(self._library.hash_words, job, threads)
        return sums


class _Noise(ctypes.Structure):
    """`Noise` of add_noise.c."""

    _fields_ = (
        ("keys", ctypes.c_char_p),
        ("key_count", ctypes.c_int64),
        ("blocks", ctypes.c_void_p),
        ("block_count", ctypes.c_int64),
        ("data", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("stops", ctypes.c_void_p),
        ("stddevs", ctypes.c_void_p),
        ("span_count", ctypes.c_int64),
        ("rows", ctypes.c_void_p),
        ("row_count", ctypes.c_int64),
        ("sum_count", ctypes.c_int64),
        ("weights", ctypes.c_void_p),
        ("decays", ctypes.c_void_p),
        ("divisor", ctypes.c_float),
        ("units", ctypes.c_int32),
        ("next", ctypes.c_int64),
    )


class _Hash(ctypes.Structure):
    """`Hash` of hash.c."""

    _fields_ = (
        ("words", ctypes.c_void_p),
        ("sizes", ctypes.c_void_p),
        ("chunks", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("key", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("units", ctypes.c_int64),
        ("next", ctypes.c_int64),
    )


def compiled_for(blocks: int) -> Compiled | None:
    """The library, if it saves more than its loading costs: for much at once, or little, often.

    Args:
        blocks: how many blocks of numbers are to be made or hashed now.
    """
    global _asked_blocks
    _asked_blocks += max(1, blocks)
    return compiled() if blocks >= _BLOCKS_AT_ONCE or _asked_blocks >= _BLOCKS_IN_ALL else None


# numpy takes a millisecond or two for a block; loading the library 50 ms, compiling it, the first time
# on a machine, a second.
_BLOCKS_AT_ONCE: Final = 4
_BLOCKS_IN_ALL: Final = 32
_asked_blocks = 0


@functools.lru_cache(maxsize=1)
def compiled() -> Compiled | None:
    """The library, or None where there is no compiler or it makes other numbers."""
    # A fused multiply-add rounds once where numpy rounds twice.
    library = build("noise", SOURCES, _constants(), "-ffp-contract=off")
    if library is None:
        return None
    found = Compiled(library, units(library))
    return found if _same_bits(found) else None


def _constants() -> dict[str, str]:
    """Return the constants of the transform, written exactly, and sizes."""
    named = {
        **{f"SINE_{i}": c for i, c in enumerate(SINE)},
        **{f"LOG_{i}": c for i, c in enumerate(LOG, 1)},
        "MINUS_TWICE_LOG_2": MINUS_TWICE_LOG_2,
    }
    exact = {name: f"({float(value).hex()}f)" for name, value in named.items()}
    # In hexadecimal a float32 is written exactly: a compiler rounds no decimal digits.
    return {
        **exact,
        "ROOT_HALF_BITS": hex(ROOT_HALF_BITS),
        "PAIRS": str(KEYSTREAM_BLOCK // 2),
        "CHUNK": str(CHUNK),
        "MOST_KEYS": str(MOST_KEYS),
    }


def _same_bits(library: Compiled) -> bool:
    generator = np.random.default_rng(0)
    return (
        _same_normals(library, generator)
        and _same_hash(library, generator)
        and (not library.has_cipher or _same_noise(library, generator))
    )


def _same_normals(library: Compiled, generator: np.random.Generator) -> bool:
    bits = generator.integers(-(2**31), 2**31, (3, 2**14), np.int32)
    # Numbers of all magnitudes, of both signs, and the edges.
    bits[:, : 2**13] >>= np.arange(2**13, dtype=np.int32) % 32
    bits[:2, 2**12 : 2**13] ^= bits[0, 2**12 : 2**13] >> 31
    bits[:, :4] = (0, -1, 2**31 - 1, -(2**31))
    expected, found = np.empty((2, 2**14), np.float32), np.empty((2, 2**14), np.float32)
    to_float32(bits, expected)
    library.transform(bits, found)
    return _equal(expected, found)


def _same_hash(library: Compiled, generator: np.random.Generator) -> bool:
    key = generator.integers(0, 2**32, KEY_WORDS, np.uint32)
    sizes = (CHUNK + 37, 6, 0, CHUNK, 1)
    messages = [generator.integers(0, 2**32, size, np.uint32) for size in sizes]
    expected = np.concatenate([nh(m, key) for m in messages])
    return _equal(expected, library.nh(messages, key, threads=2))


def _same_noise(library: Compiled, generator: np.random.Generator) -> bool:
    """On targets within a block, across blocks, side by side and apart, with and without division.

    The noise of one key and of two, and with a memory that stays, also for later steps, and one that
    decays.
    """
    # Two keys, one with a factor below 0: earlier noise that a step takes back has one.
    keys = {generator.bytes(32): 1.0, generator.bytes(32): -0.3}
    one, end = dict(list(keys.items())[:1]), 2 * KEYSTREAM_BLOCK
    places = [(3, 50), (50, 700), (40_000, KEYSTREAM_BLOCK + 33), (end - 9, end + 5)]
    values, *rows = (
        [generator.standard_normal(stop - start, np.float32) for start, stop in places]
        for _ in range(8)
    )
    streams = [KeystreamNormals(key, np.dtype(np.float32)) for key in keys]
    noises = [np.concatenate([s.block(i).copy() for i in range(3)]) for s in streams]
    some, all_of_them = rows[:3], rows
    weights = generator.standard_normal((3, len(rows))).tolist()
    for divisor, kept in (
        (1.0, None),
        (7.0, None),
        (7.0, (some, [weights[0][:3]], None)),
        (1.0, (some, [weights[0][:3]], (0.9, 0.99, 0.5))),
        (7.0, (all_of_them, weights, None)),
        (1.0, (all_of_them[:5], [w[:5] for w in weights], None)),
    ):
        used = keys if kept is None else one
        found = [v.copy() for v in values]
        held = [[row[i].copy() for row in kept[0]] if kept else [] for i in range(len(values))]
        targets = [
            Target(v, start, stop, 1.5 + i)
            for i, (v, (start, stop)) in enumerate(zip(found, places, strict=True))
        ]
        memory = None if kept is None else Memory(held, kept[1], kept[2])
        library.add_noise(used, (0, 1, 2), targets, divisor, 2, memory)
        for i, (start, stop) in enumerate(places):
            mine = [row[i].copy() for row in kept[0]] if kept else []
            wanted = values[i].copy()
            for noise, factor in zip(noises, used.values(), strict=False):
                made = noise[start:stop]
                if kept is not None:
                    made = recurred(made, mine, kept[1], kept[2])
                wanted += made * np.float32(targets[i].stddev * factor)
            # Bits, not numbers: the ranks of a run may run different code, and need the same noise.
            if not all(map(_equal, [wanted / np.float32(divisor), *mine], [found[i], *held[i]])):
                return False
    return True


def recurred(
    made: NDArray[np.float32],
    rows: Sequence[NDArray[np.float32]],
    weights: Sequence[Sequence[float]],
    decays: Sequence[float] | None,
) -> NDArray[np.float32]:
    """The noise that `made` and the rows give, which go on to the next step."""
    sums = []
    for k, own in enumerate(weights):
        taken = -(rows[k] * np.float32(own[k]))
        for row, weight in zip(rows[k + 1 :], own[k + 1 :], strict=True):
            taken -= row * np.float32(weight)
        sums.append(taken)
    noise = sums[0] + made
    if decays is None:
        for row, kept in zip(rows, [noise, *sums[1:]], strict=False):
            row[:] = kept
    for row, decay in zip(rows, decays or (), strict=False):
        row[:] = row * np.float32(decay) + noise
    return noise


def _equal(a: NDArray[Any], b: NDArray[Any]) -> bool:
    # By bytes: -0.0 equals 0.0 as a number, and no NaN equals itself.
    return a.tobytes() == b.tobytes()
