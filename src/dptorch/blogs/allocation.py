"""Choose block sizes: which tensors share one, and how large it may be for a target index."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from dptorch.blogs.index import Index
from dptorch.errors import ConfigurationError, one_of

__all__ = ["ALLOCATIONS", "Group", "equal_share", "per_step", "trainable_groups"]

ALLOCATIONS = ("layer", "parameter")


@dataclass(frozen=True)
class Group:
    """Tensors that the index counts together and that have one block size.

    Attributes:
        name: of the layer or parameter.
        sizes: name of each trainable tensor -> number of its elements.
    """

    name: str
    sizes: dict[str, int]

    @property
    def size(self) -> int:
        """Number of coordinates d of the group."""
        return sum(self.sizes.values())


def trainable_groups(model: nn.Module, allocation: str = "layer") -> list[Group]:
    """The model's trainable tensors, each once.

    Args:
        model: frozen parameters are skipped; a tied one belongs to the first layer that has it.
        allocation: "layer" puts together what one module holds itself (its weight and bias), as
            releases 0.1.12 to 0.1.18 did for a list of layer classes; "parameter" leaves each
            tensor by itself, as those before did.

    Raises:
        ConfigurationError: an unknown allocation, or nothing to train.

    Example:
        >>> [(g.name, g.size) for g in trainable_groups(nn.Sequential(nn.Linear(3, 2), nn.ReLU()))]
        [('0', 8)]
        >>> [g.name for g in trainable_groups(nn.Linear(3, 2), "parameter")]
        ['weight', 'bias']
    """
    one_of("allocation", allocation, ALLOCATIONS)
    seen: set[int] = set()
    groups: list[Group] = []
    for layer, module in model.named_modules():
        sizes: dict[str, int] = {}
        for name, p in module.named_parameters(prefix=layer, recurse=False):
            if p.requires_grad and id(p) not in seen and p.numel():
                seen.add(id(p))
                sizes[name] = p.numel()
        if allocation == "parameter":
            groups += [Group(name, {name: size}) for name, size in sizes.items()]
        elif sizes:
            groups.append(Group(layer or type(module).__name__, sizes))
    if not groups:
        raise ConfigurationError(
            "the model has no trainable parameter. Unfreeze what should be trained with "
            "requires_grad_(True) first."
        )
    return groups


def per_step(index: Index, sizes: Sequence[int], block_sizes: Sequence[int]) -> float:
    """E: the sum over groups of the index of one step."""
    return math.fsum(index.of_group(d, b) for d, b in zip(sizes, block_sizes, strict=True))


def equal_share(
    index: Index, sizes: Sequence[int], steps: int, target: float, *, at_minimum: bool = False
) -> list[int]:
    """The block sizes of the largest equal share that keeps a run within `target`.

    Each group gets the largest block whose value does not exceed the common share, at least 1 and
    at most half the group, so that there are two blocks to permute. Larger blocks keep more of the
    gradient's order.

    Args:
        index: what is to stay within the target.
        sizes: coordinates d of each group, each at least 2.
        steps: steps planned.
        target: largest value after `steps`.
        at_minimum: where not even blocks of one coordinate keep to `target`, return those instead
            of raising.

    Returns:
        β of each group.

    Guarantees:
        ``index.after(steps, per_step(index, sizes, result)) <= target``, and no larger common
        share has that; unless `at_minimum` had to be used.
        Held by `test_a_run_stays_within_its_target_or_is_refused_with_what_can_be_met` and
        `test_no_larger_equal_share_stays_within_the_target`.

    Raises:
        ConfigurationError: the target cannot be met; the message names what can.

    Example:
        >>> from dptorch.blogs.index import Index2024
        >>> equal_share(Index2024(1.0, 1e-5), [416, 4640, 15690], steps=100, target=1.0)
        [5, 62, 213]
    """
    counts = Counter(sizes)  # a deep network has few sizes

    def blocks(share: float) -> dict[int, int]:
        return {d: _largest_block(index, d, share) for d in counts}

    def total(chosen: dict[int, int]) -> float:
        values = (n * index.of_group(d, chosen[d]) for d, n in counts.items())
        return index.after(steps, math.fsum(values))

    low = min(index.of_group(d, 1) for d in counts)
    high = max(index.of_group(d, max(1, d // 2)) for d in counts)
    smallest = blocks(0.0)
    least = total(smallest)
    if least > target:
        if at_minimum:
            return [smallest[d] for d in sizes]
        raise ConfigurationError(
            f"target_epsilon={target:g} cannot be met with index={index.name!r}: with blocks of one "
            f"coordinate everywhere, {steps} steps already have a BloGS index of {least:.4g}, the "
            "attainable minimum. Set target_epsilon above it, plan fewer steps, lower clip_value or "
            'freeze layers. Or use mechanism="gaussian", which can meet any target and has a proof.'
        )
    if total(blocks(high)) <= target:
        chosen = blocks(high)
        return [chosen[d] for d in sizes]
    if total(blocks(low)) > target:
        low = 0.0
    while low < (middle := (low + high) / 2) < high:
        if total(blocks(middle)) <= target:
            low = middle
        else:
            high = middle
    chosen = blocks(low)
    return [chosen[d] for d in sizes]


def _largest_block(index: Index, size: int, share: float) -> int:
    """The largest block size up to half of `size` whose value is at most `share`, or 1."""
    good, bad = 1, max(1, size // 2) + 1
    while bad - good > 1:
        middle = (good + bad) // 2
        if index.of_group(size, middle) <= share:
            good = middle
        else:
            bad = middle
    return good
