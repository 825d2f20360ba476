"""Make the batch that stands for an empty one: an example of zeros, structured as a real batch."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import PackedSequence

__all__ = ["zeros_like_batch"]


def zeros_like_batch(batch: Any) -> Any:
    """`batch` with every number in it replaced by zero, its structure, dtypes and shapes kept.

    Descends into mappings (including `UserDict` classes such as a tokenizer's), lists, tuples,
    named tuples and dataclasses. Tensors, arrays and Python numbers become zeros; strings, bytes,
    None and objects of unknown classes are passed on as they are, so the caller must weigh the
    result zero.

    Example:
        >>> zeros_like_batch({"x": torch.ones(1, 2), "id": ["a"], "y": (3, True)})
        {'x': tensor([[0., 0.]]), 'id': ['a'], 'y': (0, False)}
    """
    if isinstance(batch, torch.Tensor):
        return torch.zeros_like(batch)
    if isinstance(batch, np.ndarray):
        return batch.copy() if batch.dtype.kind in "OSUV" else np.zeros_like(batch)
    if isinstance(batch, bool | int | float | complex | np.number | np.bool_):
        return type(batch)(0)
    if isinstance(batch, str | bytes):
        return batch
    if isinstance(batch, PackedSequence):
        # Its other fields are lengths and an order, which zeros would make invalid.
        return batch._replace(data=torch.zeros_like(batch.data))
    if isinstance(batch, Mapping):
        return _like_mapping(batch, {k: zeros_like_batch(v) for k, v in batch.items()})
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(zeros_like_batch(v) for v in batch))
    if isinstance(batch, Sequence):
        values = [zeros_like_batch(v) for v in batch]
        return tuple(values) if isinstance(batch, tuple) else values
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        zeroed = copy.copy(batch)
        for field in dataclasses.fields(batch):
            # Through object, because the dataclass may be frozen.
            object.__setattr__(zeroed, field.name, zeros_like_batch(getattr(batch, field.name)))
        return zeroed
    return batch


def _like_mapping(original: Mapping[Any, Any], values: dict[Any, Any]) -> Any:
    """`values` in the mapping class of `original`; a plain dict if the class cannot be rebuilt."""
    if type(original) is dict:
        return values
    try:
        clone = copy.copy(original)
        clone.update(values)  # type: ignore[attr-defined]
    except (AttributeError, TypeError):
        return values
    return clone
