"""Files of image data sets as torchvision and Hugging Face keep them, read without either.

Each reader returns the parts of a data set by name: training, and a test part where there is one.
Pictures stay as they are (arrays, paths, encoded bytes) until a model asks for them.
"""

from __future__ import annotations

import gzip
import json
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dptorch.errors import ConfigurationError, DataError
from dptorch.training.readers import IMAGE_SUFFIXES

__all__ = ["FORMATS", "LAYOUTS", "Format", "Part", "Picture", "find_format"]

#: A picture: pixels [H, W] or [H, W, 3] of bytes, the path of a file, or the bytes of one.
Picture: TypeAlias = NDArray[np.uint8] | Path | bytes


@dataclass(frozen=True)
class Part:
    """The pictures of a training or a test set.

    Attributes:
        pictures: one for each example, a sequence or one array of all.
        labels: its class, an index into `classes`; or, of `several`, 0 or 1 for each of them.
        classes: their names.
        several: whether a picture may have several of the classes.
    """

    pictures: Sequence[Picture] | NDArray[np.uint8]
    labels: Sequence[int] | Sequence[Sequence[int]]
    classes: tuple[str, ...]
    several: bool = False


Parts: TypeAlias = dict[str, Part]


@dataclass(frozen=True)
class Format:
    """One kind of files.

    Attributes:
        name: as given to ``--format``.
        found: the folder or file in which the files are, at or below a path; None for none.
        read: their parts; takes what `found` returned and the column or attribute of the class.
        size: side of its pictures, where all have one.
        channels: of its pictures.
        torchvision: the class that downloads it; None if nobody does.
    """

    name: str
    found: Callable[[Path], Path | None]
    read: Callable[[Path, str | None], Parts]
    size: int | None = None
    channels: int = 3
    torchvision: str | None = None


#: Where the files of each data set are expected, below ``--data``.
LAYOUTS: Final[Mapping[str, str]] = {
    "cifar10": "cifar-10-batches-py/ with data_batch_1 ... data_batch_5, test_batch and batches.meta",
    "cifar100": "cifar-100-python/ with train, test and meta",
    "mnist": "MNIST/raw/ with train-images-idx3-ubyte, train-labels-idx1-ubyte and the same of t10k, "
    "packed (.gz) or not",
    "celeba": "celeba/ with img_align_celeba/, list_attr_celeba.txt and list_eval_partition.txt",
    "parquet": "a .parquet file, or files train-*.parquet and test-*.parquet, with a column of images "
    "and one of classes",
    "folder": "a subfolder of images for each class, or train/ and test/ (or val/) with such folders",
}


def find_format(path: Path, name: str | None) -> tuple[Format, Path]:
    """The format called `name`, or that of the files at `path`, and where they are.

    Raises:
        DataError: nothing fits; the message shows the layout that is expected.
    """
    for known in FORMATS if name is None else [f for f in FORMATS if f.name == name]:
        where = known.found(path)
        if where is not None:
            return known, where
    layouts = LAYOUTS if name is None else {name: LAYOUTS[name]}
    wanted = "\n  ".join(f"{known}: {layout}" for known, layout in layouts.items())
    fetched = [f.name for f in FORMATS if f.torchvision and f.name in layouts]
    more = f"\n--download lets torchvision fetch {' or '.join(fetched)}." if fetched else ""
    raise DataError(
        f"{path}: no {name or 'image data set'} there. Expected in that folder:\n  {wanted}{more}"
    )


# ------------------------------------------------------------------------------------- CIFAR, MNIST


class _Plain(pickle.Unpickler):
    """Reads arrays, numbers and texts. A pickle may name any function to be called, and these files
    come from elsewhere."""

    _ALLOWED: Final = {
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy._core.numeric", "_frombuffer"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        """Return a class of the few that arrays need."""
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def _unpickled(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return _Plain(file, encoding="latin1").load()
    except (OSError, EOFError, pickle.UnpicklingError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: not a file of CIFAR's python version ({error}).") from error


def _cifar(
    train: Sequence[str], test: str, names: tuple[str, str], key: str
) -> Callable[[Path, Any], Parts]:
    """A reader of the files `train` and `test`; `names` is the file and key of the classes' names."""

    def read(folder: Path, _: str | None) -> Parts:
        file, words_key = names
        words = _unpickled(folder / file)[words_key]

        def part(files: Sequence[str]) -> Part:
            arrays, labels = [], []
            for name in files:
                content = _unpickled(folder / name)
                if not {"data", key} <= content.keys():
                    raise DataError(f"{folder / name}: no {key!r} in it. Is it another data set's?")
                arrays.append(np.asarray(content["data"], dtype=np.uint8).reshape(-1, 3, 32, 32))
                labels += [int(label) for label in content[key]]
            pictures = np.concatenate(arrays).transpose(0, 2, 3, 1)
            if len(pictures) != len(labels):
                raise DataError(f"{folder}: {len(pictures)} images but {len(labels)} labels.")
            return Part(pictures, labels, tuple(str(word) for word in words))

        return {"train": part(train), "test": part([test])}

    return read


def _inside(name: str, file: str) -> Callable[[Path], Path | None]:
    """Where a folder called `name` is that holds `file`: the path itself, or below it."""

    def found(path: Path) -> Path | None:
        for folder in (path / name, path):
            if (folder / file).exists():
                return folder
        return None

    return found


def _mnist_folder(path: Path) -> Path | None:
    for folder in (path / "MNIST" / "raw", path / "raw", path):
        if any((folder / f"train-images-idx3-ubyte{end}").exists() for end in ("", ".gz")):
            return folder
    return None


def _read_mnist(folder: Path, _: str | None) -> Parts:
    def array(name: str) -> NDArray[np.uint8]:
        path = folder / name
        packed = not path.exists()
        path = path.with_name(f"{name}.gz") if packed else path
        try:
            raw = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
            sides = [
                int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])
            ]  # the magic number ends in how many sides there are
            values = np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * len(sides))
            if raw[2] != 8 or values.size != math.prod(sides):
                raise ValueError(f"{values.size} bytes for the shape {sides}")
            return values.reshape(sides)
        except (OSError, EOFError, ValueError, IndexError) as error:
            raise DataError(f"{path}: not a readable idx file of bytes ({error}).") from error

    def part(name: str) -> Part:
        pictures, labels = array(f"{name}-images-idx3-ubyte"), array(f"{name}-labels-idx1-ubyte")
        if len(pictures) != len(labels):
            raise DataError(f"{folder}: {len(pictures)} images but {len(labels)} labels of {name}.")
        return Part(pictures, labels.tolist(), tuple("0123456789"))

    return {"train": part("train"), "test": part("t10k")}


# -------------------------------------------------------------------------------------------- CelebA


def _read_celeba(folder: Path, label: str | None) -> Parts:
    lines = _lines(folder / "list_attr_celeba.txt")
    names = lines[1].split() if len(lines) > 1 else []
    asked = names if label == "all" else [name.strip() for name in (label or "").split(",")]
    if not asked or (wrong := [name for name in asked if name not in names]):
        raise ConfigurationError(
            f"label={label!r}: {(wrong if asked else ['nothing'])[0]!r} is not an attribute of CelebA. "
            f"Expected all, or some of: {', '.join(names)}."
        )
    columns = [names.index(name) + 1 for name in asked]
    rows = [line.split() for line in lines[2:]]
    values = {
        row[0]: [int(int(row[column]) > 0) for column in columns]
        for row in rows
        if len(row) == len(names) + 1
    }
    files: dict[str, list[str]] = {"0": [], "1": [], "2": []}  # 1 is for validation
    for line in _lines(folder / "list_eval_partition.txt"):
        file, number = line.split()
        files[number].append(file)
    if lost := [file for group in files.values() for file in group if file not in values]:
        raise DataError(
            f"{folder}: list_attr_celeba.txt has no row for {lost[0]} and {len(lost) - 1} more files."
        )

    def part(number: str) -> Part:
        pictures = [folder / "img_align_celeba" / file for file in files[number]]
        labels = [values[file] for file in files[number]]
        if len(asked) > 1:
            return Part(pictures, labels, tuple(asked), several=True)
        return Part(pictures, [row[0] for row in labels], (f"not {asked[0]}", asked[0]))

    return {"train": part("0"), "test": part("2")}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").strip().splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}).") from error


# ------------------------------------------------------------------------------------------- Parquet


def _parquet_files(path: Path) -> Path | None:
    if path.is_file():
        return path if path.suffix in (".parquet", ".pq") else None
    return path if path.is_dir() and any(path.rglob("*.parquet")) else None


def _read_parquet(path: Path, label: str | None) -> Parts:
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    named: dict[str, list[Path]] = {}
    for file in files:
        stem = file.name.split("-")[0].removesuffix(".parquet")
        named.setdefault({"valid": "validation"}.get(stem, stem), []).append(file)
    test = next((name for name in ("test", "validation") if name in named), None)
    if test is None or len(named) == 1:
        return {"train": _parquet_part(files, label)}
    train = [
        f for name, group in named.items() if name not in ("test", "validation") for f in group
    ]
    parts = {"train": _parquet_part(train, label), "test": _parquet_part(named[test], label)}
    if parts["train"].classes != parts["test"].classes:
        raise DataError(f"{path}: the test part has other classes than the training part.")
    return parts


def _parquet_part(files: Sequence[Path], label: str | None) -> Part:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ConfigurationError(
            f"Reading .parquet needs the package pyarrow ({error}). Install it with: pip install "
            "'dptorch[report]'."
        ) from error
    try:
        table = pa.concat_tables([pq.read_table(file) for file in files])
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{files[0].parent}: not readable as Parquet ({error}).") from error
    kinds = {field.name: field.type for field in table.schema}
    pictures = [
        name
        for name, kind in kinds.items()
        if pa.types.is_binary(kind)
        or (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)
    ]
    column = label or next((c for c in ("label", "labels", "fine_label") if c in kinds), None)
    if not pictures or column is None or column not in kinds:
        raise DataError(
            f"{files[0]}: no column of {'images' if not pictures else f'classes ({column})'} among "
            f"{', '.join(kinds)}. Expected images as bytes, and a column label; or name it by --label."
        )
    cells = table.column(pictures[0]).to_pylist()
    found = [cell["bytes"] if isinstance(cell, dict) else cell for cell in cells]
    if missing := [i for i, cell in enumerate(found) if not cell]:
        raise DataError(f"{files[0]}: row {missing[0]} and {len(missing) - 1} more have no image.")
    values = table.column(column).to_pylist()
    names = _class_names(table.schema.metadata or {}, column)
    if names is None:
        names = tuple(str(v) for v in sorted(set(values), key=lambda v: (isinstance(v, str), v)))
        codes = {name: i for i, name in enumerate(names)}
        return Part(found, [codes[str(value)] for value in values], names)
    return Part(found, [int(value) for value in values], names)


def _class_names(metadata: Mapping[bytes, bytes], column: str) -> tuple[str, ...] | None:
    """The names that Hugging Face wrote into a file, if it did."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features[column]["names"])
    except (KeyError, TypeError, ValueError):
        return None


# -------------------------------------------------------------------------------------------- folders


def _folder(path: Path) -> Path | None:
    if not path.is_dir():
        return None
    root = path / "train" if (path / "train").is_dir() else path
    return path if len(_subfolders(root)) > 1 else None


def _subfolders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _read_folder(path: Path, _: str | None) -> Parts:
    own = (path / "train").is_dir()
    root = path / "train" if own else path
    classes = tuple(folder.name for folder in _subfolders(root))
    held_out = next((path / n for n in ("test", "val") if own and (path / n).is_dir()), None)
    found = {"train": _folder_part(root, classes)}
    if held_out is not None:
        if unknown := sorted({f.name for f in _subfolders(held_out)} - set(classes)):
            raise DataError(f"{held_out}: class {unknown[0]!r} is not in {root}.")
        found["test"] = _folder_part(held_out, classes)
    return found


def _folder_part(root: Path, classes: tuple[str, ...]) -> Part:
    paths: list[Picture] = []
    labels = []
    for label, name in enumerate(classes):
        if not (root / name).is_dir():
            continue
        for path in sorted((root / name).rglob("*")):
            if path.is_dir() or path.name.startswith("."):
                continue
            if path.suffix.lower() not in IMAGE_SUFFIXES:
                raise DataError(
                    f"{path}: not an image file. Expected {', '.join(sorted(IMAGE_SUFFIXES))}. Move "
                    "other files elsewhere."
                )
            paths.append(path)
            labels.append(label)
    return Part(paths, labels, classes)


_BATCHES: Final = [f"data_batch_{i}" for i in range(1, 6)]

#: In the order in which they are looked for.
FORMATS: Final = (
    Format(
        "cifar10",
        _inside("cifar-10-batches-py", "data_batch_1"),
        _cifar(_BATCHES, "test_batch", ("batches.meta", "label_names"), "labels"),
        size=32, torchvision="CIFAR10",
    ),
    Format(
        "cifar100",
        _inside("cifar-100-python", "meta"),
        _cifar(["train"], "test", ("meta", "fine_label_names"), "fine_labels"),
        size=32, torchvision="CIFAR100",
    ),
    Format("mnist", _mnist_folder, _read_mnist, size=28, channels=1, torchvision="MNIST"),
    Format("celeba", _inside("celeba", "list_attr_celeba.txt"), _read_celeba, torchvision="CelebA"),
    Format("parquet", _parquet_files, _read_parquet),
    Format("folder", _folder, _read_folder),
)  # fmt: skip
