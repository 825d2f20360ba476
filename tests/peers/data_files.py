"""Tiny data sets in the files that the originals read: random images that their labels brighten."""

from __future__ import annotations

import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["write_all"]

_DRAW = np.random.default_rng(0)
WORDS = ["the", "a", "food", "pub", "river", "is", "serves", "cheap", "good", "family", "near"]


def write_all(root: Path) -> Path:
    """Write every data set below `root`; returns `root`."""
    write_mnist(root)
    write_cifar(root)
    write_celeba(root / "celeba")
    write_names(root / "names")
    write_e2e(root / "e2e")
    write_sst2(root / "sst2")
    write_archives(root / "archives")
    return root


def images(labels: np.ndarray[Any, Any], *shape: int) -> np.ndarray[Any, Any]:
    """uint8 images [N, *shape], brighter for larger labels."""
    noise = _DRAW.integers(0, 60, (len(labels), *shape))
    return (noise + 15 * labels.reshape(-1, *[1] * len(shape))).astype(np.uint8)


def write_mnist(root: Path, train: int = 160, test: int = 20) -> None:
    """The four IDX files, unpacked."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name, size in (("train", train), ("t10k", test)):
        labels = np.arange(size) % 10
        pixels = images(labels, 28, 28)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(
            struct.pack(">4i", 2051, size, 28, 28) + pixels.tobytes()
        )
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2i", 2049, size) + labels.astype(np.uint8).tobytes()
        )


def write_cifar(root: Path, train: int = 20, test: int = 5) -> None:
    """The pickled batches of CIFAR-10, and those of CIFAR-100."""

    def batch(size: int, key: str) -> dict[str, Any]:
        labels = np.arange(size) % 10
        return {"data": images(labels, 3072), key: labels.tolist()}

    names = [str(i) for i in range(100)]
    ten, hundred = root / "cifar-10-batches-py", root / "cifar-100-python"
    contents: dict[Path, Any] = {
        **{ten / f"data_batch_{i}": batch(train // 5, "labels") for i in range(1, 6)},
        ten / "test_batch": batch(test, "labels"),
        ten / "batches.meta": {"label_names": names[:10]},
        hundred / "train": batch(train, "fine_labels"),
        hundred / "test": batch(test, "fine_labels"),
        hundred / "meta": {"fine_label_names": names},
    }
    for path, content in contents.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pickle.dumps(content))


def write_celeba(folder: Path, train: int = 20, test: int = 5) -> None:
    """Images with 40 attributes of -1 or 1, and the other tables that CelebA comes with."""
    from PIL import Image

    (folder / "img_align_celeba").mkdir(parents=True)
    names = [f"{i:06d}.jpg" for i in range(1, train + test + 1)]
    numbers = np.arange(len(names))
    attributes = [[2 * ((i >> j % 4) & 1) - 1 for j in range(40)] for i in numbers]
    for name, pixels in zip(names, images(numbers % 10, 32, 32, 3), strict=True):
        Image.fromarray(pixels).save(folder / "img_align_celeba" / name)

    def table(file: str, columns: list[str] | None, rows: list[list[int]]) -> None:
        head = [] if columns is None else [str(len(rows)), " ".join(columns)]
        lines = [" ".join([n, *map(str, row)]) for n, row in zip(names, rows, strict=True)]
        (folder / file).write_text("\n".join([*head, *lines]) + "\n")

    table("list_attr_celeba.txt", [f"attribute{j}" for j in range(40)], attributes)
    table("list_eval_partition.txt", None, [[0 if i < train else 2] for i in numbers])
    table("identity_CelebA.txt", None, [[int(i)] for i in numbers])
    table(
        "list_bbox_celeba.txt",
        ["image_id", "x_1", "y_1", "width", "height"],
        [[0] * 4] * len(names),
    )
    points = [f"{place}_{axis}" for place in "abcde" for axis in "xy"]
    table("list_landmarks_align_celeba.txt", points, [[0] * 10] * len(names))


def write_names(folder: Path, each: int = 40) -> None:
    """One text file of names for each language."""
    folder.mkdir()
    for language in ("English", "Greek"):
        letters = list("abcdefgh" if language == "English" else "klmnopos")
        rows = ["".join(_DRAW.choice(letters, 6)) for _ in range(each)]
        (folder / f"{language}.txt").write_text("\n".join(rows) + "\n")


def sentence(words: int = 6) -> str:
    return " ".join(_DRAW.choice(WORDS, words))


def write_e2e(folder: Path, size: int = 24) -> None:
    """E2E in the format of prefix tuning: ``fields || sentence`` a line."""
    (folder / "data/prefix-tuning/e2e_data").mkdir(parents=True)
    for name in ("src1_train", "src1_valid", "src1_test"):
        rows = [f"name : {sentence(1)} | Type : {sentence(1)} || {sentence()}" for _ in range(size)]
        path = folder / "data/prefix-tuning/e2e_data" / f"{name}.txt"
        path.write_text("\n".join(rows) + "\n")
        path.with_name(f"prompts_{name.removeprefix('src1_')}.txt").write_text(
            "\n".join(row.partition("||")[0].strip() for row in rows[:4]) + "\n"
        )


def write_sst2(folder: Path, size: int = 24) -> None:
    """SST-2 as GLUE has it: a head, then ``sentence<TAB>label``."""
    folder.mkdir()
    for name in ("train", "dev", "test"):
        rows = [f"{sentence()}\t{i % 2}" for i in range(size)]
        (folder / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")


def write_archives(folder: Path) -> None:
    """What notebooks download, by the last part of its address: names by language, and SNLI."""
    folder.mkdir()
    with zipfile.ZipFile(folder / "data.zip", "w") as archive:
        for path in sorted((folder.parent / "names").iterdir()):
            archive.write(path, f"data/names/{path.name}")
    labels = ["contradiction", "entailment", "neutral"]
    with zipfile.ZipFile(folder / "snli_1.0.zip", "w") as archive:
        for name in ("train", "dev"):
            rows = [f"{labels[i % 3]}\t{sentence()}\t{sentence()}" for i in range(96)]
            text = "\n".join(["gold_label\tsentence1\tsentence2", *rows]) + "\n"
            archive.writestr(f"snli_1.0/snli_1.0_{name}.txt", text)
