"""Pictures as a data set: decoded when asked for, checked together before the first step."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from dptorch.errors import ConfigurationError, DataError
from dptorch.training.data import CLASSES_READ, TrainTest, is_held_out, refuse_empty
from dptorch.training.pictures import Look
from dptorch.vision.formats import LAYOUTS, Format, Part, Picture, find_format

__all__ = ["Pictures", "download", "read_pictures"]

_SHOWN: Final = 20  # faults of a message
_MOST_KEPT: Final = 2**30  # bytes of fixed features that are computed once


@dataclass(frozen=True, eq=False)
class Pictures(Dataset[tuple[Tensor, int | Tensor]]):
    """Examples of pictures.

    Attributes:
        pictures: as the files hold them.
        labels: the class of each; or 0 or 1 for each of several classes.
        look: what is done to each picture.

    Fixed features are computed when a picture is asked for first, and kept up to a gigabyte of them.
    """

    pictures: Sequence[Picture] | NDArray[np.uint8]
    labels: Sequence[int] | Sequence[Sequence[int]]
    look: Look
    _kept: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int | Tensor]:
        label = self.labels[index]
        x = self._kept.get(index)
        if x is None:
            x = self._inputs(self.pictures[index])
            if self.look.features is not None and len(self._kept) * x.nbytes < _MOST_KEPT:
                self._kept[index] = x
        return x, label if isinstance(label, int) else torch.tensor(label, dtype=torch.float32)

    def _inputs(self, picture: Picture | NDArray[np.uint8]) -> Tensor:
        look = self.look
        side = (look.size, look.size, 3) if look.channels == 3 else (look.size, look.size)
        if isinstance(picture, np.ndarray) and picture.shape == side:
            pixels = torch.from_numpy(picture.copy()).reshape(look.size, look.size, look.channels)
            pixels = pixels.permute(2, 0, 1)
        else:
            pixels = look.pixels(_opened(picture))
        return look.inputs(pixels[None])[0]

    def picture(self, index: int) -> Any:
        """The picture itself, of Pillow."""
        return _opened(self.pictures[index])


def read_pictures(
    data: str,
    look: Look,
    *,
    format: str | None = None,
    label: str | None = None,
    test_fraction: float = 0.2,
) -> TrainTest:
    """Read the pictures at a path, and what is held out for testing.

    Args:
        data: a folder or a file.
        look: what is done to a picture.
        format: name of the format, one of `dptorch.vision.formats.LAYOUTS`; None to look what is
            there.
        label: column of the class (Parquet), or attribute (CelebA).
        test_fraction: held out by a hash of each picture, where there is no test part.

    Raises:
        DataError: nothing that can be read is there, or pictures are corrupt: all of them are listed.
    """
    path = Path(data)
    kind, where = find_format(path, format)
    parts = kind.read(where, label)
    _refuse_corrupt(parts.values())
    train, test = parts["train"], parts.get("test")
    if test is None:
        train, test = _split(train, test_fraction)
    refuse_empty(len(train.labels), len(test.labels), data)
    if len(train.classes) < 2:
        raise DataError(f"{path}: {len(train.classes)} classes. Expected at least 2.")
    sides: list[Any] = [Pictures(part.pictures, part.labels, look) for part in (train, test)]
    several = {"several": True} if train.several else {}
    return TrainTest(
        sides[0],
        sides[1],
        train.classes,
        look.shape,
        f"{kind.name} pictures in {data}",
        preparation={"kind": "images", **look.to_dict(), **several},
        # What the files of a published data set hold is known to everybody.
        read_from_data=() if kind.torchvision else CLASSES_READ,
    )


def download(data: str, name: str | None) -> None:
    """Let torchvision download a data set into the folder `data`, if it is not there.

    Raises:
        ConfigurationError: it is none that torchvision has, or torchvision cannot be imported.
        DataError: it cannot be downloaded; the message shows what files to put where.
    """
    from dptorch.vision.formats import FORMATS

    known: dict[str, Format] = {f.name: f for f in FORMATS if f.torchvision}
    if name not in known:
        raise ConfigurationError(
            f"format={name!r} cannot be downloaded. Expected one of: {', '.join(known)}."
        )
    if known[name].found(Path(data)) is not None:
        return
    by_hand = f"Or put its files into {data} yourself:\n  {name}: {LAYOUTS[name]}"
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:  # RuntimeError: it was built for another torch
        raise ConfigurationError(
            f"Downloading needs torchvision, which cannot be imported ({error}). Install the build "
            f"that belongs to torch {torch.__version__}. {by_hand}"
        ) from error
    try:
        getattr(datasets, known[name].torchvision or "")(data, download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(f"{name} cannot be downloaded ({error}). {by_hand}") from error


def _opened(picture: Picture) -> Any:
    """A picture of Pillow."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigurationError(
            "Reading images needs the package Pillow. Install it with: pip install 'dptorch[report]'"
        ) from error
    if isinstance(picture, np.ndarray):
        return Image.fromarray(picture)
    return Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture)


def _refuse_corrupt(parts: Any) -> None:
    """Decode every file once, at an eighth of its size where its format allows."""
    faults = []
    for part in parts:
        if isinstance(part.pictures, np.ndarray):
            continue
        for number, picture in enumerate(part.pictures):
            try:
                with _opened(picture) as image:
                    image.draft("RGB", (1, 1))
                    image.load()
            except (OSError, SyntaxError, ValueError) as error:  # PNG: SyntaxError
                name = f"row {number}" if isinstance(picture, bytes) else str(picture)
                faults.append(f"{name}: {' '.join(str(error).split())}")
    if faults:
        more = [f"and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
        listed = "\n  ".join([*faults[:_SHOWN], *more])
        raise DataError(f"{len(faults)} images cannot be read. Remove or replace them:\n  {listed}")


def _split(part: Part, fraction: float) -> tuple[Part, Part]:
    """(training, test), each picture on the side that a hash of its own content says."""

    def content(picture: Picture) -> bytes:
        if isinstance(picture, np.ndarray):
            return picture.tobytes()
        return picture.read_bytes() if isinstance(picture, Path) else picture

    out = [is_held_out(content(picture), fraction) for picture in part.pictures]

    def side(held_out: bool) -> Part:
        kept = [i for i, held in enumerate(out) if held is held_out]
        labels: list[Any] = [part.labels[i] for i in kept]
        return Part([part.pictures[i] for i in kept], labels, part.classes, part.several)

    return side(False), side(True)
