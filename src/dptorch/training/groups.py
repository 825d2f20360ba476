"""Test results by class and by the subgroups that `--subgroups` names.

Noise and clipping cost small groups most: their examples move the clipped sum least (Bagdasaryan,
Poursaeed, Shmatikov, "Differential Privacy Has Disparate Impact on Model Accuracy", NeurIPS 2019). One
accuracy over all hides that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from torch import Tensor

__all__ = ["grouped", "majority"]

_MOST: Final = 20  # groups of a column that are listed; small ones are put together

Row = dict[str, Any]


def grouped(
    right: Tensor | None,
    squared: Tensor | None,
    labels: Sequence[str],
    subgroups: Mapping[str, Sequence[str]],
) -> list[Row]:
    """One row for each class and each subgroup.

    Args:
        right: bool [N], whether the class of each test example was found; None for numbers.
        squared: float [N], squared errors in the units of the target; None for classes.
        labels: class of each example; empty for numbers.
        subgroups: values [N] by column.

    Returns:
        "by" (class or column), "group", "examples", and "accuracy" or "rmse"; largest groups first.

    Example:
        >>> import torch
        >>> rows = grouped(torch.tensor([True, False, True]), None, ["a", "a", "b"], {})
        >>> [(row["group"], row["examples"], row["accuracy"]) for row in rows]
        [('a', 2, 0.5), ('b', 1, 1.0)]
    """
    found: list[Row] = []
    columns = {**({"class": labels} if labels else {}), **subgroups}
    for column, values in columns.items():
        counts = Counter(values)
        named = [name for name, _ in counts.most_common(_MOST if len(counts) > _MOST else None)]
        places: dict[str, list[int]] = {name: [] for name in named}
        for i, value in enumerate(values):
            places.setdefault(value if value in named else "(all others)", []).append(i)
        for name, at in places.items():
            row: Row = {"by": column, "group": name, "examples": len(at)}
            if right is not None:
                row["accuracy"] = float(right[at].double().mean())
            if squared is not None:
                row["rmse"] = float(squared[at].mean().sqrt())
            found.append(row)
    return found


def majority(labels: Sequence[str]) -> float:
    """The accuracy of whoever always says the most frequent class.

    Example:
        >>> majority(["a", "b", "a", "a"])
        0.75
    """
    return Counter(labels).most_common(1)[0][1] / len(labels)
