"""Tokenized examples, and batches of them padded to the longest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["IGNORED", "Padded", "Tokenized", "by_length"]

IGNORED: Final = -100  # label of a token that does not count

Tokens = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Tokenized(Dataset[Tokens]):
    """Examples in memory: lists of token ids and what else belongs to each, by name."""

    rows: Sequence[Tokens]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tokens:
        return self.rows[index]


def by_length(data: Any) -> Tokenized:
    """The same examples, those with few tokens first."""
    return Tokenized(sorted(data.rows, key=lambda row: len(row["input_ids"])))


@dataclass(frozen=True)
class Padded:
    """Makes a batch: lists become int64 [B, T], filled up on the right; numbers become int64 [B].

    Attributes:
        fill: what a list is filled up with, by name; 0 where it is not here.

    Example:
        >>> rows = [{"input_ids": [5, 6], "labels": 1}, {"input_ids": [7], "labels": 0}]
        >>> batch = Padded({"input_ids": 9})(rows)
        >>> batch["input_ids"].tolist(), batch["labels"].tolist()
        ([[5, 6], [7, 9]], [1, 0])
    """

    fill: Mapping[str, int]

    def __call__(self, rows: Sequence[Tokens]) -> dict[str, Tensor]:
        found = {}
        for name, first in rows[0].items():
            values = [row[name] for row in rows]
            if isinstance(first, list):
                longest = max(len(value) for value in values)
                filler = self.fill.get(name, 0)
                values = [value + [filler] * (longest - len(value)) for value in values]
            found[name] = torch.tensor(values)
        return found
