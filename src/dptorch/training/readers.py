"""Readers of data files: image folder, `.npz`, CSV, Parquet.

Each returns a `TrainTest` or raises a `DataError` that names the file and, where one is at fault,
the row. Whole files are checked before anything is trained. Images are standardised one by one;
no reader computes a statistic over examples.
"""

from __future__ import annotations

import csv
import gzip
import math
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from dptorch.errors import ConfigurationError, DataError
from dptorch.training.data import (
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

__all__ = ["ImageFiles", "load_data", "read_csv", "read_image_folder", "read_npz", "read_parquet"]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"})


def load_data(path: str | Path, options: ReadOptions | None = None) -> TrainTest:
    """Read a data set, choosing the reader by what `path` is.

    ========================  ====================================================================
    directory                 `<class>/*.png`, or `train/<class>/*` with `test/<class>/*`
    `.npz`                    arrays `x`, `y`; optionally `x_test`, `y_test` (`x_train`,
                              `y_train` are understood too)
    `.csv`, `.csv.gz`         a header line, one label column, all other columns numbers
    `.parquet`, `.pq`         the same, as columns
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
    by_suffix: dict[str, Callable[[Path, ReadOptions], TrainTest]] = {
        ".npz": read_npz,
        ".csv": read_csv,
        ".csv.gz": read_csv,
        ".parquet": read_parquet,
        ".pq": read_parquet,
    }
    for suffix, reader in by_suffix.items():
        if source.name.lower().endswith(suffix):
            return reader(source, options)
    raise DataError(
        f"{source}: cannot tell the format. Expected a folder of images or one of "
        f"{', '.join(by_suffix)}."
    )


# --------------------------------------------------------------------------------- image folder


@dataclass(frozen=True, eq=False)
class ImageFiles(Dataset[Example]):
    """Images decoded when asked for, so that a folder need not fit in memory.

    Attributes:
        paths: one file per example.
        labels: class of each.
        size: side in pixels of the square that images are resized to.
        channels: 1 or 3.
    """

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    size: int
    channels: int

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Example:
        path = self.paths[index]
        try:
            with _pillow().open(path) as image:
                picture = image.convert("L" if self.channels == 1 else "RGB")
                picture = picture.resize((self.size, self.size))
                pixels = np.asarray(picture, dtype=np.float32) / 255
        except OSError as error:
            raise DataError(f"{path}: not a readable image ({error}).") from error
        x_HWC = torch.from_numpy(pixels).reshape(self.size, self.size, self.channels)
        return standardise(x_HWC.permute(2, 0, 1)[None])[0], self.labels[index]


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
        return ImageFiles(paths, labels, options.image_size, options.channels)

    shape = (options.channels, options.image_size, options.image_size)
    return TrainTest(files(train), files(test), classes, shape, f"images in {root}")


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
                with _pillow().open(path) as image:
                    image.verify()
            except (OSError, SyntaxError) as error:  # Pillow's PNG reader raises SyntaxError
                raise DataError(f"{path}: not a readable image ({error}).") from error
            rows.append((path, label))
    return rows


def _pillow() -> Any:
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

    inputs = _npz_inputs(path, train_x, arrays[train_x], options)
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
        test_inputs = _npz_inputs(path, "x_test", arrays["x_test"], options)
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
    return TrainTest(train, test, classes, tuple(inputs.shape[1:]), f"arrays in {path}")


def _same_length(path: Path, x_name: str, x: Tensor, y_name: str, y: NDArray[Any]) -> None:
    if len(x) != len(y):
        raise DataError(
            f"{path}: {x_name} has {len(x)} rows, {y_name} has {len(y)}. Expected as many."
        )


def _npz_inputs(path: Path, name: str, array: NDArray[Any], options: ReadOptions) -> Tensor:
    if array.dtype.kind not in "biuf" or array.ndim not in (2, 3, 4):
        raise DataError(
            f"{path}: array {name!r} has shape {array.shape} and type {array.dtype}. Expected "
            f"numbers of shape (N, D), (N, H, W), (N, C, H, W) or (N, H, W, C)."
        )
    if array.size == 0:
        raise DataError(f"{path}: array {name!r} of shape {array.shape} holds no example.")
    _refuse_nonfinite(array, f"{path}: array {name!r}")
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


# ---------------------------------------------------------------------------------- CSV, Parquet


def read_csv(path: Path, options: ReadOptions) -> TrainTest:
    """Read a CSV file with a header line; one column is the label, all others are numbers."""
    values: list[list[float]] = []
    labels: list[str] = []
    rows = _csv_rows(path)
    header = next(rows, (1, []))[1]
    label_at = _label_position(path, header, options.label)
    for line, row in rows:
        if not row:
            continue
        if len(row) != len(header):
            raise DataError(
                f"{path}, line {line}: {len(row)} fields, but the header has {len(header)}."
            )
        if not row[label_at].strip():
            raise DataError(f"{path}, line {line}: the label column {options.label!r} is empty.")
        labels.append(row[label_at].strip())
        numbers = []
        for column, cell in enumerate(row):
            if column != label_at:
                numbers.append(_number(cell, path, line, header[column]))
        values.append(numbers)
    if not values:
        raise DataError(f"{path}: no rows under the header.")
    inputs = torch.tensor(values, dtype=torch.float32)
    columns = [name for position, name in enumerate(header) if position != label_at]
    return _tabular(path, inputs, labels, columns, options, "CSV file")


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    def open_text() -> IO[str]:
        if path.name.lower().endswith(".gz"):
            return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
        return path.open(encoding="utf-8-sig", newline="")

    line = 0
    try:
        with open_text() as file:
            reader = csv.reader(file)
            for row in reader:
                line = reader.line_num
                yield line, row
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, after line {line}: not UTF-8 text ({error}).") from error
    except (OSError, EOFError, csv.Error) as error:
        raise DataError(f"{path}, after line {line}: cannot be read ({error}).") from error


def _number(cell: str, path: Path, line: int, column: str) -> float:
    try:
        number = float(cell)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DataError(
            f"{path}, line {line}, column {column!r}: {cell!r} is not a finite number. Encode text "
            f"as numbers and fill in missing values first."
        )
    return number


def read_parquet(path: Path, options: ReadOptions) -> TrainTest:
    """Read a Parquet file; one column is the label, all others are numbers."""
    try:
        from pyarrow import ArrowException, parquet, types
    except ImportError as error:
        raise _missing("Reading Parquet", "pyarrow") from error
    try:
        table = parquet.read_table(path)
    except (ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}).") from error
    names = [str(n) for n in table.column_names]
    label_at = _label_position(path, names, options.label)
    if table.num_rows == 0:
        raise DataError(f"{path}: no rows.")
    columns = []
    for position, name in enumerate(names):
        column = table.column(position)
        if column.null_count:
            row = next(i for i, v in enumerate(column) if not v.is_valid)
            raise DataError(
                f"{path}, row {row}, column {name!r}: empty. Fill in missing values first."
            )
        if position == label_at:
            continue
        kind = column.type
        if not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)):
            raise DataError(
                f"{path}, row 0, column {name!r}: type {kind} is not a number. Encode it as "
                f"numbers first."
            )
        array = np.asarray(column.to_numpy())
        _refuse_nonfinite(array, f"{path}, column {name!r}")
        columns.append(array.astype(np.float32))
    inputs = torch.from_numpy(np.stack(columns, axis=1))
    labels = table.column(label_at).to_pylist()
    features = [name for position, name in enumerate(names) if position != label_at]
    return _tabular(path, inputs, labels, features, options, "Parquet file")


def _label_position(path: Path, names: list[str], label: str) -> int:
    if label not in names:
        raise DataError(
            f"{path}: no column {label!r}. Found {', '.join(names) or 'none'}. Say which holds "
            f"the class with --label COLUMN."
        )
    if len(names) < 2:
        raise DataError(f"{path}: {label!r} is the only column. Expected features beside it.")
    if names.count(label) > 1:
        raise DataError(f"{path}: {names.count(label)} columns are called {label!r}. Expected one.")
    return names.index(label)


def _tabular(
    path: Path,
    inputs: Tensor,
    labels: list[Any],
    columns: list[str],
    options: ReadOptions,
    kind: str,
) -> TrainTest:
    codes, classes = encode_labels(labels, str(path))
    examples = Examples(options.scale(inputs, columns), codes)
    train, test = split_by_content(examples, options.test_fraction, str(path))
    return TrainTest(train, test, classes, tuple(inputs.shape[1:]), f"{kind} {path}")


def _missing(what: str, package: str) -> ConfigurationError:
    return ConfigurationError(
        f"{what} needs the package {package}. Install it with: pip install 'dptorch[report]'"
    )
