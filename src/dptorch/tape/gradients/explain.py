"""What the last backward did at each site, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dptorch.tape.gradients.clipping_modes import Mode
from dptorch.tape.gradients.device_cost import DeviceCost
from dptorch.tape.gradients.tape import Site

__all__ = ["Explanation"]

_WHAT = {
    "gram": "norm from Gram matrices, sum from factors",
    "form": "formed for the norm, sum from factors",
    "keep": "formed and kept",
    "formed": "formed: it is small",
    "segments": "rows summed by (example, id)",
}


@dataclass(frozen=True)
class Explanation:
    """How each parameter's norms and clipped sums were computed; ``print`` it.

    Attributes:
        mode: the run's clipping mode.
        two_passes: whether the sums came from a second backward.
        sites: one for each parameter at each op that took part.
        device_cost: what "auto" judged by.
    """

    mode: Mode
    two_passes: bool
    sites: Sequence[Site]
    device_cost: DeviceCost

    @property
    def flops(self) -> float:
        """Of all norms and clipped sums."""
        return sum(s.method.flops for s in self.sites)

    @property
    def kept_bytes(self) -> float:
        """Held until the clipped sum; nothing after two passes."""
        return 0.0 if self.two_passes else sum(s.method.kept_bytes for s in self.sites)

    def __str__(self) -> str:
        passes = "two backward passes" if self.two_passes else "one backward pass"
        speed = self.device_cost
        lines = [
            f"clipping_mode={self.mode.name!r} ({self.mode.source}), {passes}; device judged at "
            f"{speed.flops_per_second / 1e9:.3g} Gflop/s and {speed.bytes_per_second / 1e9:.3g} GB/s",
            "",
            f"{'parameter':<44} {'sizes':<30} {'method':<9} {'norm':>9} {'sum':>9} {'kept':>9}",
            f"{'':<44} {'':<30} {'':<9} {'Mflop':>9} {'Mflop':>9} {'KiB':>9}",
        ]
        for s in self.sites:
            sizes = " ".join(f"{letter}={n}" for letter, n in s.sizes)
            m = s.method
            lines.append(
                f"{s.parameter[-44:]:<44} {sizes:<30} {m.name:<9} {m.norm_flops / 1e6:>9.2f} "
                f"{m.sum_flops / 1e6:>9.2f} {m.kept_bytes / 1024:>9.0f}"
            )
        lines += [
            "",
            *(f"{w}: {_WHAT[w]}" for w in dict.fromkeys(s.method.name for s in self.sites)),
        ]
        lines.append(
            f"in all {self.flops / 1e9:.3g} Gflop; {self.kept_bytes / 2**20:.3g} MiB kept until "
            "clipping"
        )
        return "\n".join(lines)
