"""What a private trainer refuses of itself, when it is made and again when it trains.

A Trainer's arguments, callbacks and data sets are attributes that anybody may change in between.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dptorch.errors import ConfigurationError
from dptorch.integrations.transformers.label_smoothing import SmoothLabels
from dptorch.integrations.transformers.manifest import CHANGED, settle

__all__ = [
    "refuse_changes",
    "refuse_private_rows",
]


def refuse_private_rows(train: Any, evaluation: Any) -> None:
    """Refuse rows of the training data in evaluation data that is said to be public.

    Seen are the same object, the same data set of `datasets` by its fingerprint, and views of one data
    set (`select`, `torch.utils.data.Subset`) that share rows.

    Args:
        evaluation: a data set, several by name, or None.
    """
    if train is None or evaluation is None or isinstance(evaluation, str):
        return
    for each in evaluation.values() if isinstance(evaluation, dict) else [evaluation]:
        if _share_rows(train, each):
            raise ConfigurationError(
                "eval_is_public=True, but eval_dataset holds rows of train_dataset, which is private. "
                "Evaluate on other data, or leave eval_is_public out."
            )


def _share_rows(one: Any, other: Any) -> bool:
    if one is other:
        return True
    fingerprint = getattr(one, "_fingerprint", None)
    if fingerprint is not None and fingerprint == getattr(other, "_fingerprint", None):
        return True
    (base, rows), (other_base, other_rows) = _rows_of(one), _rows_of(other)
    names = getattr(base, "column_names", None)
    if base is other_base and not (hasattr(base, "_data") and names):
        return rows is None or other_rows is None or len(np.intersect1d(rows, other_rows)) > 0
    if not hasattr(base, "_data") or not hasattr(other_base, "_data"):
        return False
    return any(
        len(np.intersect1d(_places(base, rows, name), _places(other_base, other_rows, name))) > 0
        for name in set(names or ()) & set(other_base.column_names)
    )


def _rows_of(dataset: Any) -> tuple[Any, Any]:
    """What a data set is a subset of, by torch's `Subset`, and which rows; None for all."""
    rows = None
    while hasattr(dataset, "dataset") and hasattr(dataset, "indices"):
        here = np.asarray(dataset.indices)
        rows = here if rows is None else here[rows]
        dataset = dataset.dataset
    return dataset, rows


def _places(dataset: Any, rows: Any, name: str) -> Any:
    """A number for each row of a data set of `datasets`, by where in memory a column has its value.

    Views share their buffers, at most one row a byte; nothing is copied by `select` or a split.
    """
    import pyarrow

    found = [np.zeros(0, dtype=np.int64)]
    for chunk in dataset._data.table.column(name).chunks:
        buffers = chunk.buffers()
        if pyarrow.types.is_boolean(chunk.type) or len(buffers) < 2 or buffers[1] is None:
            return found[0]  # several rows share a byte, or there is none
        found.append(buffers[1].address + chunk.offset + np.arange(len(chunk)))
    places = np.concatenate(found)
    if dataset._indices is not None:
        places = places[dataset._indices.column(0).to_numpy()]
    return places if rows is None else places[rows]


def refuse_changes(trainer: Any, train_dataset: Any) -> None:
    """Hold a trainer that is about to train against what it was made with.

    Args:
        train_dataset: what it was made with.

    Raises:
        ConfigurationError: something was set since that would have been refused, or changed, then.
    """
    for name, change in CHANGED.items():
        value = getattr(trainer.args, name, change.value)
        if value != change.value:
            raise ConfigurationError(
                f"args.{name} was set to {value!r} after the trainer was made, and a private run has "
                f"{change.value!r}. Give the arguments that you want when you make the trainer: "
                "DPTrainer(args=...)."
            )
    settle(trainer.args, trainer.privacy)
    if trainer.train_dataset is not train_dataset:
        raise ConfigurationError(
            "train_dataset was replaced after the trainer was made: the plan, and the checks, were "
            "made for another data set. Make a new trainer for it."
        )
    smoother = trainer.label_smoother
    if smoother is not None and not isinstance(smoother, SmoothLabels):
        raise ConfigurationError(
            "label_smoother was set after the trainer was made, and divides by the number of tokens of "
            "the whole batch. Give TrainingArguments(label_smoothing_factor=...) instead."
        )
