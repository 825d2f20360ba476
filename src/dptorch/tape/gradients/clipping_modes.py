"""Methods to compute the norm and the clipped sum of a per-example gradient, and what each costs.

A gradient that is held in factors (a linear layer's, a convolution's) has up to three methods:

- ``gram``: the norm from Gram matrices over positions ("ghost norm"); the factors are kept, and the
  clipped sum is one product of them ("book-keeping");
- ``form``: form the gradient for its norm and drop it; the factors are kept for the clipped sum;
- ``keep``: form the gradient and keep it in place of its factors; the clipped sum is then a weighted
  sum over examples.

All give the same numbers up to rounding. A *mode* chooses among them, at each site and each call
anew: by the rule of the paper that the mode is named after, or by what is fastest (`auto`).

Shape legend: B examples, T positions, D inputs, P outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dptorch.errors import one_of
from dptorch.tape.gradients.device_cost import DeviceCost

__all__ = ["MODES", "NON_PRIVATE", "Mode", "NormMethod", "get_mode"]


class NormMethod(NamedTuple):
    """One method, with its cost.

    Attributes:
        name: "gram", "form", "keep"; or the name of the only method that a gradient has.
        norm_flops: of the norm.
        sum_flops: of the clipped sum.
        moved_bytes: read and written by everything that is not a matrix product.
        kept_bytes: held from the backward until the clipped sum.
        space_bytes: largest intermediate of the norm, had it been stored whole, as the papers count.
    """

    name: str
    norm_flops: float
    sum_flops: float
    moved_bytes: float
    kept_bytes: float
    space_bytes: float

    @property
    def flops(self) -> float:
        """Of norm and clipped sum."""
        return self.norm_flops + self.sum_flops


@dataclass(frozen=True)
class Mode:
    """How a run gets its norms and clipped sums. Every mode gives the same gradients.

    Attributes:
        name: canonical name.
        rule: "fastest"; "gram"; "space" (Gram matrices where 2 T^2 <= P D, which is a rule of
            memory); "keep" (form everything).
        formed: what becomes of a gradient that is formed: "keep" or "form" (drop it).
        passes: backward passes. With two, the first takes norms only and keeps nothing, and the
            second adds up the clipped gradients.
        source: the paper.
    """

    name: str
    rule: str
    formed: str = "keep"
    passes: int = 1
    source: str = ""

    def choose(self, methods: Sequence[NormMethod], device: DeviceCost) -> NormMethod:
        """Return the method for one gradient."""
        if len(methods) == 1:
            return methods[0]
        by_name = {m.name: m for m in methods}
        gram, formed = by_name.get("gram"), by_name[self.formed]
        if self.rule == "keep" or (gram is None and self.rule != "fastest"):
            return formed
        if self.rule == "fastest":
            return fastest(methods, device, by_name["form"].kept_bytes, passes=self.passes)
        assert gram is not None
        if self.rule == "gram":
            return gram
        return gram if gram.space_bytes <= formed.space_bytes else formed


# How much more than its factors a formed gradient may occupy, to save time.
_SLACK = 1.25


def fastest(
    methods: Sequence[NormMethod], device: DeviceCost, factor_bytes: float, *, passes: int
) -> NormMethod:
    """Return the method that takes least time among those that keep little more than the factors."""
    if passes == 2:  # the sum is made from factors in the second pass, whatever the norm came from
        return min(
            (m for m in methods if m.name != "keep"),
            key=lambda m: device.seconds(m.norm_flops, m.moved_bytes),
        )
    # "form" keeps the factors and nothing else, so there is always one.
    affordable = [m for m in methods if m.kept_bytes <= _SLACK * factor_bytes]
    return min(affordable, key=lambda m: device.seconds(m.flops, m.moved_bytes))


NON_PRIVATE = Mode("non-private", "none", source="ordinary training, for comparison")
_LI = "Li et al. 2022, arXiv:2110.05679"
_MIXED = "Bu, Mao & Xu 2022, arXiv:2205.10683"
_BK = "Bu et al. 2023, arXiv:2210.00038"

MODES: Mapping[str, Mode] = {
    m.name: m
    for m in (
        Mode("auto", "fastest", source="least time as modelled for this device"),
        Mode("non-ghost", "keep", source="Yousefpour et al. 2021, arXiv:2109.12298 (Opacus)"),
        Mode("ghost", "gram", "form", passes=2, source=_LI),
        Mode("MixGhostClip", "space", "form", passes=2, source=_MIXED),
        Mode("BK-ghost", "gram", "form", source=_BK),
        Mode("BK-MixGhostClip", "space", "form", source=_BK),
        Mode("BK-MixOpt", "space", source=_BK),
        NON_PRIVATE,
    )
}
_ALIASES = {
    "default": "non-ghost",
    "hooks": "non-ghost",
    "ghost_mixed": "MixGhostClip",
    "MixOpt": "BK-MixOpt",
}


def get_mode(name: str) -> Mode:
    """Return a mode by its name, or by the name that another library gives it.

    Raises:
        ConfigurationError: for an unknown name, with the nearest.

    Example:
        >>> get_mode("ghost").passes, get_mode("MixOpt").name
        (2, 'BK-MixOpt')
    """
    return MODES[_ALIASES.get(name) or one_of("clipping_mode", name, [*MODES, *_ALIASES])]
