"""Convert what mixes examples: BatchNorm and tracked InstanceNorm.

Shape legend: N examples, C channels, G groups of channels, ... space.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrize import is_parametrized

from dptorch.errors import ConfigurationError, one_of

__all__ = ["Change", "FrozenBatchNorm", "Preparation", "prepare", "preparation"]

BATCHNORM = ("group", "frozen")
_GROUP_SIZE = 16
_SMALL = 4  # channels below which a normalised [N, C] row says next to nothing


@dataclass(frozen=True)
class Change:
    """One converted module.

    Attributes:
        module: its name in the model, "" for the model itself.
        before, after: class names.
        detail: what was kept and what was not.
    """

    module: str
    before: str
    after: str
    detail: str


@dataclass(frozen=True)
class Preparation:
    """What `prepare` changes in a model; ``print`` it.

    Attributes:
        changes: one for each converted module, in the model's order.
    """

    changes: tuple[Change, ...]

    def __str__(self) -> str:
        if not self.changes:
            return "dptorch.prepare: nothing to change."
        n = len(self.changes)
        lines = [f"dptorch.prepare changed {n} module{'s' if n > 1 else ''}:"]
        groups: dict[tuple[str, str, str], list[str]] = {}
        for c in self.changes:
            groups.setdefault((c.before, c.after, c.detail), []).append(c.module or "(the model)")
        for (before, after, detail), names in groups.items():
            lines.append(f"  {before} -> {after} ({detail}): {', '.join(names)}")
        return "\n".join(lines)


class FrozenBatchNorm(nn.Module):
    """BatchNorm with fixed statistics, in training too: an affine map of each channel.

    Parameters and buffers have BatchNorm's names, so checkpoints fit both ways.

    Args:
        norm: the BatchNorm whose parameters and running statistics it takes over.

    Guarantees:
        The output is that of `norm` in eval mode, bit for bit, whatever mode this module is in.

    Raises:
        ConfigurationError: if `norm` has no running statistics.

    Example:
        >>> norm = nn.BatchNorm1d(3)
        >>> frozen = FrozenBatchNorm(norm).train()
        >>> x = torch.randn(5, 3)
        >>> torch.equal(frozen(x), norm.eval()(x))
        True
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        assert isinstance(norm, _NormBase)
        if norm.running_mean is None or norm.running_var is None:
            raise ConfigurationError(
                f"{type(norm).__name__} has no running statistics (track_running_stats=False), so "
                "there is nothing to freeze. Use batchnorm='group'."
            )
        self.num_features = norm.num_features
        self.eps = norm.eps
        self.register_parameter("weight", norm.weight if norm.affine else None)
        self.register_parameter("bias", norm.bias if norm.affine else None)
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)
        self.register_buffer("num_batches_tracked", norm.num_batches_tracked)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, ...] -> [N, C, ...]."""
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"{self.num_features}, eps={self.eps}, affine={self.weight is not None}"


def prepare(
    model: nn.Module,
    *,
    batchnorm: str = "group",
    group_size: int = _GROUP_SIZE,
    fold: bool = True,
    report: Callable[[str], object] | None = print,
) -> nn.Module:
    raise NotImplementedError
