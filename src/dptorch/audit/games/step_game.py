"""The step game: the adversary knows a step's exact gradients with and without the canary, sees one
release, and says which it came from (Nasr et al. 2021, arXiv:2101.04535).

It fits any mechanism that turns a gradient into a release, shuffles included. What a permutation of
blocks leaves as it was, every value, every block, the norm, the sum, is what the scores look at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dptorch.audit.bounds import Bound
from dptorch.audit.evidence import Evidence
from dptorch.audit.result import AuditResult, judge
from dptorch.audit.thresholds import Threshold
from dptorch.errors import ConfigurationError, one_of

__all__ = ["SCORES", "Gradients", "Score", "SortedBlocks", "audit_step", "play_steps"]

Gradients = Sequence[Tensor] | Mapping[str, Tensor]
Tensors = list[Tensor]
Score = Callable[[Tensors, Tensors, Tensors], float]  # (released, with canary, without) -> float


def exact_match(released: Tensors, inside: Tensors, outside: Tensors) -> float:
    """Share of the values that are the ones known from inside, less those known from outside,
    bit for bit and counted with multiplicity. Noise leaves none; a permutation leaves all.

    Example:
        >>> a, b = torch.tensor([1.0, 2.0, 2.0]), torch.tensor([1.0, 3.0, 3.0])
        >>> round(exact_match([a.flip(0)], [a], [b]), 3)
        0.667
    """
    matches = total = 0
    for r, i, o in zip(released, inside, outside, strict=True):
        found = _counts(r)
        matches += _shared(found, _counts(i)) - _shared(found, _counts(o))
        total += r.numel()
    return matches / max(1, total)


@dataclass(frozen=True)
class SortedBlocks:
    """How much nearer the release's blocks are to those from inside, after sorting both.

    Attributes:
        block_size: of the permutation, one for all tensors or one for each; a shorter rest is a block
            of its own. With 1, values are sorted.

    Example:
        >>> a, b = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 2.0, 3.0, 5.0])
        >>> SortedBlocks(2)([torch.tensor([3.0, 4.0, 1.0, 2.0])], [a], [b])
        1.0
    """

    block_size: int | tuple[int, ...] = 1

    def __call__(self, released: Tensors, inside: Tensors, outside: Tensors) -> float:
        sizes = self.block_size
        each = sizes if isinstance(sizes, tuple) else (sizes,) * len(released)
        if len(each) != len(released) or min(each) < 1:
            raise ConfigurationError(
                f"block_size={sizes!r}: expected a positive number, or one for each of the "
                f"{len(released)} tensors."
            )

        def distance(known: Tensors) -> float:
            squares = (
                float(np.square(_sorted(r, size) - _sorted(k, size)).sum())
                for r, k, size in zip(released, known, each, strict=True)
            )
            return sum(squares) ** 0.5

        return distance(outside) - distance(inside)


def norm(released: Tensors, inside: Tensors, outside: Tensors) -> float:
    """How much nearer the release's norm is to that from inside. No permutation changes a norm.

    Example:
        >>> norm([torch.tensor([4.0, 3.0])], [torch.tensor([3.0, 4.0])], [torch.tensor([0.0, 1.0])])
        4.0
    """
    return _nearer(*(sum(float(t.double().square().sum()) for t in ts) ** 0.5 for ts in
                     (released, inside, outside)))  # fmt: skip


def total(released: Tensors, inside: Tensors, outside: Tensors) -> float:
    """How much nearer the release's sum is to that from inside. No permutation changes a sum.

    Example:
        >>> total([torch.tensor([4.0, 3.0])], [torch.tensor([3.0, 4.0])], [torch.tensor([0.0, 1.0])])
        6.0
    """
    return _nearer(*(sum(float(t.double().sum()) for t in ts) for ts in
                     (released, inside, outside)))  # fmt: skip


def projection(released: Tensors, inside: Tensors, outside: Tensors) -> float:
    """Where the release lies from outside (0) to inside (1): the best test under Gaussian noise.

    Example:
        >>> projection([torch.tensor([0.5, 9.0])], [torch.tensor([1.0, 0.0])], [torch.zeros(2)])
        0.5
    """
    along = across = 0.0
    for r, i, o in zip(released, inside, outside, strict=True):
        # The log-likelihood ratio of N(inside, s²) and N(outside, s²) is affine in this, for
        # every s, so no other test is better at any false positive rate (Neyman and Pearson).
        step = i.double() - o.double()
        along += float(((r.double() - o.double()) * step).sum())
        across += float(step.square().sum())
    return along / across if across else 0.0


SCORES: Mapping[str, Score] = {
    "exact-match": exact_match,
    "sorted-block": SortedBlocks(),
    "norm": norm,
    "sum": total,
    "projection": projection,
}


def play_steps(
    release: Callable[[bool], Gradients],
    *,
    inside: Gradients,
    outside: Gradients,
    score: str | Score = "projection",
    games: int = 1000,
) -> Evidence:
    """Play `games` games in each world.

    Args:
        release: one run of the mechanism with fresh randomness, on the gradient with the canary
            (True) or without (False); one tensor for each parameter. It may write into nothing that
            it does not own.
        inside, outside: the exact gradients that the adversary knows, in the order of the release.
        score: name in `SCORES`, or a function (released, inside, outside) -> float.
        games: in each world.

    Returns:
        the scores of 2 * games independent games.

    Raises:
        ConfigurationError: an unknown score, gradients of other shapes than the release, or two
            worlds that do not differ.

    Example:
        >>> g = torch.arange(8.0)
        >>> shuffle = lambda member: [(g if member else -g)[torch.randperm(8)]]
        >>> games = play_steps(shuffle, inside=[g], outside=[-g], score="exact-match", games=20)
        >>> games.members.min() > games.others.max()
        np.True_
    """
    judge_release = SCORES[one_of("score", score, SCORES)] if isinstance(score, str) else score
    known_in, known_out = _tensors(inside), _tensors(outside)
    if [t.shape for t in known_in] != [t.shape for t in known_out]:
        raise ConfigurationError("the gradients from inside and from outside differ in shape.")
    if all(torch.equal(a, b) for a, b in zip(known_in, known_out, strict=True)):
        raise ConfigurationError(
            "the gradients with and without the canary are equal, so there is nothing to tell. "
            "Choose a canary whose gradient is not zero."
        )
    scores, member = [], []
    for game in range(2 * games):
        # In turn: whatever drifts from game to game drifts in both worlds.
        world = game % 2 == 0
        released = _tensors(release(world))
        if [t.shape for t in released] != [t.shape for t in known_in]:
            raise ConfigurationError(
                f"the release has the shapes {[tuple(t.shape) for t in released]}, the known "
                f"gradients {[tuple(t.shape) for t in known_in]}."
            )
        scores.append(judge_release(released, known_in, known_out))
        member.append(world)
    return Evidence(scores, member)


def audit_step(
    release: Callable[[bool], Gradients],
    *,
    inside: Gradients,
    outside: Gradients,
    epsilon: float,
    delta: float = 0.0,
    score: str | Score = "projection",
    games: int = 1000,
    significance: float = 0.05,
    bound: str | Bound = "clopper-pearson",
    threshold: Threshold | str | float = "bonferroni",
    notes: Sequence[str] = (),
) -> AuditResult:
    """Hold the claim that one release is (ε, δ)-DP against the step game.

    Args:
        release, inside, outside, score, games: see `play_steps`.
        epsilon, delta: what is claimed for one release.
        significance, bound, threshold, notes: see `dptorch.audit.result.judge`.

    Example:
        >>> g = torch.arange(8.0)
        >>> shuffle = lambda member: [(g if member else 0 * g)[torch.randperm(8)]]
        >>> result = audit_step(shuffle, inside=[g], outside=[0 * g], epsilon=1.0, score="norm",
        ...                     games=200)
        >>> result.verdict, round(result.epsilon_lower, 1)
        ('REFUTED', 3.5)
    """
    evidence = play_steps(release, inside=inside, outside=outside, score=score, games=games)
    name = score if isinstance(score, str) else getattr(score, "__name__", type(score).__name__)
    return judge(
        evidence,
        epsilon=epsilon,
        delta=delta,
        adversary=f"knows a step's gradients with and without the canary, sees its release ({name})",
        bound=bound,
        threshold=threshold,
        significance=significance,
        notes=notes,
        steps=1,
    )


def _tensors(gradients: Gradients) -> Tensors:
    values: Any = gradients.values() if isinstance(gradients, Mapping) else gradients
    return [t.detach().cpu() for t in values]


def _counts(values: Tensor) -> tuple[Any, Any]:
    # Every number of torch's floating types is one of float64, and no two become the same.
    found, counts = np.unique(values.double().numpy(), return_counts=True)
    return found, counts


def _shared(a: tuple[Any, Any], b: tuple[Any, Any]) -> int:
    """Size of the intersection of two multisets."""
    _, at_a, at_b = np.intersect1d(a[0], b[0], assume_unique=True, return_indices=True)
    return int(np.minimum(a[1][at_a], b[1][at_b]).sum())


def _sorted(values: Tensor, size: int) -> Any:
    """The blocks in lexicographic order, then the rest, as one vector."""
    flat = values.double().flatten().numpy()
    whole = len(flat) - len(flat) % size
    blocks = flat[:whole].reshape(-1, size)
    # lexsort sorts by its last key first, and here that is the first value of a block.
    order = np.lexsort(blocks.T[::-1])
    return np.concatenate([blocks[order].ravel(), flat[whole:]])


def _nearer(released: float, inside: float, outside: float) -> float:
    return abs(released - outside) - abs(released - inside)
