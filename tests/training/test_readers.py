"""Each format, good and bad; a bad file is named, and so is its row."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from dptorch.errors import DataError
from dptorch.training.data import ReadOptions, TrainTest
from dptorch.training.readers import load_data


def everything(data: TrainTest) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels of both sides, train first."""
    items = [side[i] for side in (data.train, data.test) for i in range(len(side))]  # type: ignore[arg-type]
    return torch.stack([x for x, _ in items]), torch.tensor([y for _, y in items])


def csv_text(n: int = 40) -> str:
    lines = [f"{i},{0.5 * i},{'yes' if i % 2 else 'no'}" for i in range(n)]
    return "\n".join(["a,b,label", *lines]) + "\n"


# ------------------------------------------------------------------------------------------- CSV


@pytest.mark.parametrize("name", ["table.csv", "table.csv.gz"])
def test_csv(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(
        gzip.compress(csv_text().encode()) if name.endswith("gz") else csv_text().encode()
    )
    data = load_data(path)
    x, y = everything(data)
    assert data.classes == ("no", "yes")
    assert data.input_shape == (2,)
    assert sum(data.sizes) == 40
    torch.testing.assert_close(x[:, 1], 0.5 * x[:, 0])
    assert torch.equal(y, x[:, 0].long() % 2)


def test_csv_with_a_byte_order_mark_and_bounds(tmp_path: Path) -> None:
    path = tmp_path / "excel.csv"
    path.write_text("\ufeff" + csv_text(), encoding="utf-8")
    x, _ = everything(load_data(path, ReadOptions(bounds=(0.0, 10.0))))
    assert x.min() == -1
    assert x.max() == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,label\n1,x\noops,y\n", r"line 3, column 'a': 'oops' is not a finite number"),
        ("a,label\n1,x\n,y\n", r"line 3, column 'a': ''"),
        ("a,label\n1,x\nnan,y\n", r"line 3, column 'a': 'nan'"),
        ("a,label\n1,x\n1,2,y\n", r"line 3: 3 fields, but the header has 2"),
        ("a,label\n1,x\n2,\n", r"line 3, column 'label': the label is empty"),
        ("a,b\n1,2\n", r"no column 'label'. Found a, b.*--label"),
        ("label\nx\n", r"'label' is the only column"),
        ("label,a,label\nx,1,y\n", r"2 columns are called 'label'"),
        ("a,label\n", r"no rows under the header"),
        ("", r"no column 'label'. Found none"),
        ('a,label\n1,"x\n', r"table\.csv"),
    ],
)
def test_bad_csv_names_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        load_data(path)
    assert "table.csv" in str(caught.value)


def test_csv_of_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(b"a,label\n\xff\xfe,1\n")
    with pytest.raises(DataError, match="not UTF-8"):
        load_data(path)


def test_broken_gzip_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.csv.gz"
    path.write_bytes(gzip.compress(csv_text().encode())[:-20])
    with pytest.raises(DataError, match=r"table\.csv\.gz.*cannot be read"):
        load_data(path)


# --------------------------------------------------------------------------------------- Parquet


def write_parquet(path: Path, columns: dict[str, list[object]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(columns), path)
    return path


def test_parquet(tmp_path: Path) -> None:
    columns = {
        "a": [float(i) for i in range(40)],
        "flag": [i % 3 == 0 for i in range(40)],
        "kind": ["u" if i % 2 else "v" for i in range(40)],
    }
    path = write_parquet(tmp_path / "table.parquet", columns)
    data = load_data(path, ReadOptions(label="kind"))
    x, y = everything(data)
    assert data.classes == ("u", "v")
    assert torch.equal(y, 1 - x[:, 0].long() % 2)
    assert torch.equal(x[:, 1], (x[:, 0] % 3 == 0).float())


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"a": [1.0, None], "label": [0, 1]}, r"row 1, column 'a': an empty cell"),
        ({"a": [1.0, 2.0], "label": [0, None]}, r"row 1, column 'label': the label is empty"),
        ({"a": ["u", "v"], "label": [0, 1]}, r"column 'a': text is not a number"),
        (
            {"a": [1.0, float("inf")], "label": [0, 1]},
            r"row 1, column 'a': inf is not a finite number",
        ),
        ({"a": [1.0]}, r"no column 'label'"),
    ],
)
def test_bad_parquet_names_file_and_row(
    tmp_path: Path, columns: dict[str, list[object]], message: str
) -> None:
    path = write_parquet(tmp_path / "table.parquet", columns)
    with pytest.raises(DataError, match=message) as caught:
        load_data(path)
    assert "table.parquet" in str(caught.value)


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "table.parquet"
    path.write_bytes(b"not parquet")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        load_data(path)


# ------------------------------------------------------------------------------------------- npz


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((40, 5), (5,)),
        ((40, 8, 8), (1, 8, 8)),
        ((40, 3, 8, 8), (3, 8, 8)),
        ((40, 8, 8, 3), (3, 8, 8)),
    ],
)
def test_npz_shapes(tmp_path: Path, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    path = tmp_path / "arrays.npz"
    np.savez(path, x=np.random.default_rng(0).random(shape), y=np.arange(40) % 4)
    data = load_data(path)
    assert data.input_shape == expected
    assert data.train[0][0].shape == expected
    assert data.train[0][0].dtype == torch.float32
    assert data.classes == ("0", "1", "2", "3")


def test_npz_with_its_own_test_set_is_not_split(tmp_path: Path) -> None:
    path = tmp_path / "arrays.npz"
    x = np.arange(60.0).reshape(30, 2)
    y = np.arange(30) % 3
    np.savez(path, x_train=x[:20], y_train=y[:20], x_test=x[20:], y_test=y[20:])
    data = load_data(path)
    assert data.sizes == (20, 10)
    assert data.test[0][0].tolist() == [40.0, 41.0]


def test_npz_bytes_and_fractions_give_the_same_image(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    for name, x in {"bytes": pixels, "floats": pixels / 255}.items():
        np.savez(
            tmp_path / f"{name}.npz", x=x, x_test=x, y=np.arange(40) % 2, y_test=np.arange(40) % 2
        )
    as_bytes, as_floats = (load_data(tmp_path / f"{n}.npz") for n in ("bytes", "floats"))
    torch.testing.assert_close(as_bytes.train[7][0], as_floats.train[7][0])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.zeros(3)}, r"no array 'x'. Found a"),
        ({"x": np.zeros((3, 2))}, r"no array 'y'. Found x"),
        ({"x": np.zeros((3, 2)), "y": np.arange(4)}, r"x has 3 rows, y has 4"),
        ({"x": np.zeros(3), "y": np.arange(3)}, r"'x' has shape \(3,\)"),
        ({"x": np.zeros((3, 2)), "y": np.zeros((3, 2))}, r"'y' has shape \(3, 2\)"),
        ({"x": np.array([[1.0], [np.nan]]), "y": np.arange(2)}, r"'x': row 1 holds NaN"),
        ({"x": np.zeros((0, 2)), "y": np.zeros(0)}, r"shape \(0, 2\) holds no example"),
        ({"x": np.zeros((3, 2)), "y": np.arange(3), "x_test": np.zeros((1, 2))}, r"must both be"),
        (
            {
                "x": np.zeros((3, 2)),
                "y": np.arange(3),
                "x_test": np.zeros((1, 3)),
                "y_test": np.zeros(1),
            },
            r"Expected the same",
        ),
        ({"x": np.array([{}, {}]), "y": np.arange(2)}, r"not a readable \.npz file"),
    ],
)
def test_bad_npz_names_file_and_array(
    tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    path = tmp_path / "arrays.npz"
    np.savez(path, **arrays)
    with pytest.raises(DataError, match=message) as caught:
        load_data(path)
    assert "arrays.npz" in str(caught.value)


def test_garbage_npz_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "arrays.npz"
    path.write_bytes(b"PK garbage")
    with pytest.raises(DataError, match=r"not a readable \.npz file"):
        load_data(path)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(DataError, match=r"np\.savez"):
        load_data(path)


# ----------------------------------------------------------------------------------- image folder


def write_images(root: Path, per_class: int = 12) -> Path:
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)
            image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def test_image_folder(tmp_path: Path) -> None:
    root = write_images(tmp_path / "photos")
    (root / ".DS_Store").write_bytes(b"")
    data = load_data(root, ReadOptions(image_size=16, channels=1))
    x, y = everything(data)
    assert data.classes == ("ant", "bee")
    assert x.shape == (24, 1, 16, 16)
    assert y.bincount().tolist() == [12, 12]
    torch.testing.assert_close(x.mean((1, 2, 3)), torch.zeros(24), atol=1e-5, rtol=0)


def test_image_folder_with_its_own_test_set(tmp_path: Path) -> None:
    write_images(tmp_path / "photos" / "train", 5)
    write_images(tmp_path / "photos" / "test", 2)
    data = load_data(tmp_path / "photos")
    assert data.sizes == (10, 4)
    assert data.input_shape == (3, 28, 28)


def test_an_image_that_is_none_is_named(tmp_path: Path) -> None:
    root = write_images(tmp_path / "photos")
    (root / "bee" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(DataError, match=r"broken\.png: not a readable image"):
        load_data(root)


def test_other_files_among_images_are_named(tmp_path: Path) -> None:
    root = write_images(tmp_path / "photos")
    (root / "bee" / "notes.txt").write_text("sting")
    with pytest.raises(DataError, match=r"notes\.txt: not an image file"):
        load_data(root)


def test_a_truncated_image_is_named_when_it_is_read(tmp_path: Path) -> None:
    root = write_images(tmp_path / "photos" / "train", 3).parent
    write_images(root / "test", 1)
    whole = (root / "train" / "ant" / "0.png").read_bytes()
    data = load_data(root)
    (root / "train" / "ant" / "0.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"0\.png: not a readable image"):
        data.train[0]


def test_a_folder_without_classes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "only").mkdir()
    with pytest.raises(DataError, match=r"found 1 class folders \(only\)"):
        load_data(tmp_path)


def test_a_class_only_in_the_test_set_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "train", 2)
    write_images(tmp_path / "test", 2)
    (tmp_path / "test" / "cow").mkdir()
    with pytest.raises(DataError, match="'cow' is not in"):
        load_data(tmp_path)
