"""Small image data sets in the files of torchvision and Hugging Face: colours tell the class."""

from __future__ import annotations

import gzip
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Arrays = tuple[NDArray[np.uint8], list[int]]


def colours(size: int, classes: int, *, side: int = 32, seed: int = 0) -> Arrays:
    """Pictures [size, side, side, 3] with noise, and labels by which of them are told apart."""
    draw = np.random.default_rng(seed)
    labels = np.arange(size) % classes
    means = np.stack([labels % 2, labels // 2 % 2, labels // 4 % 3], 1) * 80 + 30
    noise = draw.integers(0, 50, (size, side, side, 3))
    return (means[:, None, None, :] + noise).astype(np.uint8), labels.tolist()


def write_cifar10(root: Path, *, train: int = 100, test: int = 40) -> Path:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)

    def write(file: str, content: Any) -> None:
        (folder / file).write_bytes(pickle.dumps(content, protocol=2))

    def batch(file: str, size: int, seed: int) -> None:
        pictures, labels = colours(size, 10, seed=seed)
        write(file, {"data": pictures.transpose(0, 3, 1, 2).reshape(size, 3072), "labels": labels})

    for i in range(1, 6):
        batch(f"data_batch_{i}", train // 5, i)
    batch("test_batch", test, 6)
    write("batches.meta", {"label_names": [f"class {i}" for i in range(10)]})
    return root


def write_cifar100(root: Path, *, train: int = 200, test: int = 100) -> Path:
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for file, size in (("train", train), ("test", test)):
        pictures, labels = colours(size, 100)
        data = pictures.transpose(0, 3, 1, 2).reshape(size, 3072)
        (folder / file).write_bytes(pickle.dumps({"data": data, "fine_labels": labels}, protocol=2))
    names = {"fine_label_names": [str(i) for i in range(100)]}
    (folder / "meta").write_bytes(pickle.dumps(names, protocol=2))
    return root


def write_mnist(root: Path, *, train: int = 60, test: int = 20, packed: bool = False) -> Path:
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)

    def write(name: str, array: NDArray[np.uint8]) -> None:
        head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
        raw = head + array.tobytes()
        (folder / (f"{name}.gz" if packed else name)).write_bytes(
            gzip.compress(raw) if packed else raw
        )

    for name, size in (("train", train), ("t10k", test)):
        pictures, labels = colours(size, 10, side=28)
        write(f"{name}-images-idx3-ubyte", np.ascontiguousarray(pictures[..., 0]))
        write(f"{name}-labels-idx1-ubyte", np.array(labels, dtype=np.uint8))
    return root


def write_celeba(root: Path, *, size: int = 30) -> Path:
    folder = root / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    pictures, labels = colours(size, 4, side=24)
    names = [f"{i + 1:06d}.jpg" for i in range(size)]
    rows = [f"{size}", "Male Smiling Young"]
    for name, picture, label in zip(names, pictures, labels, strict=True):
        Image.fromarray(picture).save(folder / "img_align_celeba" / name, quality=95)
        values = [label % 2, label // 2, 1]
        rows.append(name + " " + " ".join(f"{2 * value - 1:2d}" for value in values))
    (folder / "list_attr_celeba.txt").write_text("\n".join(rows) + "\n")
    parts = [f"{name} {0 if i < size // 2 else 1 + i % 2}" for i, name in enumerate(names)]
    (folder / "list_eval_partition.txt").write_text("\n".join(parts) + "\n")
    return root


def png(picture: NDArray[np.uint8]) -> bytes:
    data = io.BytesIO()
    Image.fromarray(picture).save(data, "PNG")
    return data.getvalue()


def write_parquet(root: Path, *, named: bool = True) -> Path:
    """Two training files and a test file, as `datasets` pushes them to the hub."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = root / "plain_text"
    folder.mkdir(parents=True)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("img", image), ("label", pa.int64())])
    if named:
        features = '{"label": {"names": ["red", "green", "blue"], "_type": "ClassLabel"}}'
        schema = schema.with_metadata({"huggingface": f'{{"info": {{"features": {features}}}}}'})
    files = {"train-00000-of-00002": 24, "train-00001-of-00002": 24, "test-00000-of-00001": 12}
    for file, size in files.items():
        pictures, labels = colours(size, 3)
        cells = [{"bytes": png(picture), "path": None} for picture in pictures]
        table = pa.table({"img": cells, "label": labels}, schema=schema)
        pq.write_table(table, folder / f"{file}.parquet")
    return root


def write_folder(root: Path, *, size: int = 40, own_test: bool = False) -> Path:
    for part in ("train", "val") if own_test else ("",):
        pictures, labels = colours(size, 2, side=20, seed=len(part))
        for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
            folder = root / part / ("cat", "dog")[label]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i}.png").write_bytes(png(picture))
    return root
