"""The Gaussian mechanism on a clipped sum.

Dwork & Roth 2014, *The Algorithmic Foundations of Differential Privacy*, appendix A; on the sampled
sums of DP-SGD: Abadi et al. 2016, arXiv:1607.00133.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dptorch.clipping.sums import ClippedSum
from dptorch.errors import ConfigurationError, PrivacyError
from dptorch.noise.compiled import MOST_KEYS, Compiled, Target, compiled, compiled_for
from dptorch.noise.noisy_gradient import NoisyGradient
from dptorch.noise.normal import DEVICE_BLOCK, KEYSTREAM_BLOCK, DeviceNormals, KeystreamNormals
from dptorch.noise.spans import (
    Offsets,
    Piece,
    Span,
    blocks_of,
    by_place,
    pieces_by_block,
    place_spans,
)
from dptorch.randomness import RootKey

__all__ = ["PURPOSE", "Draw", "GaussianNoise", "pass_over"]

PURPOSE: Final = "noise"
DEVICE_PURPOSE: Final = "noise on a device"

_NUMPY_DTYPE: Final[Mapping[torch.dtype, np.dtype[Any]]] = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
}
# Ten standard deviations, and a ten-thousandth of one, are ordinary float32 numbers.
_STDDEV_RANGE: Final = (1e-30, 1e30)
# Below this many blocks a thread costs more than it saves.
_BLOCKS_PER_THREAD: Final = 4


class GaussianNoise:
    """Adds to each coordinate of a clipped sum independent N(0, (noise_multiplier * scale)**2).

    The scale is the sum's `max_norm`, or that of the parameter where the sum gives `scales`.

    Number i of the noise of a step is a function of (key, step, context, i), where i counts the
    coordinates of all parameters in the order of `clipped.values`. On the CPU the numbers come from an
    AES-256 keystream. On other devices they come from the device's own generator under seeds derived
    from the key, which is faster but not cryptographic; `secure_rng=True` makes them on the CPU and
    copies.

    Args:
        noise_multiplier: standard deviation per unit of scale, >= 0. With 0 nothing is added
            and nothing is private.
        secure_rng: cryptographic noise on every device.

    Guarantees:
        - Every coordinate of every parameter gets noise, those that are zero included.
        - The noise is a function of (key, step, context, position, noise_multiplier * scale). Neither
          the number of threads nor how the parameters lie in memory changes it, and the values do so
          through `context` alone: the engine's is a fingerprint of the sum.
        - Noise of different steps, and of different positions, is independent.
        Held by `test_every_coordinate_gets_noise`,
        `test_noise_is_a_function_of_key_step_context_position_and_scale` and
        `test_no_noise_is_used_twice`.

    What it does not protect from: an observer who sees all bits of float32 outputs can exclude some
    inputs (Mironov 2012, CCS); the stated epsilon is that of the ideal, real-valued mechanism.

    Raises:
        ConfigurationError: `noise_multiplier` is negative, not finite or no number.

    Example:
        >>> sums = ClippedSum({"weight": torch.zeros(1000)}, max_norm=0.5)
        >>> noisy = GaussianNoise(2.0).privatize(sums, RootKey.from_seed(0), step=0)
        >>> noisy.stddev, bool(abs(noisy.values["weight"].std() - 1.0) < 0.1)
        ({'weight': 1.0}, True)
    """

    def __init__(self, noise_multiplier: float, *, secure_rng: bool = False) -> None:
        if isinstance(noise_multiplier, bool) or not isinstance(
            noise_multiplier, int | float | np.number
        ):
            raise ConfigurationError(
                f"noise_multiplier={noise_multiplier!r} must be a number >= 0."
            )
        value = float(noise_multiplier)
        if not math.isfinite(value) or value < 0.0:
            raise ConfigurationError(
                f"noise_multiplier={noise_multiplier!r} must be finite and >= 0: the standard "
                "deviation of the noise in units of the clipping norm, for example 1.0."
            )
        self.noise_multiplier = value
        self.secure_rng = bool(secure_rng)

    def privatize(
        self,
        clipped: ClippedSum,
        key: RootKey,
        step: int,
        *,
        context: int = 0,
        offsets: Offsets | None = None,
        divisor: float = 1.0,
    ) -> NoisyGradient:
        """Add the noise of `step` to the sum, and divide.

        Takes the sum over: the noise is written into the tensors of `clipped.values`, which the
        result shares, so that no sum without noise remains. Call it once per logical batch. Steps
        must not repeat under one key: two sums with the same noise differ by nothing but data.

        Args:
            clipped: the sum; float32 or float64 tensors, each in memory of its own.
            key: root key of the run.
            step: number of the logical batch, in [0, 2**64).
            context: a fingerprint of what the noise is for, in [0, 2**64). The same key and step
                give other noise in another context, so that a step that is taken again on other
                data, after going back to a checkpoint, does not repeat its noise.
            offsets: parameter name -> the place of its first coordinate among those of the whole
                gradient (or its `dptorch.noise.spans.Columns`), for a process that holds a part of
                it: the parts then get the noise that the whole would. By default `clipped` is the
                whole.
            divisor: a public number > 0, such as the expected batch size; in the same pass over
                memory as the noise.

        Returns:
            the noisy sum over `divisor`, ``stddev[n] = noise_multiplier * clipped.scale(n) / divisor``.

        Raises:
            TypeError: `clipped` is not a `ClippedSum`.
            ConfigurationError: `offsets` are not one place >= 0 for each parameter, or `divisor` is not
                finite and positive.
            PrivacyError: two parameters would get the same noise, by `offsets` that overlap;
                the sum has no finite positive `max_norm`, its `scales` are not one finite
                positive number for each parameter, or a tensor is of low precision, sparse or
                shares memory. No tensor has been changed then.
        """
        # All checks come first: a sum refused half way would have noise in some parameters only.
        stddevs, spans = self.prepared(clipped, key, offsets, divisor)
        with torch.no_grad():
            self.add(spans, key, [Draw(step, context)], divisor)
        return divided(clipped, clipped.values, stddevs, divisor)

    def prepared(
        self,
        clipped: ClippedSum,
        key: RootKey,
        offsets: Offsets | None,
        divisor: float,
    ) -> tuple[dict[str, float], list[Span]]:
        """Check what `privatize` was given: standard deviation of each parameter, and its place.

        Raises:
            as `privatize` does. No tensor has been changed then.
        """
        if not isinstance(clipped, ClippedSum):
            raise TypeError(
                f"noise is added to a ClippedSum, not to a {type(clipped).__name__}: without a "
                "bound on one example's contribution no amount of noise is private. Clip first: "
                "dptorch.clipping and the engine return a ClippedSum."
            )
        if not isinstance(key, RootKey):
            raise TypeError(
                f"key must be a RootKey, not {type(key).__name__}. Use RootKey.from_os()."
            )
        check_divisor(divisor)
        stddevs = self._stddevs(clipped)
        _check_tensors(clipped.values)
        return stddevs, place_spans(clipped.values, stddevs, offsets)

    def _stddevs(self, clipped: ClippedSum) -> dict[str, float]:
        _refuse_no_scale("max_norm", clipped.max_norm)
        scales = clipped.scales
        if scales is not None and set(scales) != set(clipped.values):
            odd = sorted(set(scales) ^ set(clipped.values))
            raise PrivacyError(
                f"scales and values of the clipped sum differ in {odd[0]!r}: each parameter needs "
                "one scale, or its noise would be arbitrary."
            )
        for name in scales or ():
            _refuse_no_scale(f"scales[{name!r}]", clipped.scale(name))
        stddevs = {name: self.noise_multiplier * clipped.scale(name) for name in clipped.values}
        low, high = _STDDEV_RANGE
        # 0 is meant: noise_multiplier=0 adds nothing. Another number that float32 rounds to 0 is not:
        # the sum would have no noise, and nobody would be told.
        for name, stddev in stddevs.items():
            if stddev and not low <= stddev <= high:
                raise PrivacyError(
                    f"the standard deviation {stddev} of the noise of {name!r} is out of float32's "
                    f"reach. Choose max_norm so that it lies in [{low}, {high}]."
                )
        return stddevs

    def add(self, spans: list[Span], key: RootKey, draws: Sequence[Draw], divisor: float) -> None:
        """Add the noise of `draws` to `spans`, one after the other, and divide."""
        for (device, dtype), group in by_place(spans).items():
            if self.noise_multiplier == 0.0:  # runs without privacy need no keystream
                _divide(group, divisor)
            elif device.type == "cpu":
                keys = {key.derive(PURPOSE, d.step, d.context): d.factor for d in draws}
                _add_on_cpu(group, keys, _NUMPY_DTYPE[dtype], divisor)
            else:
                for draw in draws:
                    scaled = _scaled(group, draw.factor)
                    # Correlated noise is drawn again on later steps: both branches are functions of
                    # key, step and context, and keep no generator between steps.
                    if self.secure_rng:
                        of_step = key.derive(PURPOSE, draw.step, draw.context)
                        _add_from_cpu(scaled, of_step, dtype, device)
                    else:
                        _add_on_device(scaled, key, (draw.step, draw.context), device, dtype)
                _divide(group, divisor)
            # A span whose memory is not contiguous is a copy until here.
            for span in group:
                span.write_back()

    def __repr__(self) -> str:
        return (
            f"GaussianNoise(noise_multiplier={self.noise_multiplier}, secure_rng={self.secure_rng})"
        )


@dataclass(frozen=True)
class Draw:
    """The white noise of a step, for what it is drawn for, times a factor."""

    step: int
    context: int
    factor: float = 1.0


def pass_over(spans: list[Span]) -> tuple[Compiled | None, list[int], int]:
    """What compiled code makes one pass over spans in memory with, if it can and is worth it.

    Returns:
        the library or None, the numbers of the blocks that the spans need, and a number of threads.
    """
    numbers = blocks_of(spans, KEYSTREAM_BLOCK)
    threads = max(1, min(torch.get_num_threads(), len(numbers) // _BLOCKS_PER_THREAD))
    takes = spans[0].flat.dtype == torch.float32
    return compiled_for(len(numbers)) if takes else None, numbers, threads


def _add_on_cpu(
    spans: list[Span], keys: Mapping[bytes, float], dtype: np.dtype[Any], divisor: float
) -> None:
    library, numbers, threads = pass_over(spans)
    if library is not None and library.has_cipher:
        targets = [Target(s.flat.numpy(), s.start, s.stop, s.stddev) for s in spans]
        together = list(keys.items())
        for at in range(0, len(together), MOST_KEYS):
            # The sum is divided once, after all noise: noise of a later pass would count too much.
            last = at + MOST_KEYS >= len(together)
            some = dict(together[at : at + MOST_KEYS])
            library.add_noise(some, numbers, targets, divisor if last else 1.0, threads)
        return
    for key, factor in keys.items():
        _add_by_numpy(_scaled(spans, factor), key, dtype, library, threads)
    _divide(spans, divisor)


def _add_by_numpy(
    spans: list[Span], key: bytes, dtype: np.dtype[Any], library: Compiled | None, threads: int
) -> None:
    blocks = list(pieces_by_block(spans, KEYSTREAM_BLOCK))
    transform = None if library is None else library.transform
    flats: dict[int, NDArray[Any]] = {span.start: span.flat.numpy() for span in spans}

    def work(mine: list[tuple[int, list[Piece]]]) -> None:
        normals = KeystreamNormals(key, dtype, transform)
        for index, pieces in mine:
            block = normals.block(index)
            for piece in pieces:
                part = flats[piece.span.start][piece.in_span : piece.in_span + piece.size]
                noise = block[piece.in_block : piece.in_block + piece.size]
                np.multiply(noise, piece.span.stddev, out=noise)
                np.add(part, noise, out=part)

    if threads == 1:
        work(blocks)
        return
    # Each thread has a generator of its own, and whole blocks: a block is the unit of the keystream, so
    # the numbers do not depend on how many threads there are.
    cuts = [len(blocks) * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads, thread_name_prefix="dptorch-noise") as pool:
        # list, so that an error in a thread is raised here.
        list(pool.map(work, (blocks[a:b] for a, b in itertools.pairwise(cuts))))


def _scaled(spans: list[Span], factor: float) -> list[Span]:
    return [replace(span, stddev=span.stddev * factor) for span in spans]


def _add_from_cpu(spans: list[Span], key: bytes, dtype: torch.dtype, device: torch.device) -> None:
    library = compiled()
    normals = KeystreamNormals(
        key, _NUMPY_DTYPE[dtype], None if library is None else library.transform
    )
    # One block at a time, so that what is copied to the device stays small beside the gradient.
    for index, pieces in pieces_by_block(spans, KEYSTREAM_BLOCK):
        _add_pieces(pieces, torch.from_numpy(normals.block(index)).to(device))


def _divide(spans: list[Span], divisor: float) -> None:
    if divisor != 1.0:
        for span in spans:
            span.flat.div_(divisor)


def _add_on_device(
    spans: list[Span],
    key: RootKey,
    place: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    # Numbers of two types take different words of one seed's stream: they may not share a seed.
    purpose = DEVICE_PURPOSE if dtype == torch.float32 else f"{DEVICE_PURPOSE}, {dtype}"

    def seed_of(block: int) -> int:
        return int.from_bytes(key.derive(purpose, *place, block)[:8], "little")

    normals = DeviceNormals(seed_of, device, dtype)
    for index, pieces in pieces_by_block(spans, DEVICE_BLOCK):
        _add_pieces(pieces, normals.block(index))


def _add_pieces(pieces: list[Piece], block: Tensor) -> None:
    for piece in pieces:
        part = piece.span.flat[piece.in_span : piece.in_span + piece.size]
        noise = block[piece.in_block : piece.in_block + piece.size]
        part.add_(noise, alpha=piece.span.stddev)


def check_divisor(divisor: float) -> None:
    """Raise unless a sum can be divided by `divisor`."""
    if not math.isfinite(divisor) or divisor <= 0.0:
        raise ConfigurationError(f"divisor={divisor!r} must be a finite number above 0.")


def divided(
    clipped: ClippedSum,
    values: Mapping[str, Tensor],
    stddevs: Mapping[str, float],
    divisor: float,
) -> NoisyGradient:
    """The noisy sum `values`, which has been divided, with its numbers in the same units."""
    return NoisyGradient(
        dict(values),
        {name: stddev / divisor for name, stddev in stddevs.items()},
        float(clipped.max_norm) / divisor,
    )


def _refuse_no_scale(name: str, value: float) -> None:
    if not math.isfinite(value) or value <= 0.0:
        raise PrivacyError(
            f"{name}={value!r} of the clipped sum must be finite and positive: it is the scale of "
            "the noise."
        )


def _check_tensors(values: Mapping[str, Tensor]) -> None:
    """Refuse, before anything is written, what cannot get noise once in every coordinate."""
    # Two parameters on one memory would get the noise twice, and one example would move it twice.
    seen: dict[tuple[torch.device, int], str] = {}
    for name, tensor in values.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"the clipped sum of {name!r} is a {type(tensor).__name__}, not a tensor."
            )
        if tensor.dtype not in _NUMPY_DTYPE:
            raise PrivacyError(
                f"the clipped sum of {name!r} is {tensor.dtype}: its rounding breaks the bound on "
                "one example and swallows noise. Sum in float32 (or float64), and cast after the "
                "noise is added."
            )
        if tensor.layout != torch.strided:
            raise PrivacyError(
                f"the clipped sum of {name!r} is {tensor.layout}: where it has no entries it would "
                "get no noise, which tells what the batch touched. Make it dense first: "
                ".to_dense()."
            )
        if not tensor.numel():
            continue
        where = (tensor.device, tensor.data_ptr())
        overlaps = any(n > 1 and s == 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        if overlaps or where in seen:
            other = "itself" if overlaps else repr(seen[where])
            raise PrivacyError(
                f"the clipped sum of {name!r} shares memory with {other}, so it would get noise "
                "more than once. Give each parameter a tensor of its own; a tied parameter appears "
                "once."
            )
        seen[where] = name
