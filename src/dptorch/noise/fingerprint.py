"""Fingerprint of a clipped sum. Noise depends on it, so that two sums do not get the same noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch
from cryptography.hazmat.primitives.poly1305 import Poly1305
from torch import Tensor

from dptorch.noise.compiled import compiled_for
from dptorch.noise.keystream import CIPHER_BLOCK, Keystream
from dptorch.noise.nh import CHUNK, KEY_WORDS, nh
from dptorch.noise.normal import KEYSTREAM_BLOCK
from dptorch.randomness import RootKey

__all__ = ["fingerprint"]

_PURPOSE: Final = "fingerprint of a sum"
_NH_PURPOSE: Final = "fingerprint of a sum, first stage"
_DEVICE_PURPOSE: Final = "fingerprint of a sum on a device"
_TAG_PURPOSE: Final = "fingerprint of a sum, last stage"
# Numbers weighed at once on a device: 32 MiB of weights.
_CHUNK: Final = 2**22
# Words from which on a thread saves more than it costs.
_WORDS_PER_THREAD: Final = 16 * CHUNK

_Words = np.ndarray[tuple[int], np.dtype[np.uint32]]


def fingerprint(values: Mapping[str, Tensor], key: RootKey, step: int) -> int:
    """Return 64 bits that are equal for equal sums, and for different sums only by rare accident.

    The noise of a step depends on it: repeating a step on the same data repeats its release, while
    going back to a checkpoint and on with other data does not repeat its noise.

    Args:
        values: the sum, by parameter.
        key: root key; it makes the hash one that nobody can aim at.
        step: number of the logical batch.

    Guarantees:
        Every bit of every number counts. On the CPU, chunks of 64 KiB are hashed by NH, their hashes
        by Poly1305 (Bernstein 2005) and its 128 bits by a keyed BLAKE2b, all under keys of their own
        for each step: two sums of one shape that differ have equal fingerprints with probability
        below 2^-62, from NH and the last stage 2^-64 each. On other devices the first stage is two sums
        of all bits with secret random weights, modulo 2^64, so that nothing but these leaves the
        device; the same bound holds if the device's generator is as good as random. It is the same
        number with and without a C compiler.
        Held by `test_any_change_of_the_sum_changes_its_fingerprint`,
        `test_the_fingerprint_of_other_devices_sees_every_bit` and `test_compiled_hash_is_numpys`.

    Example:
        >>> key, x = RootKey.from_seed(0), torch.zeros(1000)
        >>> first = fingerprint({"w": x}, key, 0)
        >>> x[123] = 1e-30
        >>> fingerprint({"w": x}, key, 0) == first, fingerprint({"w": x * 0}, key, 0) == first
        (False, True)
    """
    tag = Poly1305(key.derive(_PURPOSE, step))
    on_cpu: list[_Words] = []
    for i, value in enumerate(values.values()):
        flat = value.detach().contiguous().view(-1)
        tag.update(flat.numel().to_bytes(8, "little"))
        if flat.device.type == "cpu":
            on_cpu.append(flat.numpy().view("<u4"))
        elif flat.numel():
            seed = int.from_bytes(key.derive(_DEVICE_PURPOSE, step, i)[:8], "little")
            tag.update(_weighed_bits(flat, seed).numpy().tobytes())
    if on_cpu:
        tag.update(_hashed(on_cpu, _nh_key(key.derive(_NH_PURPOSE, step))).tobytes())
    # Not cut short itself: what makes collisions of Poly1305 rare is its whole length.
    whole = tag.finalize()
    halves = (int.from_bytes(half, "little") for half in (whole[:8], whole[8:]))
    return int.from_bytes(key.derive(_TAG_PURPOSE, step, *halves)[:8], "little")


def _nh_key(secret: bytes) -> _Words:
    raw = np.empty(-(-4 * KEY_WORDS // CIPHER_BLOCK) * CIPHER_BLOCK, np.uint8)
    Keystream(secret).read(0, raw)
    return raw.view("<u4")[:KEY_WORDS]


def _hashed(messages: list[_Words], key: _Words) -> np.ndarray[Any, np.dtype[np.uint64]]:
    words = sum(len(m) for m in messages)
    library = compiled_for(words // KEYSTREAM_BLOCK)
    if library is None:
        return np.concatenate([nh(m, key) for m in messages])
    threads = max(1, min(torch.get_num_threads(), words // _WORDS_PER_THREAD))
    return library.nh(messages, key, threads)


def _weighed_bits(flat: Tensor, seed: int) -> Tensor:
    """Two sums of all 32-bit words with random weights, modulo 2^64, of each chunk; int64, on the CPU.

    Of two messages that differ in a word by d, at most 2^31 divides d, and the random weight of that
    word makes each sum equal with probability at most 2^-33, both with 2^-66.
    """
    words = flat.view(torch.int32)
    generator = torch.Generator(flat.device).manual_seed(seed % 2**63)
    sums = []
    for part in words.split(_CHUNK):
        for _ in range(2):
            weights = torch.empty(part.numel(), dtype=torch.int64, device=flat.device)
            weights.random_(-(2**63), None, generator=generator)
            sums.append((part.to(torch.int64) * weights).sum())
    return torch.stack(sums).cpu()
