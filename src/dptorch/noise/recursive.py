"""Noise that each step makes of white noise of its own and of rows that it keeps of earlier steps.

With rows r_j, of each coordinate its own, weights a_j and white noise z_t

    w_t = z_t - a_1 r_1 - a_2 r_2 - ...        noise of step t: σ · scale · d_t · w_t

and then either w_t takes the place of the first row (`noise.banded`), or each becomes θ_j r_j + w_t
(`noise.buffered`). On the CPU one compiled pass over the sum does all of it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from dptorch.clipping.sums import ClippedSum
from dptorch.noise.compiled import Memory, Target
from dptorch.noise.gaussian import PURPOSE, Draw, GaussianNoise, divided, pass_over
from dptorch.noise.noisy_gradient import NoisyGradient
from dptorch.noise.normal import DEVICE_BLOCK, KEYSTREAM_BLOCK
from dptorch.noise.released import CorrelatedNoise
from dptorch.noise.spans import Offsets, Span, by_place
from dptorch.randomness import RootKey

__all__ = ["RecursiveNoise", "Taps"]

_NOT_KNOWN: Final = -1


@dataclass(frozen=True)
class Taps:
    """How a step's noise follows from the rows, and what becomes of them.

    Attributes:
        rows: numbers of the rows, in the order in which they are taken back.
        weights: of each for this step; and of each for later ones, whose sums, less than nothing as
            they are taken back, take the places of row 1, 2, ... of `rows`. Sum k has nothing of the
            rows before k.
        decays: what is left of each; None: w takes the place of the first, and the others stay.
    """

    rows: tuple[int, ...]
    weights: tuple[tuple[float, ...], ...]
    decays: tuple[float, ...] | None = None


class RecursiveNoise(CorrelatedNoise):
    """Base of the mechanisms with rows; see `BandedNoise` and `BufferedNoise`.

    Args:
        noise_multiplier: σ.
        steps: number of steps of the run.
        stddevs: of each step's d_t w_t, for z of variance 1.
        columns: d_t of each step.
        secure_rng: as of `GaussianNoise`.
    """

    def __init__(
        self, noise_multiplier: float, steps: int, stddevs: Any, columns: Any, *, secure_rng: bool
    ) -> None:
        super().__init__(noise_multiplier, steps, secure_rng=secure_rng)
        # Of z alone: the rows hold w, which σ and the scales multiply where it is released.
        self._white = GaussianNoise(1.0, secure_rng=secure_rng)
        self._stddevs, self._columns = stddevs, columns
        self._buffers: dict[int, Tensor] = {}  # start of a span -> [rows, coordinates]
        self._filled = 0  # steps that the rows have

    @property
    @abstractmethod
    def rows(self) -> int:
        """How many numbers are kept of each coordinate."""

    @abstractmethod
    def taps(self, step: int) -> Taps:
        """What `step` does with the rows."""

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
        """Add the noise of `step` to the sum, and divide; arguments as of `GaussianNoise.privatize`.

        Steps come in order. One that was left out, because it failed, has no noise that later steps
        take back.

        Raises:
            as `GaussianNoise.privatize`, and
            PrivacyError: the step was taken already, is past the run, or the run went on from a state
                that was made on another device.
        """
        stddevs, spans = self._gaussian.prepared(clipped, key, offsets, divisor)
        self._released.check(step)
        # Nothing to take back: it is independent noise, bit for bit.
        if not self.rows or not self.noise_multiplier:
            self._released.record(step, context)
            return self._gaussian.privatize(
                clipped, key, step, context=context, offsets=offsets, divisor=divisor
            )
        with torch.no_grad():
            pairs = self._go_to(step, spans, key)
            self._filled = _NOT_KNOWN  # until all is well
            self._advance(step, context, pairs, key, (float(self._columns[step]), divisor))
            for span in spans:
                span.write_back()
        self._released.record(step, context)
        self._filled = step + 1
        noise = {name: float(self._stddevs[step]) * stddev for name, stddev in stddevs.items()}
        return divided(clipped, clipped.values, noise, divisor)

    def restore(self, state: Mapping[str, Any] | None, steps_done: int) -> None:
        """Go on after `steps_done` steps; raises PrivacyError where the state is not theirs."""
        super().restore(state, steps_done)
        self._buffers, self._filled = {}, 0

    def _go_to(self, step: int, spans: list[Span], key: RootKey) -> list[tuple[Span, Tensor]]:
        """Each span and its rows, as `step` needs them: after a restart all earlier steps again."""
        self._released.check_places(spans)
        if not self._buffers:
            for span in spans:
                self._buffers[span.start] = span.flat.new_zeros(self.rows, span.flat.numel())
        if self._filled == _NOT_KNOWN:  # a step failed: whatever it left
            for buffer in self._buffers.values():
                buffer.zero_()
            self._filled = 0
        pairs = [(span, self._buffers[span.start]) for span in spans]
        while self._filled < step:
            at = self._filled
            context = self._released.context(at)
            self._filled = _NOT_KNOWN
            if context is None:
                self._leave_out(at, pairs)
            else:
                self._advance(at, context, pairs, key, None)
            self._filled = at + 1
        return pairs

    def _leave_out(self, step: int, pairs: list[tuple[Span, Tensor]]) -> None:
        """Go past a step that failed: nobody saw its noise, so that w is 0."""
        taps = self.taps(step)
        for span, buffer in pairs:
            for part in _parts(span):
                rows = [buffer[row, part] for row in taps.rows]
                _sum_for_later_steps(rows, taps)
                if taps.decays is None:
                    rows[0].zero_()
                for row, decay in zip(rows, taps.decays or (), strict=False):
                    row.mul_(decay)

    def _advance(
        self,
        step: int,
        context: int,
        pairs: list[tuple[Span, Tensor]],
        key: RootKey,
        release: tuple[float, float] | None,
    ) -> None:
        """Take the rows from `step` to the next, and release (d_t, divisor) what it adds to the sum."""
        taps = self.taps(step)
        buffers = {id(span): buffer for span, buffer in pairs}
        for (device, _), spans in by_place(span for span, _ in pairs).items():
            library, blocks, threads = pass_over(spans) if device.type == "cpu" else (None, [], 1)
            if library is None or not library.has_cipher:
                for span in spans:
                    self._recur(step, context, span, buffers[id(span)], key, release)
                continue
            column, divisor = release or (0.0, 1.0)
            targets = [
                Target(
                    None if release is None else s.flat.numpy(), s.start, s.stop, s.stddev * column
                )
                for s in spans
            ]
            rows = [[buffers[id(s)][row].numpy() for row in taps.rows] for s in spans]
            library.add_noise(
                {key.derive(PURPOSE, step, context): 1.0},
                blocks,
                targets,
                divisor,
                threads,
                Memory(rows, taps.weights, taps.decays),
            )

    def _recur(
        self,
        step: int,
        context: int,
        span: Span,
        buffer: Tensor,
        key: RootKey,
        release: tuple[float, float] | None,
    ) -> None:
        """The same by torch, number for number, a block of noise at a time."""
        taps = self.taps(step)
        for part in _parts(span):
            rows = [buffer[row, part] for row in taps.rows]
            noise = torch.empty_like(rows[0])
            _take_back(noise, rows, taps.weights[0])
            _sum_for_later_steps(rows, taps)
            here = Span(span.start + part.start, noise, noise, 1.0)
            self._white.add([here], key, [Draw(step, context)], 1.0)
            if taps.decays is None:
                # The oldest row was taken back just now, so it has room for this step.
                rows[0].copy_(noise)
            for row, decay in zip(rows, taps.decays or (), strict=False):
                row.mul_(decay).add_(noise)
            if release is not None:
                column, divisor = release
                released = span.flat[part].add_(noise.mul_(span.stddev * column))
                if divisor != 1.0:
                    released.div_(divisor)


def _take_back(into: Tensor, rows: Sequence[Tensor], weights: Sequence[float]) -> None:
    """What is taken back of the rows, less than nothing; `into` may be the first of them."""
    torch.mul(rows[0], -weights[0], out=into)
    other = torch.empty_like(into)
    for row, weight in zip(rows[1:], weights[1:], strict=True):
        into.sub_(torch.mul(row, weight, out=other))


def _sum_for_later_steps(rows: Sequence[Tensor], taps: Taps) -> None:
    for k, weights in enumerate(taps.weights[1:], 1):
        _take_back(rows[k], rows[k:], weights[k:])


def _parts(span: Span) -> Iterator[slice]:
    """Parts of a span that end where blocks of noise do, so that no block is made twice."""
    block = KEYSTREAM_BLOCK if span.flat.device.type == "cpu" else DEVICE_BLOCK
    at = span.start
    while at < span.stop:
        end = min(span.stop, (at // block + 1) * block)
        yield slice(at - span.start, end - span.start)
        at = end
