"""Evidence of an audit: a score for each canary, and whether it was in the training data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dptorch.errors import DataError

__all__ = ["Array", "Evidence"]

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Evidence:
    """Scores of canaries (or of games) with the truth about each.

    Attributes:
        scores: float64 [n]; higher means more likely a member. No score is NaN.
        member: bool [n].

    Raises:
        DataError: shapes differ, a score is NaN, or a membership is no truth value.

    Example:
        >>> Evidence([0.1, 0.9, 0.4], [False, True, True]).members.tolist()
        [0.9, 0.4]
    """

    scores: ArrayLike
    member: ArrayLike

    def __post_init__(self) -> None:
        scores = np.asarray(self.scores, dtype=np.float64)
        member = np.asarray(self.member)
        if not bool(np.isin(member, (0, 1)).all()):
            raise DataError("memberships must be truth values, True for a canary that was in.")
        member = member.astype(bool)
        if scores.ndim != 1 or scores.shape != member.shape:
            raise DataError(
                f"scores have shape {scores.shape} and memberships {member.shape}. Expected one "
                "score and one truth value for each canary."
            )
        if bool(np.isnan(scores).any()):
            raise DataError(
                f"{int(np.isnan(scores).sum())} of {len(scores)} scores are NaN: the model gave no "
                "number for them. Leave those canaries out, members and others alike."
            )
        object.__setattr__(self, "scores", scores)
        object.__setattr__(self, "member", member)

    @classmethod
    def of(cls, members: ArrayLike, others: ArrayLike) -> Evidence:
        """Evidence from the scores of both sides."""
        inside, outside = np.asarray(members, float), np.asarray(others, float)
        labels = np.arange(len(inside) + len(outside)) < len(inside)
        return cls(np.concatenate([inside, outside]), labels)

    def __len__(self) -> int:
        return len(np.asarray(self.scores))

    @property
    def members(self) -> Array:
        """Scores of those that were in."""
        return np.asarray(self.scores)[np.asarray(self.member)]

    @property
    def others(self) -> Array:
        """Scores of those that were not."""
        return np.asarray(self.scores)[~np.asarray(self.member)]

    def take(self, index: Array) -> Evidence:
        """The evidence about some canaries."""
        return Evidence(np.asarray(self.scores)[index], np.asarray(self.member)[index])
