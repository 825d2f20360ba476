"""Read the two sets of records of a membership test, remove what both hold, and note concerns."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

from dptorch.audit.membership.classifier import FEWEST_RECORDS
from dptorch.errors import DataError

__all__ = ["DIFFERENT_SETS", "concerns", "texts_of", "without_overlap"]

Record = TypeVar("Record")
_ENOUGH = 100
DIFFERENT_SETS = (
    "the two sets differ by themselves: a classifier that never sees the model tells them apart with "
    "AUC {auc:.2f}. What the attack reaches is then no sign that the model remembers anything. Take "
    "both sets from one distribution, by a random split."
)


def texts_of(dataset: Any, column: str = "text") -> list[str]:
    """The texts of a data set: a list of strings, or of mappings with that column, as Hugging Face
    datasets are.

    Raises:
        DataError: something else.

    Example:
        >>> texts_of(["a b", "c"]), texts_of([{"text": "a b"}])
        (['a b', 'c'], ['a b'])
    """
    if isinstance(dataset, str):
        raise DataError("a single string is no data set: pass a list of texts.")
    found: list[str] = []
    for i in range(len(dataset)):
        item = dataset[i]
        if isinstance(item, Mapping):
            if column not in item:
                raise DataError(
                    f"record {i} has no column {column!r}; it has {', '.join(map(str, item))}. Name "
                    "the column with LanguageMIA(text_column=...)."
                )
            item = item[column]
        if not isinstance(item, str):
            raise DataError(
                f"record {i} is a {type(item).__name__}. Expected a text, or a mapping with the "
                f"column {column!r}."
            )
        found.append(item)
    return found


def without_overlap(
    members: Sequence[Record],
    others: Sequence[Record],
    key: Callable[[Record], Hashable],
    warnings: list[str],
) -> tuple[list[Record], list[Record]]:
    """Both sets, without the non-members that are members too.

    Raises:
        DataError: no non-member is left.

    Example:
        >>> notes = []
        >>> without_overlap(["a", "b"], ["b", "c"], str, notes)
        (['a', 'b'], ['c'])
        >>> len(notes)
        1
    """
    inside = {key(record) for record in members}
    kept = [record for record in others if key(record) not in inside]
    shared = len(others) - len(kept)
    if shared and not kept:
        raise DataError(
            "every record of test_dataset is in train_dataset too: there is no non-member to compare "
            "with. Pass records that the model has not seen."
        )
    if shared:
        warnings.append(
            f"{shared} records of test_dataset are in train_dataset too, so they are members; they "
            "were left out."
        )
    return list(members), kept


def concerns(members: int, others: int) -> list[str]:
    """What the sizes of the sets make of the result."""
    fewest = min(members, others)
    if FEWEST_RECORDS <= fewest < _ENOUGH:
        return [
            f"{members} members and {others} non-members: the interval is wide, and rates below "
            f"{1 / fewest:.0%} cannot be measured."
        ]
    return []
