"""Image data sets in the files of torchvision and Hugging Face."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dptorch.errors import ConfigurationError, DataError
from dptorch.training.pictures import Look
from dptorch.vision.dataset import read_pictures
from tests.vision.files import (
    colours,
    write_celeba,
    write_cifar10,
    write_cifar100,
    write_folder,
    write_mnist,
    write_parquet,
)

LOOK = Look(size=32, scale="half")


@pytest.mark.parametrize(
    ("write", "sizes", "classes"),
    [
        (write_cifar10, (100, 40), [f"class {i}" for i in range(10)]),
        (write_cifar100, (200, 100), [str(i) for i in range(100)]),
        (write_mnist, (60, 20), list("0123456789")),
        (write_parquet, (48, 12), ["red", "green", "blue"]),
        (write_folder, (32, 8), ["cat", "dog"]),
    ],
)
def test_what_is_there_is_found_and_read(
    tmp_path: Path, write: Callable[[Path], Path], sizes: tuple[int, int], classes: list[str]
) -> None:
    data = read_pictures(str(write(tmp_path)), LOOK)
    assert data.sizes == sizes
    assert list(data.classes) == classes
    x, y = data.train[0]
    assert x.shape == data.input_shape == (3, 32, 32)
    assert x.dtype == torch.float32
    assert -1 <= float(x.min()) < float(x.max()) <= 1
    labels = {int(data.train[i][1]) for i in range(sizes[0])}
    assert labels == set(range(len(classes)))
    assert isinstance(y, int)


def test_pixels_are_those_of_the_files(tmp_path: Path) -> None:
    data: Any = read_pictures(str(write_cifar10(tmp_path)), LOOK)
    pictures, labels = colours(20, 10, seed=1)
    for i in range(20):
        x, y = data.train[i]
        assert y == labels[i]
        back = ((x + 1) * 127.5).round().numpy().astype(np.uint8)
        assert np.array_equal(back.transpose(1, 2, 0), pictures[i])


def test_a_folder_inside_is_as_good_as_the_one_around(tmp_path: Path) -> None:
    write_mnist(tmp_path, packed=True)
    inner: Any = read_pictures(str(tmp_path / "MNIST" / "raw"), Look(28, 1))
    outer: Any = read_pictures(str(tmp_path), Look(28, 1), format="mnist")
    assert torch.equal(inner.train[3][0], outer.train[3][0])


def test_attributes_are_two_classes_or_several(tmp_path: Path) -> None:
    root = str(write_celeba(tmp_path))
    one: Any = read_pictures(root, LOOK, label="Smiling")
    assert one.classes == ("not Smiling", "Smiling")
    assert [one.train[i][1] for i in range(4)] == [0, 0, 1, 1]
    every: Any = read_pictures(root, LOOK, label="all")
    assert every.classes == ("Male", "Smiling", "Young")
    assert every.preparation["several"] is True
    assert every.train[3][1].tolist() == [1.0, 1.0, 1.0]
    assert every.sizes == (15, 8)
    with pytest.raises(
        ConfigurationError, match=r"'Smily' is not an attribute.*Male, Smiling, Young"
    ):
        read_pictures(root, LOOK, label="Smily")


def test_numbers_are_classes_where_nothing_names_them(tmp_path: Path) -> None:
    data = read_pictures(str(write_parquet(tmp_path, named=False)), LOOK)
    assert data.classes == ("0", "1", "2")
    with pytest.raises(DataError, match=r"no column of classes \(kind\) among img, label"):
        read_pictures(str(tmp_path), LOOK, label="kind")


def test_a_folder_may_have_its_own_test_set(tmp_path: Path) -> None:
    assert read_pictures(str(write_folder(tmp_path, own_test=True)), LOOK).sizes == (40, 40)


def test_the_expected_layout_is_shown(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"no cifar10 there.*\n  cifar10: cifar-10-batches-py/ with"
    ):
        read_pictures(str(tmp_path), LOOK, format="cifar10")
    with pytest.raises(
        DataError, match=r"no image data set there(.|\n)*mnist: MNIST/raw/(.|\n)*celeba"
    ):
        read_pictures(str(tmp_path), LOOK)
    with pytest.raises(DataError, match="none: no image data set there"):
        read_pictures(str(tmp_path / "none"), LOOK)


def test_corrupt_pictures_are_listed_together(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    (root / "cat" / "0.png").write_bytes(b"no picture")
    whole = (root / "dog" / "1.png").read_bytes()
    (root / "dog" / "1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError) as caught:
        read_pictures(str(root), LOOK)
    head, *faults = str(caught.value).split("\n  ")
    assert head.startswith("2 images cannot be read")
    assert ["0.png" in faults[0], "1.png" in faults[1]] == [True, True]


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> Any:
            return Path.mkdir, (tmp_path / "done",)

    root = write_cifar10(tmp_path)
    (root / "cifar-10-batches-py" / "data_batch_2").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(DataError, match="data_batch_2: not a file of CIFAR"):
        read_pictures(str(root), LOOK)
    assert not (tmp_path / "done").exists()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "train-images-idx3-ubyte",
            b"\0\0\x08\x03" + b"\0\0\0\x05" * 3 + b"x",
            "idx file of bytes",
        ),
        ("t10k-labels-idx1-ubyte", b"", "idx file of bytes"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    root = write_mnist(tmp_path)
    (root / "MNIST" / "raw" / file).write_bytes(content)
    with pytest.raises(DataError, match=f"{file}: not a readable {message}"):
        read_pictures(str(root), Look(28, 1))
