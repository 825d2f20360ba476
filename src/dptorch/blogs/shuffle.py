"""The mechanism of DP-BloGS: clip each tensor of a batch gradient and permute its blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from dptorch.errors import PrivacyError
from dptorch.randomness import RootKey

__all__ = ["BlockShuffle"]

PURPOSE: Final = "block shuffle"


class BlockShuffle:
    """Clips each tensor to a norm, then puts its blocks into a uniformly random order, in place.

    A tensor of n elements, in their logical order whatever its memory layout, is cut into
    ``n // block_size`` blocks and a shorter block of the remainder, which is permuted with them,
    whole. It protects nothing: norm, sum, every block and the multiset of values stay.

    The permutations of a step come from numpy's Philox under the first 128 bits of
    ``key.derive("block shuffle", step)``; on other devices from the device's generator, seeded from
    it.

    Args:
        block_sizes: name of a tensor -> block size; at most half the tensor is used.
        clip_value: largest L2 norm C of each tensor.
        key: where the permutations come from.

    Guarantees:
        - The multiset of a tensor's blocks after `apply` is that of the clipped tensor before, up to
          the rounding of the clip factor; where the norm is within `clip_value`, bit for bit.
        - Permutations depend on (key, step, block sizes, tensor order) alone.
        - Either all tensors of a call are shuffled or, when it raises, none.
        Held by `test_every_block_survives_whole`,
        `test_the_same_seed_and_step_repeat_and_the_operating_system_does_not` and
        `test_nothing_is_changed_when_one_gradient_is_bad`.

    Example:
        >>> shuffle = BlockShuffle({"w": 2}, clip_value=100.0, key=RootKey.from_seed(1))
        >>> gradient = torch.arange(7.0)
        >>> shuffle.apply({"w": gradient}, step=0)
        >>> sorted(gradient.tolist())
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    """

    def __init__(self, block_sizes: Mapping[str, int], clip_value: float, key: RootKey) -> None:
        self.block_sizes = dict(block_sizes)
        self.clip_value = clip_value
        self.key = key
        self._scratch: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @torch.no_grad()
    def apply(self, gradients: Mapping[str, Tensor], step: int) -> None:
        """Clip and shuffle `gradients` in place.

        Args:
            gradients: name -> dense tensor.
            step: number of the step, which chooses the permutations.

        Raises:
            PrivacyError: a gradient is sparse or not finite. Nothing was changed.
        """
        for name, g in gradients.items():
            if g.layout is not torch.strided:
                raise PrivacyError(
                    f"the gradient of '{name}' is sparse: which rows it holds names the tokens of "
                    "the batch, and a shuffle of its values leaves that. Build the layer with "
                    "sparse=False."
                )
        norms = {n: torch.linalg.vector_norm(g, dtype=_norm_dtype(g)) for n, g in gradients.items()}
        self._refuse_nonfinite(norms)
        seed = int.from_bytes(self.key.derive(PURPOSE, step)[:16], "little")
        source = _Permutations(np.random.Generator(np.random.Philox(key=seed)))
        for name, g in gradients.items():
            # Written as a minimum so that a gradient within the bound is multiplied by exactly 1.
            factor = (self.clip_value / norms[name]).clamp(max=1.0).to(g.dtype)
            self._shuffle(g, self.block_sizes[name], factor, source)

    @staticmethod
    def _refuse_nonfinite(norms: Mapping[str, Tensor]) -> None:
        finite = [bool(ok) for ok in map(torch.isfinite, norms.values())]
        if not all(finite):
            name = list(norms)[finite.index(False)]
            raise PrivacyError(
                f"the gradient of '{name}' is not finite, so the step was not taken. Call "
                "zero_grad() and continue with the next batch. If it recurs, lower the learning rate "
                "or look for the records that cause it."
            )

    def _shuffle(self, g: Tensor, block_size: int, factor: Tensor, source: _Permutations) -> None:
        n = g.numel()
        size = max(1, min(block_size, n // 2))
        flat = g.view(-1) if g.is_contiguous() else g.reshape(-1)
        mixed = self._buffer(g)[:n]
        blocks, rest = divmod(n, size)
        order = source.draw(blocks, g.device)
        if rest:
            # A uniform place for the short block among the long ones, which are in uniform order.
            before = source.place(blocks)
            cut = before * size
            whole = flat[: n - rest].view(blocks, size)
            torch.index_select(whole, 0, order[:before], out=mixed[:cut].view(before, size))
            mixed[cut : cut + rest] = flat[n - rest :]
            after = mixed[cut + rest :].view(blocks - before, size)
            torch.index_select(whole, 0, order[before:], out=after)
        elif size == 1:  # the same, in one dimension, where index_select is several times as fast
            torch.index_select(flat, 0, order, out=mixed)
        else:
            torch.index_select(flat.view(blocks, size), 0, order, out=mixed.view(blocks, size))
        torch.mul(mixed.view(g.shape), factor, out=g)

    def _buffer(self, g: Tensor) -> Tensor:
        kind = (g.device, g.dtype)
        if kind not in self._scratch or self._scratch[kind].numel() < g.numel():
            self._scratch[kind] = torch.empty(g.numel(), dtype=g.dtype, device=g.device)
        return self._scratch[kind]


class _Permutations:
    """Uniform permutations, one after the other from one generator."""

    def __init__(self, generator: np.random.Generator) -> None:
        self._generator = generator
        self._on_device: dict[torch.device, torch.Generator] = {}

    def draw(self, n: int, device: torch.device) -> Tensor:
        """A uniform permutation of range(n), int64."""
        if device.type == "cpu":
            return torch.from_numpy(self._generator.permutation(n))
        if device not in self._on_device:
            made = torch.Generator(device)
            made.manual_seed(int(self._generator.integers(2**63)))
            self._on_device[device] = made
        return torch.randperm(n, generator=self._on_device[device], device=device)

    def place(self, n: int) -> int:
        """A uniform integer in [0, n]."""
        return int(self._generator.integers(n + 1))


def _norm_dtype(g: Tensor) -> Any:
    return torch.float64 if g.dtype == torch.float64 else torch.float32
