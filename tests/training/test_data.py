"""The split, the labels and the scaling."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dptorch.errors import ConfigurationError, DataError
from dptorch.training.data import (
    Examples,
    ReadOptions,
    encode_labels,
    split_by_content,
)
from dptorch.training.readers import load_data


def rows(n: int) -> Examples:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(n, 3, generator=generator)
    return Examples(inputs, torch.arange(n) % 2)


def sides(examples: Examples) -> dict[tuple[float, ...], str]:
    train, test = split_by_content(examples, 0.3, "rows")
    where = {tuple(x.tolist()): "train" for x in train.inputs}
    return where | {tuple(x.tolist()): "test" for x in test.inputs}


def shuffled_sides(examples: Examples) -> dict[tuple[float, ...], str]:
    """The broken twin: the usual seeded shuffle."""
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()
    cut = int(0.3 * len(order))
    return {
        tuple(examples.inputs[i].tolist()): "test" if place < cut else "train"
        for place, i in enumerate(order)
    }


def moved(split: object, removed: int) -> int:
    """How many other examples change sides when one is removed."""
    everyone = rows(100)
    fewer = everyone.take([i for i in range(100) if i != removed])
    before, after = split(everyone), split(fewer)  # type: ignore[operator]
    return sum(before[example] != side for example, side in after.items())


def test_removing_an_example_moves_no_other() -> None:
    assert [moved(sides, removed) for removed in (0, 17, 99)] == [0, 0, 0]


def test_a_seeded_shuffle_is_caught() -> None:
    assert moved(shuffled_sides, 17) > 0


def test_split_is_a_partition_of_about_the_right_size() -> None:
    train, test = split_by_content(rows(2000), 0.3, "rows")
    assert len(train) + len(test) == 2000
    assert 500 < len(test) < 700
    assert not {tuple(x.tolist()) for x in train.inputs} & {tuple(x.tolist()) for x in test.inputs}


def test_duplicates_stay_together() -> None:
    twice = rows(100).take([*range(100), *range(100)])
    train, test = split_by_content(twice, 0.3, "rows")
    assert not {tuple(x.tolist()) for x in train.inputs} & {tuple(x.tolist()) for x in test.inputs}


def test_an_empty_side_is_an_error() -> None:
    with pytest.raises(DataError, match="after the split"):
        split_by_content(rows(1), 0.3, "one.csv")


@pytest.mark.parametrize(
    ("labels", "codes", "names"),
    [
        ([3, 1, 3], [1, 0, 1], ("1", "3")),
        ([1.0, 0.0], [1, 0], ("0", "1")),
        (["b", "a"], [1, 0], ("a", "b")),
        (["2", "10"], [0, 1], ("2", "10")),
        (["2", "x"], [0, 1], ("2", "x")),
        ([True, False], [1, 0], ("False", "True")),
    ],
)
def test_labels_are_numbered_in_order(
    labels: list[object], codes: list[int], names: tuple[str, ...]
) -> None:
    found, classes = encode_labels(labels, "file")
    assert found.tolist() == codes
    assert classes == names


def test_a_regression_target_is_refused() -> None:
    with pytest.raises(DataError, match=r"prices.csv: label 1.5 of example 1 is not a class"):
        encode_labels([1, 1.5], "prices.csv")


def test_one_class_is_refused() -> None:
    with pytest.raises(DataError, match="1 classes"):
        encode_labels([1, 1], "file")


def test_each_column_may_have_its_own_range() -> None:
    options = ReadOptions(column_bounds={"age": (0.0, 100.0), "height": (100.0, 200.0)})
    scaled = options.scale(torch.tensor([[50.0, 200.0], [-5.0, 0.0]]), ["age", "height"])
    assert scaled.tolist() == [[0.0, 1.0], [-1.0, -1.0]]


@pytest.mark.parametrize(
    ("names", "message"),
    [(["age"], "'height' is not in the data"), (["age", "height", "sex"], "'sex' has no range")],
)
def test_ranges_must_fit_the_columns(names: list[str], message: str) -> None:
    options = ReadOptions(column_bounds={"age": (0.0, 100.0), "height": (100.0, 200.0)})
    with pytest.raises(ConfigurationError, match=message):
        options.scale(torch.zeros(1, len(names)), names)


@pytest.mark.parametrize(
    "wrong",
    [
        {"test_fraction": 0.0},
        {"test_fraction": 1.0},
        {"bounds": (1.0, 1.0)},
        {"bounds": (0.0, float("inf"))},
        {"column_bounds": {"age": (5.0, 1.0)}},
        {"channels": 2},
        {"image_size": 0},
    ],
)
def test_impossible_options_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        ReadOptions(**wrong)  # type: ignore[arg-type]


def test_unknown_formats_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.csv does not exist"):
        load_data(tmp_path / "nothing.csv")
    (tmp_path / "data.xlsx").write_bytes(b"")
    with pytest.raises(DataError, match=r"data\.xlsx: cannot tell the format.*\.parquet"):
        load_data(tmp_path / "data.xlsx")


def test_inputs_and_labels_must_agree() -> None:
    with pytest.raises(DataError, match="3 inputs but 2 labels"):
        Examples(torch.zeros(3, 1), torch.zeros(2, dtype=torch.int64))
