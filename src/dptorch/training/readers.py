"""Readers of data files: image folder, `.npz`, tables.

Each returns a `TrainTest` or raises a `DataError` that names the file and, where one is at fault,
the row. Whole files are checked before anything is trained. Images are standardised one by one;
no reader computes a statistic over examples.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from dptorch.errors import ConfigurationError, DataError
from dptorch.tables.files import is_table
from dptorch.training.data import (
    CLASSES_READ,
    Example,
    Examples,
    ReadOptions,
    TrainTest,
    encode_labels,
    is_held_out,
    refuse_empty,
    split_by_content,
)
from dptorch.training.images import standardise
from dptorch.training.pictures import Look
from dptorch.training.table_data import read_table

__all__ = ["ImageFiles", "array_inputs", "load_data", "read_image_folder", "read_npz"]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"})


def load_data(path: str | Path, options: ReadOptions | None = None) -> TrainTest:
    """Read a data set, choosing the reader by what `path` is.

    ========================  ====================================================================
    directory                 `<class>/*.png`, or `train/<class>/*` with `test/<class>/*`
    `.npz`                    arrays `x`, `y`; optionally `x_test`, `y_test` (`x_train`,
                              `y_train` are understood too)
    `.csv`, `.tsv`, `.txt`    a table, also packed (.gz, .bz2, .xz, .zip, .zst); all columns but the
                              label are numbers, unless a schema says what they are
    `.parquet`, `.pq`         the same
    ========================  ====================================================================

    Raises:
        DataError: naming the file, and the row where one is at fault.
    """
    source = Path(path)
    options = options or ReadOptions()
    if not source.exists():
        raise DataError(f"{source} does not exist (looked from {Path.cwd()}).")
    if source.is_dir():
        return read_image_folder(source, options)
    if is_table(source):
        return read_table(source, options)
    if source.suffix.lower() == ".npz":
        return read_npz(source, options)
    raise DataError(
        f"{source}: cannot tell the format. Expected a folder of images, .npz, or a table: .csv, .tsv, "
        ".txt (also .gz, .bz2, .xz, .zip, .zst), .parquet, .pq."
    )


# --------------------------------------------------------------------------------- image folder


@dataclass(frozen=True, eq=False)
class ImageFiles(Dataset[Example]):
    """Images decoded when asked for, so that a folder need not fit in memory.

    Attributes:
        paths: one file per example.
        labels: class of each.
        look: what is done to each image.
    """

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    look: Look

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Example:
        path = self.paths[index]
        try:
            with pillow().open(path) as image:
                pixels = self.look.pixels(image)
        except OSError as error:
            raise DataError(f"{path}: not a readable image ({error}).") from error
        return self.look.inputs(pixels[None])[0], self.labels[index]


def read_image_folder(root: Path, options: ReadOptions) -> TrainTest:
    """Read `root/<class>/*`, or `root/train/<class>/*` with `root/test/<class>/*`.

    Every file is opened once and checked; hidden files are skipped, any other file that is not an
    image is an error.
    """
    own_test = (root / "train").is_dir() and (root / "test").is_dir()
    first = root / "train" if own_test else root
    classes = tuple(sorted(d.name for d in _visible(first) if d.is_dir()))
    if len(classes) < 2:
        raise DataError(
            f"{first}: found {len(classes)} class folders ({', '.join(classes) or 'none'}). "
            f"Expected at least 2, each holding the images of one class."
        )
    if own_test:
        unknown = {d.name for d in _visible(root / "test") if d.is_dir()} - set(classes)
        if unknown:
            raise DataError(f"{root / 'test'}: class {min(unknown)!r} is not in {first}.")
        train = _list_images(first, classes)
        test = _list_images(root / "test", classes)
    else:
        train, test = [], []
        for path, label in _list_images(root, classes):
            held_out = is_held_out(path.read_bytes(), options.test_fraction)
            (test if held_out else train).append((path, label))
    refuse_empty(len(train), len(test), str(root))

    def files(rows: list[tuple[Path, int]]) -> ImageFiles:
        paths, labels = zip(*rows, strict=True)
        return ImageFiles(paths, labels, look)

    look = Look(options.image_size, options.channels)
    prepared = {"kind": "images", **look.to_dict()}
    return TrainTest(
        files(train),
        files(test),
        classes,
        look.shape,
        f"images in {root}",
        preparation=prepared,
        read_from_data=CLASSES_READ,
    )


def _visible(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if not p.name.startswith("."))


def _list_images(root: Path, classes: tuple[str, ...]) -> list[tuple[Path, int]]:
    rows = []
    for label, name in enumerate(classes):
        if not (root / name).is_dir():
            continue
        for path in _visible(root / name):
            if path.suffix.lower() not in IMAGE_SUFFIXES:
                raise DataError(
                    f"{path}: not an image file. Expected {', '.join(sorted(IMAGE_SUFFIXES))}. "
                    f"Move other files elsewhere."
                )
            try:
                with pillow().open(path) as image:
                    image.verify()
            except (OSError, SyntaxError) as error:  # Pillow's PNG reader raises SyntaxError
                raise DataError(f"{path}: not a readable image ({error}).") from error
            rows.append((path, label))
    return rows


def pillow() -> Any:
    """Pillow's module `Image`."""
    try:
        from PIL import Image
    except ImportError as error:
        raise _missing("Reading images", "Pillow") from error
    return Image


# ------------------------------------------------------------------------------------------ npz


def read_npz(path: Path, options: ReadOptions) -> TrainTest:
    """Read arrays `x` and `y` (or `x_train`, `y_train`), and `x_test`, `y_test` if they are there.

    `x` is [N, D] (tabular), [N, H, W], [N, C, H, W] or [N, H, W, C] (images, C of 1, 3 or 4).
    uint8 images are divided by 255; images are standardised one by one.
    """
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise DataError(f"{path}: holds one array without a name. Save it with np.savez.")
        with loaded as archive:
            arrays = {name: archive[name] for name in archive.files}
    except DataError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not a readable .npz file ({error}).") from error
    train_x, train_y = ("x_train", "y_train") if "x_train" in arrays else ("x", "y")
    for name in (train_x, train_y):
        if name not in arrays:
            raise DataError(
                f"{path}: no array {name!r}. Found {', '.join(sorted(arrays)) or 'nothing'}. "
                f"Expected x and y, and optionally x_test and y_test."
            )
    if ("x_test" in arrays) != ("y_test" in arrays):
        raise DataError(f"{path}: x_test and y_test must both be there, or neither.")

    inputs = array_inputs(f"{path}: array {train_x!r}", arrays[train_x], options)
    own_test = "x_test" in arrays
    label_arrays = [arrays[train_y]] + ([arrays["y_test"]] if own_test else [])
    for name, labels in zip((train_y, "y_test"), label_arrays, strict=False):
        if labels.ndim != 1 or labels.dtype.kind not in "biufUS":
            raise DataError(
                f"{path}: array {name!r} has shape {labels.shape} and type {labels.dtype}. "
                f"Expected one class for each example, shape (N,)."
            )
    codes, classes = encode_labels(np.concatenate(label_arrays).tolist(), f"{path}: {train_y}")
    _same_length(path, train_x, inputs, train_y, label_arrays[0])
    n = len(inputs)
    if own_test:
        test_inputs = array_inputs(f"{path}: array 'x_test'", arrays["x_test"], options)
        _same_length(path, "x_test", test_inputs, "y_test", label_arrays[1])
        if test_inputs.shape[1:] != inputs.shape[1:]:
            raise DataError(
                f"{path}: one input of {train_x} has shape {tuple(inputs.shape[1:])}, one of "
                f"x_test {tuple(test_inputs.shape[1:])}. Expected the same."
            )
        train, test = Examples(inputs, codes[:n]), Examples(test_inputs, codes[n:])
        refuse_empty(len(train), len(test), str(path))
    else:
        train, test = split_by_content(Examples(inputs, codes), options.test_fraction, str(path))
    prepared = {
        "kind": "arrays",
        "bounds": options.bounds and list(options.bounds),
        "column_bounds": {name: list(pair) for name, pair in options.column_bounds.items()},
    }
    shape = tuple(inputs.shape[1:])
    return TrainTest(
        train,
        test,
        classes,
        shape,
        f"arrays in {path}",
        preparation=prepared,
        read_from_data=CLASSES_READ,
    )


def _same_length(path: Path, x_name: str, x: Tensor, y_name: str, y: NDArray[Any]) -> None:
    if len(x) != len(y):
        raise DataError(
            f"{path}: {x_name} has {len(x)} rows, {y_name} has {len(y)}. Expected as many."
        )


def array_inputs(where: str, array: NDArray[Any], options: ReadOptions) -> Tensor:
    """The inputs of a model, float32 [N, *shape], of an array as `read_npz` takes it.

    Args:
        where: what the array is called, for messages.
        array: the examples.
        options: say the bounds of numbers.

    Raises:
        DataError: it has another shape or type, is empty, or holds NaN or infinity.
    """
    if array.dtype.kind not in "biuf" or array.ndim not in (2, 3, 4):
        raise DataError(
            f"{where} has shape {array.shape} and type {array.dtype}. Expected "
            f"numbers of shape (N, D), (N, H, W), (N, C, H, W) or (N, H, W, C)."
        )
    if array.size == 0:
        raise DataError(f"{where} of shape {array.shape} holds no example.")
    _refuse_nonfinite(array, where)
    x = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    if array.ndim == 2:
        return options.scale(x, [str(i) for i in range(x.shape[1])])
    if array.dtype == np.uint8:
        x = x / 255
    if array.ndim == 3:
        x = x[:, None]
    elif array.shape[3] in (1, 3, 4) and array.shape[1] not in (1, 3, 4):
        x = x.permute(0, 3, 1, 2).contiguous()
    return standardise(x)


def _refuse_nonfinite(array: NDArray[Any], where: str) -> None:
    if array.dtype.kind != "f":
        return
    bad = np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(1))
    if len(bad):
        raise DataError(
            f"{where}: row {bad[0]} holds NaN or infinity (as do {len(bad) - 1} more). Fill in or "
            f"remove such rows."
        )


def _missing(what: str, package: str) -> ConfigurationError:
    return ConfigurationError(
        f"{what} needs the package {package}. Install it with: pip install 'dptorch[report]'"
    )
