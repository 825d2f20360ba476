"""Where the tensors of a process lie in the whole gradient, and so which of its noise they get.

The coordinates of all parameters stand in one row, in the order of the parameters; number i of a step's
noise belongs to coordinate i. A process that holds a part of a parameter says where that part begins,
or of which columns of a matrix it is.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from dptorch.errors import ConfigurationError, PrivacyError

__all__ = [
    "Columns",
    "Offsets",
    "Piece",
    "Span",
    "blocks_of",
    "by_place",
    "pieces_by_block",
    "place_spans",
]


@dataclass(frozen=True)
class Columns:
    """The place of a tensor [n, width] that has some columns of a matrix [n, row].

    Attributes:
        first: place of its first coordinate in the whole gradient.
        row: coordinates of a row of the matrix; at least `width`.
    """

    first: int
    row: int


#: Parameter name -> place of its first coordinate in the whole gradient, or of its columns.
Offsets: TypeAlias = Mapping[str, "int | Columns"]


@dataclass(frozen=True)
class Span:
    """The coordinates [start, start + flat.numel()) of the whole gradient, as a flat tensor: those of
    `owner` from `in_owner` on."""

    start: int
    flat: Tensor
    owner: Tensor
    stddev: float
    in_owner: int = 0

    @functools.cached_property
    def stop(self) -> int:
        return self.start + self.flat.numel()

    def write_back(self) -> None:
        """Copy the numbers to `owner`, if they are not its own memory."""
        if self.owner.is_contiguous():
            return
        if self.flat.numel() == self.owner.numel():
            self.owner.copy_(self.flat.view(self.owner.shape))
        else:  # a row of columns
            self.owner[self.in_owner // self.flat.numel()] = self.flat


def by_place(spans: Iterable[Span]) -> dict[tuple[torch.device, torch.dtype], list[Span]]:
    """The spans on each device and of each type, which have noise of one source."""
    groups: dict[tuple[torch.device, torch.dtype], list[Span]] = {}
    for span in spans:
        groups.setdefault((span.flat.device, span.flat.dtype), []).append(span)
    return groups


@dataclass(frozen=True)
class Piece:
    """`size` coordinates of a span from `in_span` on, and where in a block their numbers begin."""

    span: Span
    in_span: int
    in_block: int
    size: int


def pieces_by_block(spans: list[Span], block: int) -> Iterator[tuple[int, list[Piece]]]:
    """Every block that the spans (in order, disjoint) need, with the pieces that read from it."""
    index, pieces = -1, list[Piece]()
    for span in spans:
        at = span.start
        while at < span.stop:
            if at // block != index:
                if pieces:
                    yield index, pieces
                index, pieces = at // block, []
            size = min(span.stop, (index + 1) * block) - at
            pieces.append(Piece(span, at - span.start, at - index * block, size))
            at += size
    if pieces:
        yield index, pieces


def blocks_of(spans: list[Span], block: int) -> list[int]:
    """The numbers of the blocks that `pieces_by_block` gives."""
    numbers: list[int] = []
    for span in spans:
        # A block that the span before ends in is counted once.
        first = span.start // block
        numbers += range(first + (numbers[-1:] == [first]), (span.stop - 1) // block + 1)
    return numbers


def place_spans(
    values: Mapping[str, Tensor], stddevs: Mapping[str, float], offsets: Offsets | None
) -> list[Span]:
    """The tensors as spans of the whole gradient, in its order; see `GaussianNoise.privatize`.

    Raises:
        ConfigurationError, PrivacyError: `offsets` are not places of their own.
    """
    places = _places(values, offsets)
    found: list[Span] = []
    for name in sorted(values, key=lambda n: _first(places[n])):
        value, stddev, place = values[name], stddevs[name], places[name]
        flat = value.detach().contiguous().view(-1)
        # No coordinate, no noise: its place may be any other's.
        if not flat.numel():
            continue
        if isinstance(place, int):
            found.append(Span(place, flat, value, stddev))
            continue
        width = value.shape[-1]
        found += (
            Span(place.first + i * place.row, row, value, stddev, i * width)
            for i, row in enumerate(flat.split(width))
        )
    return found


def _first(place: int | Columns) -> int:
    return place.first if isinstance(place, Columns) else place


def _end(place: int | Columns, value: Tensor) -> int:
    """The coordinate after the last."""
    if isinstance(place, int):
        return place + value.numel()
    return place.first + (value.shape[0] - 1) * place.row + value.shape[1]


def _is_place(place: object, value: Tensor) -> bool:
    if isinstance(place, Columns):
        return place.first >= 0 and value.dim() == 2 and value.shape[1] <= place.row
    return isinstance(place, int) and not isinstance(place, bool) and place >= 0


def _places(values: Mapping[str, Tensor], offsets: Offsets | None) -> dict[str, int | Columns]:
    """Where the coordinates of each parameter are in the whole gradient."""
    if offsets is None:
        sizes = itertools.accumulate((t.numel() for t in values.values()), initial=0)
        return dict(zip(values, sizes, strict=False))
    places = dict(offsets)
    if set(places) != set(values) or not all(_is_place(places[n], v) for n, v in values.items()):
        raise ConfigurationError(
            f"offsets={places} must give one place >= 0 for each of {', '.join(values)}."
        )
    # In order of their places, which `pieces_by_block` relies on too. Columns are taken for all of
    # their rows, so two parts of one matrix in one process are refused although they only interleave.
    end, before = 0, ""
    for name in sorted((n for n in values if values[n].numel()), key=lambda n: _first(places[n])):
        if _first(places[name]) < end:
            raise PrivacyError(
                f"by their offsets, {name!r} and {before!r} overlap in the whole gradient: they "
                "would get the same noise, and their difference none. Give each a range of its own."
            )
        end, before = _end(places[name], values[name]), name
    return places
