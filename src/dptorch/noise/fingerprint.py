"""A number that tells one sum from another, so that no two sums ever get the same noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from cryptography.hazmat.primitives.poly1305 import Poly1305
from torch import Tensor

from dptorch.randomness import RootKey

__all__ = ["fingerprint"]

_PURPOSE: Final = "fingerprint of a sum"
# Numbers weighed at once on a device: 32 MiB of weights.
_CHUNK: Final = 2**22


def fingerprint(values: Mapping[str, Tensor], key: RootKey, step: int) -> int:
    """64 bits that are equal for equal sums, and for others only by an unlikely accident.

    The noise of a step depends on it: repeating a step on the same data repeats its release, while
    going back to a checkpoint and on with other data does not repeat its noise.

    Args:
        values: the sum, by parameter.
        key: root key; it makes the hash one that nobody can aim at.
        step: number of the logical batch.

    Guarantees:
        Every bit of every number counts. On the CPU the hash is Poly1305 (Bernstein 2005) under a key
        of its own for each step: two sums that differ have equal fingerprints with probability below
        2^-60 for up to 2^28 numbers. On other devices it is a sum of all numbers' bits with secret
        random weights, modulo 2^64, so that nothing but that sum leaves the device.

    Example:
        >>> key, x = RootKey.from_seed(0), torch.zeros(1000)
        >>> first = fingerprint({"w": x}, key, 0)
        >>> x[123] = 1e-30
        >>> fingerprint({"w": x}, key, 0) == first, fingerprint({"w": x * 0}, key, 0) == first
        (False, True)
    """
    secret = key.derive(_PURPOSE, step)
    tag = Poly1305(secret)
    for i, value in enumerate(values.values()):
        flat = value.detach().contiguous().view(-1)
        if not flat.numel():
            continue
        if flat.device.type != "cpu":
            flat = _weighed_bits(flat, int.from_bytes(key.derive(_PURPOSE, step, i)[:8], "little"))
        tag.update(flat.numpy().data.cast("B"))
    return int.from_bytes(tag.finalize()[:8], "big")


def _weighed_bits(flat: Tensor, seed: int) -> Tensor:
    """All numbers' bits, with random weights, added up chunk by chunk; int64, on the CPU."""
    bits = flat.view(torch.int64 if flat.element_size() == 8 else torch.int32)
    generator = torch.Generator(flat.device).manual_seed(seed % 2**63)
    sums = []
    for part in bits.split(_CHUNK):
        weights = torch.empty(part.numel(), dtype=torch.int64, device=flat.device)
        weights.random_(-(2**63), None, generator=generator)
        sums.append((part.to(torch.int64) * weights.bitwise_or_(1)).sum())
    return torch.stack(sums).cpu()
