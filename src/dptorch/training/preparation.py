"""Do to new inputs what was done to those a model was trained on.

A run records it as plain values, its *preparation*: no function of the training examples is in it.

=========  ===========================================================================================
table      the schema of the run
images     files, or their content, resized to a public size
arrays     of an `.npz`: public bounds, or images standardised one by one
recipe     the recipe's fixed transform of one image at a time
=========  ===========================================================================================
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from dptorch.errors import DataError
from dptorch.training.data import ReadOptions
from dptorch.training.pictures import Look
from dptorch.training.readers import IMAGE_SUFFIXES, ImageFiles, array_inputs, pillow
from dptorch.training.recipes import get_recipe

__all__ = ["image_files", "prepare_inputs"]

_FORMATS: Final = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF")
_MOST_PIXELS: Final = 2**24  # of bytes from elsewhere: a small file may hold far more


def prepare_inputs(preparation: Mapping[str, Any], raw: Any) -> Tensor:
    """The inputs of a model, float32 [N, *shape], for anything but tables.

    Args:
        preparation: of the run.
        raw: an array or a tensor like the training data before it was prepared: of recipes and `.npz`
            images [N, ...]; of an image folder a list of paths, or of the bytes of files.

    Raises:
        DataError: `raw` is of another kind.
    """
    kind = preparation.get("kind")
    if kind == "images":
        look = Look.from_dict(preparation)
        if isinstance(raw, Sequence) and raw and all(isinstance(each, bytes) for each in raw):
            pictures = [_decode(content, row, look) for row, content in enumerate(raw)]
            return torch.stack([look.inputs(pixels[None])[0] for pixels in pictures])
        paths = image_files(raw)
        files = ImageFiles(tuple(paths), (0,) * len(paths), look)
        return torch.stack([files[i][0] for i in range(len(paths))])
    array = raw.numpy() if isinstance(raw, Tensor) else np.asarray(raw)
    if kind == "arrays":
        columns = {name: tuple(pair) for name, pair in preparation["column_bounds"].items()}
        bounds = preparation["bounds"]
        options = ReadOptions(bounds=bounds and tuple(bounds), column_bounds=columns)
        return array_inputs("rows", array, options)
    if kind == "recipe":
        if array.ndim != 3 or array.dtype.kind not in "biuf":
            raise DataError(
                f"images of shape {array.shape} and type {array.dtype}. Expected grey images "
                "(N, H, W), 0 for the background and 1, or 255 in bytes, for ink."
            )
        scale = 255 if array.dtype == np.uint8 else 1
        images = torch.from_numpy(array.astype(np.float32)) / scale
        transform = get_recipe(preparation["name"]).transform
        if transform is not None:
            return transform(images)
    raise DataError(
        f"what was done to the data of this run ({dict(preparation) or 'not recorded'}) cannot be done "
        "again. Its network takes prepared inputs: dptorch.training.load_model."
    )


def image_files(where: Any) -> list[Path]:
    """The image files in a list of paths, or in a folder and its subfolders, sorted.

    Raises:
        DataError: there is none.
    """
    if isinstance(where, str | Path):
        root = Path(where)
        found = sorted(root.rglob("*")) if root.is_dir() else [root]
        found = [p for p in found if p.suffix.lower() in IMAGE_SUFFIXES]
    elif isinstance(where, Sequence):
        found = [Path(path) for path in where]
    else:
        raise DataError(f"{type(where).__name__}: expected a folder of images, or a list of paths.")
    if not found:
        raise DataError(f"{where}: no image ({', '.join(sorted(IMAGE_SUFFIXES))}).")
    return found


def _decode(content: bytes, row: int, look: Look) -> Tensor:
    """The pixels of an image file's content; see `Look.pixels`."""
    library = pillow()
    try:
        with library.open(io.BytesIO(content), formats=_FORMATS) as image:
            if image.width * image.height <= _MOST_PIXELS:
                return look.pixels(image)
            size = f"{image.width} x {image.height} pixels"
    except Exception as error:  # damaged files raise whatever their decoder meets
        raise DataError(f"row {row} is not the content of a readable image ({error}).") from None
    raise DataError(f"row {row} has {size}. Expected at most {_MOST_PIXELS:,}.")
