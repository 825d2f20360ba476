"""Training and test examples of a run, and what is known of the data set.

A data set here is any map-style `torch.utils.data.Dataset` whose items are (input, label): a
float32 tensor and an integer class. Its *shape* (the form of one input, the names of the classes,
the number of training examples) is taken as public knowledge, as the plan's statement says; the
examples themselves are private.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dptorch.errors import ConfigurationError, DataError, one_of
from dptorch.tables import Schema

__all__ = [
    "CLASSES_READ",
    "Examples",
    "ReadOptions",
    "TableFacts",
    "TrainTest",
    "encode_labels",
    "is_held_out",
    "parse_bounds",
    "split_by_content",
]

Example = tuple[Tensor, int | float]


@dataclass(frozen=True, eq=False)
class Examples(Dataset[Example]):
    """Examples held in memory.

    Attributes:
        inputs: float32 [N, *shape].
        labels: int64 [N], values in 0 .. number of classes - 1; or targets, float32 [N].

    Example:
        >>> data = Examples(torch.zeros(4, 3), torch.tensor([0, 1, 0, 1]))
        >>> len(data), data[1][1]
        (4, 1)
    """

    inputs: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.labels):
            raise DataError(f"{len(self.inputs)} inputs but {len(self.labels)} labels.")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        return self.inputs[index], self.labels[index].item()

    def __getitems__(self, indices: list[int]) -> list[Example]:
        # What a data loader asks for: a hundred thousand rows at once are not indexed one by one.
        part = self.take(indices)
        return list(zip(part.inputs.unbind(0), part.labels.tolist(), strict=True))

    def take(self, indices: Sequence[int]) -> Examples:
        """The examples at `indices`, in that order."""
        at = torch.as_tensor(indices, dtype=torch.int64)
        return Examples(self.inputs[at], self.labels[at])


@dataclass(frozen=True)
class TableFacts:
    """What is known of a table besides its examples.

    Attributes:
        schema: what is public about it.
        units: the unit of each training example, if the schema has a unit.
        skipped: rows that were left out because of a fault.
        subgroups: the values of columns by which test results are told apart, for each test example.
    """

    schema: Schema
    units: tuple[str, ...] | None = None
    skipped: int = 0
    subgroups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


#: `TrainTest.read_from_data` where nobody but the labels says which classes there are.
CLASSES_READ = ("the list of classes",)


@dataclass(frozen=True)
class TrainTest:
    """A training set, a test set that shares no example with it, and what is public about both.

    Attributes:
        train: private; the guarantee covers these examples.
        test: measured exactly after every epoch. The guarantee does *not* cover these examples.
        classes: the name of class 0, 1, ...
        input_shape: shape of one input.
        source: one line for the report: where the data came from.
        preparation: what was done to an input, so that it can be done again to predict: plain values,
            which `dptorch.training.preparation` understands.
        table: what is known of a table; None for other data.
        read_from_data: what was read off the private data beside a table's schema, in words.
    """

    train: Dataset[Example]
    test: Dataset[Example]
    classes: tuple[str, ...]
    input_shape: tuple[int, ...]
    source: str
    preparation: Mapping[str, Any] = field(default_factory=dict)
    table: TableFacts | None = None
    read_from_data: tuple[str, ...] = ()

    @property
    def sizes(self) -> tuple[int, int]:
        """Number of training and of test examples."""
        return len(self.train), len(self.test)  # type: ignore[arg-type]

    @property
    def records(self) -> int:
        """Number of training records that the guarantee counts: units of a table that has some."""
        units = None if self.table is None else self.table.units
        return self.sizes[0] if units is None else len(set(units))

    @property
    def outputs(self) -> int:
        """How many numbers a model of this data gives: one for each class, or one target."""
        return len(self.classes) or 1


@dataclass(frozen=True)
class ReadOptions:
    """How to read a data file; every field is public.

    Attributes:
        label: name of the label column (CSV, Parquet).
        bounds: tabular values are clipped to (low, high) and scaled to [-1, 1]. The range must come
            from what the columns mean, not from the data. None leaves the values as they are.
        column_bounds: a range of its own for each column, by name (CSV, Parquet).
        image_size: side to which images in a folder are resized.
        channels: 1 (grey) or 3 (RGB), for images in a folder.
        test_fraction: share of the examples held out, when the data has no test set of its own.
        schema: path of a table's schema; it then says the label and the bounds.
        unit_column: of a table, the column that says whom the guarantee protects.
        on_bad_row: "error", or "skip" to leave out the rows of a table that do not fit.
        subgroups: columns of a table, with commas, by whose values test results are told apart.
    """

    label: str = "label"
    bounds: tuple[float, float] | None = None
    column_bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    image_size: int = 28
    channels: int = 3
    test_fraction: float = 0.2
    schema: str | None = None
    unit_column: str | None = None
    on_bad_row: str = "error"
    subgroups: str | None = None

    def __post_init__(self) -> None:
        one_of("on_bad_row", self.on_bad_row, ("error", "skip"))
        if not 0 < self.test_fraction < 1:
            raise ConfigurationError(
                f"test_fraction={self.test_fraction} is outside (0, 1): expected the share of "
                f"examples to hold out, such as 0.2."
            )
        ranges = [*self.column_bounds.items(), ("every column", self.bounds)]
        for column, bounds in ranges:
            if bounds is not None and not (
                bounds[0] < bounds[1] and math.isfinite(bounds[1] - bounds[0])
            ):
                raise ConfigurationError(
                    f"bounds of {column}: {bounds[0]:g} to {bounds[1]:g}. Expected finite numbers, "
                    f"low < high."
                )
        if self.channels not in (1, 3):
            raise ConfigurationError(f"channels={self.channels}: expected 1 (grey) or 3 (RGB).")
        if self.image_size < 1:
            raise ConfigurationError(f"image_size={self.image_size}: expected a positive side.")

    def scale(self, values: Tensor, columns: Sequence[str]) -> Tensor:
        """Apply the bounds to tabular values [N, D] with D named columns.

        Raises:
            ConfigurationError: `column_bounds` is not empty and does not fit the columns.

        Example:
            >>> options = ReadOptions(bounds=(0.0, 10.0))
            >>> options.scale(torch.tensor([[0.0, 5.0, 99.0]]), ["a", "b", "c"]).tolist()
            [[-1.0, 0.0, 1.0]]
        """
        found = self.ranges(columns)
        if self.bounds is None and not self.column_bounds:
            return values
        ranges = torch.tensor([found[c] for c in columns])
        low, high = ranges.to(values).unbind(1)
        return (torch.minimum(torch.maximum(values, low), high) - low) * (2 / (high - low)) - 1

    def ranges(self, columns: Sequence[str]) -> dict[str, tuple[float, float] | None]:
        """The range of each column; None where values stay as they are.

        Raises:
            ConfigurationError: `column_bounds` is not empty and does not fit the columns.
        """
        if self.column_bounds:
            missing = [c for c in columns if c not in self.column_bounds]
            unknown = [c for c in self.column_bounds if c not in columns]
            if missing or unknown:
                raise ConfigurationError(
                    f"--bounds: column {(missing + unknown)[0]!r} "
                    + ("has no range" if missing else "is not in the data")
                    + f". Expected a range for each of: {', '.join(columns)}."
                )
        return {c: self.column_bounds.get(c, self.bounds) for c in columns}


Range = tuple[float, float]


def parse_bounds(text: str | None) -> tuple[Range | None, dict[str, Range]]:
    """What the option ``--bounds`` says: (one range for all columns, a range for each).

    Args:
        text: two numbers with a comma, or the path of a JSON file of ranges by column.

    Raises:
        ConfigurationError: for anything else.

    Example:
        >>> parse_bounds("0,255")
        ((0.0, 255.0), {})
    """
    if text is None:
        return None, {}
    try:
        if text.endswith(".json"):
            ranges = json.loads(Path(text).read_text(encoding="utf-8"))
            return None, {str(k): (float(low), float(high)) for k, (low, high) in ranges.items()}
        low, high = (float(part) for part in text.split(","))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigurationError(
            f"bounds={text!r} cannot be read ({error}). Expected two numbers, such as 0,255, or "
            f'a JSON file such as {{"age": [0, 120], "height": [0, 250]}}.'
        ) from None
    return (low, high), {}


def is_held_out(content: bytes, fraction: float) -> bool:
    """Whether an example belongs to the test set, decided by a hash of its content alone.

    Guarantees:
        The side an example is on depends on no other example. A shuffled split would move others
        when one is added or removed, and the guarantee is about exactly that change. Equal
        examples land on the same side, so a duplicate cannot leak into the test set.
        Held by `test_removing_an_example_moves_no_other` and `test_duplicates_stay_together`.

    Example:
        >>> sides = [is_held_out(str(i).encode(), 0.2) for i in range(1000)]
        >>> 150 < sum(sides) < 250
        True
    """
    digest = hashlib.blake2b(content, digest_size=8, person=b"dptorch split").digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def split_by_content(examples: Examples, fraction: float, source: str) -> tuple[Examples, Examples]:
    """Split in-memory examples into (train, test) by `is_held_out` of each input's bytes.

    Raises:
        DataError: one side would be empty.
    """
    held_out = [is_held_out(x.numpy().tobytes(), fraction) for x in examples.inputs]
    train = examples.take([i for i, out in enumerate(held_out) if not out])
    test = examples.take([i for i, out in enumerate(held_out) if out])
    refuse_empty(len(train), len(test), source)
    return train, test


def refuse_empty(train: int, test: int, source: str) -> None:
    """Raise a `DataError` unless both sides of a split have examples."""
    if train == 0 or test == 0:
        raise DataError(
            f"{source}: {train} training and {test} test examples after the split. Both sides "
            f"need some. Add data, or bring a test set of its own (npz: x_test and y_test; image "
            f"folder: train/ and test/)."
        )


def encode_labels(labels: Iterable[object], source: str) -> tuple[Tensor, tuple[str, ...]]:
    """Number the classes in sorted order.

    Args:
        labels: one per example: integers, strings or booleans. Whole floats count as integers.
        source: for messages.

    Returns:
        int64 [N] and the class names.

    Raises:
        DataError: a fractional number (that is a regression target), or fewer than two classes.

    Example:
        >>> codes, names = encode_labels(["cat", "ant", "cat"], "pets.csv")
        >>> codes.tolist(), names
        ([1, 0, 1], ('ant', 'cat'))
        >>> encode_labels(["10", "9"], "ages.csv")[1]  # numbers sort as numbers
        ('9', '10')
    """
    values = list(labels)
    keys: list[int | str] = []
    for row, value in enumerate(values):
        try:
            number = float(str(value))
        except ValueError:
            keys.append(str(value))
            continue
        if not number.is_integer():
            raise DataError(
                f"{source}: label {value!r} of example {row} is not a class. Expected an integer "
                f"or a name. For a number to predict (regression), say its "
                f"bounds in a schema: dptorch schema."
            )
        keys.append(int(number))
    if any(isinstance(k, str) for k in keys):
        keys = [str(v) for v in values]
    distinct = sorted(set(keys), key=lambda k: (isinstance(k, str), k))
    if len(distinct) < 2:
        raise DataError(f"{source}: {len(distinct)} classes among the labels. Expected at least 2.")
    code = {k: i for i, k in enumerate(distinct)}
    return torch.tensor([code[k] for k in keys]), tuple(str(k) for k in distinct)
