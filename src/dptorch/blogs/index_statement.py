"""The statement of a DP-BloGS run: an index, and no guarantee.

Why a permutation guarantees nothing: let a step release πG(D), where G(D) are the clipped blocks of
the batch gradient and π a random order of them. What can come out for D are the rearrangements of
G(D), and two sets of rearrangements are equal or disjoint. So for neighbouring data sets D, D'
either the multisets of blocks coincide and nothing is to be hidden, or one look tells D from D' with
certainty, and (ε, δ) holds for no finite ε and no δ < 1. Norms, sums, extremes and every block's
content pass through unchanged. No randomness enters before the aggregate, so the amplification
theorems of the shuffle model do not apply.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

__all__ = ["GUARANTEE", "BloGSSpent", "BloGSStatement", "running_statistics", "warning_text"]

GUARANTEE = "none (heuristic)"
_LOGGED = "loss, gradient norms and metrics that the loop logs: exact functions of private data"


class BloGSSpent(float):
    """The BloGS index so far. A float, for `f"{spent:.4f}"`; it also unpacks as (index, delta).

    Attributes:
        nominal_epsilon: the index: what the published formula calls ε. None under
            ``mechanism="gaussian"``, where the float is a proven ε.
        formal_epsilon: the ε that is guaranteed: infinity for a shuffle, and under a known seed.
        delta: δ beside the float.
        guarantee: "none (heuristic)", or what is guaranteed.

    Example:
        >>> spent = BloGSSpent.of_shuffle(0.9968, 1e-5)
        >>> f"{spent:.2f}", spent.formal_epsilon, spent.guarantee
        ('1.00', inf, 'none (heuristic)')
        >>> epsilon, delta = spent
    """

    nominal_epsilon: float | None
    formal_epsilon: float
    delta: float
    guarantee: str

    def __new__(
        cls, value: float, delta: float, *, nominal: float | None, formal: float, guarantee: str
    ) -> BloGSSpent:
        """Use `of_shuffle` or `of_gaussian`."""
        spent = super().__new__(cls, value)
        spent.nominal_epsilon, spent.formal_epsilon = nominal, formal
        spent.delta, spent.guarantee = delta, guarantee
        return spent

    @classmethod
    def of_shuffle(cls, index: float, delta: float) -> BloGSSpent:
        """A shuffle's index."""
        return cls(index, delta, nominal=index, formal=math.inf, guarantee=GUARANTEE)

    @classmethod
    def of_gaussian(cls, epsilon: float, delta: float, *, private: bool = True) -> BloGSSpent:
        """The ε of the Gaussian mechanism; `private` is False where its noise has a known seed."""
        if not private:
            text = "none (the seed of the noise is known)"
            return cls(epsilon, delta, nominal=None, formal=math.inf, guarantee=text)
        text = f"({epsilon:.4g}, {delta:g})-differential privacy"
        return cls(epsilon, delta, nominal=None, formal=epsilon, guarantee=text)

    def __iter__(self) -> Iterator[float]:
        return iter((self, self.delta))

    def __repr__(self) -> str:
        if self.nominal_epsilon is None:
            return f"BloGSSpent(epsilon={float(self)!r}, delta={self.delta!r})"
        return (
            f"BloGSSpent(nominal_epsilon={float(self)!r}, formal_epsilon={self.formal_epsilon!r}, "
            f"guarantee={self.guarantee!r})"
        )

    def __reduce__(self) -> Any:
        state = (self.nominal_epsilon, self.formal_epsilon, self.guarantee)
        return _rebuild, (float(self), self.delta, *state)


def _rebuild(
    value: float, delta: float, nominal: float | None, formal: float, guarantee: str
) -> BloGSSpent:
    return BloGSSpent(value, delta, nominal=nominal, formal=formal, guarantee=guarantee)


@dataclass(frozen=True)
class BloGSStatement:
    """What a run did and did not guarantee; ``str()`` is the text, `to_dict` the same for machines.

    Attributes:
        index: name of the formula.
        nominal_epsilon: its value after `steps` steps: the BloGS index.
        delta: the δ that the formula is given.
        steps: optimizer steps taken.
        steps_planned: what the block sizes were chosen for.
        target_epsilon: the index at which the run stops.
        clip_value: largest norm of each tensor of the batch gradient.
        block_sizes: name of each shuffled tensor -> block size.
        unshuffled: trainable tensors that have one element and no order to permute.
        buffers: running statistics of normalisation layers, which hold batch averages as they are.
        key_provenance: where the permutations came from.
    """

    index: str
    nominal_epsilon: float
    delta: float
    steps: int
    steps_planned: int
    target_epsilon: float
    clip_value: float
    block_sizes: dict[str, int] = field(repr=False)
    unshuffled: tuple[str, ...]
    buffers: tuple[str, ...]
    key_provenance: str

    formal_epsilon = math.inf
    formal_delta = 1.0
    guarantee = GUARANTEE

    def to_dict(self) -> dict[str, Any]:
        """The statement as plain values."""
        return {
            "mechanism": "block shuffle (DP-BloGS)",
            "guarantee": self.guarantee,
            "formal_epsilon": self.formal_epsilon,
            "formal_delta": self.formal_delta,
            "nominal_epsilon": self.nominal_epsilon,
            "nominal_delta": self.delta,
            "index": self.index,
            "target_epsilon": self.target_epsilon,
            "steps": self.steps,
            "steps_planned": self.steps_planned,
            "clip_value": self.clip_value,
            "block_sizes": dict(self.block_sizes),
            "unshuffled_tensors": list(self.unshuffled),
            "exact_buffers": list(self.buffers),
            "key_provenance": self.key_provenance,
            "not_covered": [_LOGGED],
        }

    def __str__(self) -> str:
        sizes = sorted(self.block_sizes.values())
        lines = [
            "These training steps have no differential-privacy guarantee.",
            "",
            f"guarantee            {self.guarantee}",
            "formal epsilon       infinity (delta 1)",
            f"BloGS index          {self.nominal_epsilon:.4f}, formula {self.index}; the index is no "
            "privacy budget",
            f"Steps                {self.steps} of {self.steps_planned} planned; stops at an index "
            f"of {self.target_epsilon:g}",
            f"Mechanism            each tensor of the batch gradient clipped to {self.clip_value:g}, "
            "its blocks permuted",
            f"Block sizes          {sizes[0]} to {sizes[-1]} in {len(sizes)} tensors"
            if sizes
            else "Block sizes          no tensor is shuffled",
            f"Randomness           key from the {self.key_provenance}",
            "",
            "What passes through unchanged:",
            "  - norm, sum, extremes and every block of each clipped gradient, at every step",
            *_listed("tensors that are not shuffled (one element)", self.unshuffled),
            *_listed("exact batch averages in buffers", self.buffers),
            f"  - {_LOGGED}",
        ]
        return "\n".join(lines) + "\n"


def _listed(what: str, names: tuple[str, ...]) -> list[str]:
    return [f"  - {what}: {', '.join(names)}"] if names else []


def running_statistics(model: nn.Module) -> tuple[str, ...]:
    """Names of buffers in which normalisation layers keep averages over private batches.

    Example:
        >>> running_statistics(nn.Sequential(nn.BatchNorm1d(3), nn.LayerNorm(3)))
        ('0.running_mean', '0.running_var')
    """
    kept = ("running_mean", "running_var")
    return tuple(name for name, _ in model.named_buffers() if name.rpartition(".")[2] in kept)


def warning_text(unshuffled: tuple[str, ...], buffers: tuple[str, ...], seeded: bool) -> str:
    """The one warning at construction."""
    text = (
        "DP-BloGS permutes the blocks of a clipped batch gradient and adds no noise. That is not "
        "differentially private for any epsilon: a permutation keeps the norm, the sum and every "
        "block, so where one record changes the blocks at all, a single release shows it with "
        "certainty. The method's paper (arXiv:2407.21347) was withdrawn by its author in January "
        "2025. What is reported as epsilon is the published formula's number, the BloGS index; the "
        "guarantee is none, and the formal epsilon is infinity. Use mechanism='gaussian' for a "
        "proven epsilon."
    )
    if unshuffled:
        text += f" Not shuffled, having one element: {_shortened(unshuffled)}."
    if buffers:
        text += f" Buffers that keep exact averages of private batches: {_shortened(buffers)}."
    if seeded:
        text += " The permutations come from a seed: who knows it can undo them."
    return text


def _shortened(names: tuple[str, ...], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
