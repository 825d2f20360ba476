"""Statistics of the channels of pictures: a picture is a unit, and its pixels are its rows.

Means and deviations of channels are what models of pictures are given inputs by; those of CIFAR-10 and
ImageNet were computed without noise by somebody.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dptorch.errors import ConfigurationError, DataError
from dptorch.statistics.quantities import Floats, Numeric
from dptorch.statistics.releases import Statistics, release
from dptorch.training.pictures import Look
from dptorch.vision.dataset import Pictures
from dptorch.vision.formats import Part, find_format

__all__ = ["CHANNELS", "describe_pictures", "picture_means"]

#: Names of channels, by how many there are.
CHANNELS: Final = {1: ("grey",), 3: ("red", "green", "blue")}
_LEVELS: Final = 256
_AT_ONCE: Final = 1024


def describe_pictures(
    path: str | Path,
    *,
    format: str | None = None,
    label: str | None = None,
    channels: int = 3,
    bins: int = 0,
    **terms: Any,
) -> Statistics:
    """Release mean and deviation of each channel of the training pictures at a path, from 0 to 1.

    Args:
        path: a folder or a file.
        format: of `dptorch.vision.formats.LAYOUTS`; None to look what is there.
        label: see `dptorch.vision.dataset.read_pictures`.
        channels: 1 (grey) or 3 (RGB).
        bins: of histograms of the channels; 0 for none.
        terms: see `dptorch.statistics.release`.

    Raises:
        DataError: nothing that can be read is there.
    """
    if channels not in CHANNELS:
        raise ConfigurationError(f"channels={channels}: expected 1 (grey) or 3 (RGB).")
    kind, where = find_format(Path(path), format)
    part = kind.read(where, label)["train"]
    quantities = [Numeric(name, (0.0, 1.0), bins=bins) for name in CHANNELS[channels]]
    return release(
        quantities,
        picture_means(quantities, _pixels(part, channels)),
        units=len(part.labels),
        unit="example",
        **terms,
    )


def picture_means(
    quantities: Sequence[Numeric], pictures: Iterable[NDArray[np.uint8]]
) -> Iterable[Floats]:
    """What pictures contribute: see `dptorch.statistics.contributions.unit_means`.

    Args:
        quantities: a channel each, of values from 0 to 1.
        pictures: uint8 [H, W, channels] each; sizes may differ.
    """
    tables = [q.rows(np.arange(_LEVELS) / (_LEVELS - 1)) for q in quantities]
    part = list[Floats]()
    for number, picture in enumerate(pictures):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != len(tables):
            raise DataError(
                f"picture {number} is {picture.dtype} of shape {list(picture.shape)}. Expected bytes, "
                f"[height, width, {len(tables)}]."
            )
        flat = picture.reshape(-1, len(tables))
        shares = [np.bincount(channel, minlength=_LEVELS) / len(flat) for channel in flat.T]
        part.append(np.concatenate([s @ t for s, t in zip(shares, tables, strict=True)]))
        if len(part) == _AT_ONCE:
            yield np.stack(part)
            part = []
    if part:
        yield np.stack(part)


def _pixels(part: Part, channels: int) -> Iterable[NDArray[np.uint8]]:
    files = Pictures(part.pictures, part.labels, Look(1, channels))
    for number in range(len(part.labels)):
        try:
            picture = files.picture(number).convert("L" if channels == 1 else "RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"picture {number} cannot be read ({error}).") from None
        yield np.asarray(picture, np.uint8).reshape(picture.height, picture.width, channels)
