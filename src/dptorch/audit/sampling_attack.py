"""The sampling attack: tell members from others by labels alone, asked again and again.

The adversary asks for the labels of many slightly changed copies of an example and takes their
frequencies for the model's confidence; a model that gives labels only then leaks nearly what its
scores do (Rahimian, Orekondy, Fritz 2020, arXiv:2009.00395). Noise on each answer that is not accounted
for all of them averages out in the same way. Accounted noise does not: k answers of μ each allow an AUC
of Φ(μ √k / √2) at most, which each curve is held against. `attack_run` plays it on a run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from dptorch.audit.evidence import Evidence

__all__ = ["QUERIES", "Examples", "Labels", "SamplingAttack", "SamplingCurve", "play_sampling"]

Labels = Callable[[Tensor], Tensor]
Examples = tuple[Tensor, Tensor]

#: How many labels of an example are asked for.
QUERIES: Final = (1, 3, 10, 30, 100)


@dataclass(frozen=True)
class SamplingCurve:
    """How well the attack does on one way of answering.

    Attributes:
        name: of the way.
        auc: of the attack, after each number of queries.
        allowed: the most that the guarantee of those answers allows; None where there is none.
    """

    name: str
    auc: tuple[float, ...]
    allowed: tuple[float, ...] | None = None


@dataclass(frozen=True)
class SamplingAttack:
    """The attack on a run; ``str()`` is a table.

    Attributes:
        queries: how many labels of an example were asked for.
        curves: one for each way of answering.
        examples: members, and as many others.
        notes: which models were trained for the comparison, and which were not and why.
    """

    queries: tuple[int, ...]
    curves: tuple[SamplingCurve, ...]
    examples: int
    notes: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """Two standard errors of an AUC of 0.5."""
        # Mann and Whitney's variance where members and others are alike: (n + m + 1) / (12 n m).
        return 2 * math.sqrt((2 * self.examples + 1) / (12 * self.examples**2))

    def to_json(self) -> str:
        """Plain values as JSON."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def __str__(self) -> str:
        width = max(len(curve.name) for curve in self.curves)
        lines = [
            f"Sampling attack on {self.examples} members and as many others: AUC after k labels each.",
            f"Guessing is 0.5. With so few examples an AUC is known to about {self.error:.2f}.",
            "",
            " " * width + "".join(f"{k:>8}" for k in self.queries),
        ]
        for curve in self.curves:
            lines.append(f"{curve.name:<{width}}" + "".join(f"{a:>8.3f}" for a in curve.auc))
            if curve.allowed is not None:
                allowed = "".join(f"{a:>8.3f}" for a in curve.allowed)
                lines.append(f"{'  at most':<{width}}" + allowed)
        lines += ["", *self.notes] if self.notes else []
        return "\n".join(lines) + "\n"


def play_sampling(
    labels_of: Labels,
    members: Examples,
    others: Examples,
    *,
    queries: Sequence[int] = QUERIES,
    spread: float = 0.2,
    seed: int = 0,
) -> list[Evidence]:
    """Attack a predictor that answers with labels.

    Args:
        labels_of: inputs [N, ...] -> int64 labels [N].
        members, others: (inputs, true labels).
        queries: numbers of labels of an example after which the attack is judged.
        spread: standard deviation of the changes, in units of that of all inputs. The first label is
            that of the example itself.
        seed: of the changes.

    Returns:
        for each of `queries`, how often each example got its true label.
    """
    inputs, truth = (torch.cat(pair) for pair in zip(members, others, strict=True))
    inside = np.arange(len(inputs)) < len(members[0])
    generator = torch.Generator().manual_seed(seed)
    scale = spread * float(inputs.std())
    # One run of the longest attack: the shorter ones are its beginnings.
    right, found = np.zeros(len(inputs)), []
    for k in range(1, max(queries) + 1):
        change = scale * torch.randn(inputs.shape, generator=generator) if k > 1 else 0.0
        right += (labels_of(inputs + change) == truth).numpy()
        if k in queries:
            found.append(Evidence.of(right[inside] / k, right[~inside] / k))
    return found
