"""Clipping functions: from each example's gradient norm to its coefficient in the sum.

A clipping function maps norms [B] to coefficients c [B] with ``c[b] * norm[b] <= max_grad_norm``,
so that one example moves the sum by at most max_grad_norm. To add one, write the function and put it
into `FUNCTIONS`; the engine, the plan and the command line find it there by name.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dptorch.errors import ConfigurationError, one_of

__all__ = [
    "FUNCTIONS",
    "LEAST_NORM",
    "STABILITY",
    "ClippingFunction",
    "coefficients",
    "get_clipping_function",
]

# (norms [B], max_grad_norm) -> coefficients [B]
ClippingFunction = Callable[[Tensor, float], Tensor]

# gamma of automatic clipping: keeps small gradients smaller than large ones.
STABILITY = 0.01
# Below this a float32 norm, the root of a sum of squares, is made of denormal numbers.
_TINY = 1e-16

#: The smallest clipping norm.
LEAST_NORM = 1e-10
"""Smallest bound there is: a float32 norm is the root of a sum of squares, of which many that are each
taken for zero must still be too short to matter."""


def abadi(norms: Tensor, max_grad_norm: float) -> Tensor:
    """``min(1, C / n)``: scale down what is longer than C (Abadi et al. 2016, arXiv:1607.00133)."""
    return (max_grad_norm / norms).clamp(max=1.0)  # norm 0 gives inf, clamped to 1


def automatic(norms: Tensor, max_grad_norm: float) -> Tensor:
    """``C / (n + 0.01)``: AUTO-S, every gradient at nearly length C (Bu et al. 2023,
    arXiv:2206.07136). C then only scales the step, so it needs no tuning."""
    return max_grad_norm / (norms + STABILITY)


def normalised(norms: Tensor, max_grad_norm: float) -> Tensor:
    """``C / n``: AUTO-V, every gradient at exactly length C; a zero gradient stays zero, and so does
    one so short that its square has lost its digits."""
    return torch.where(norms > _TINY, max_grad_norm / norms, torch.zeros_like(norms))


def global_clipping(norms: Tensor, max_grad_norm: float) -> Tensor:
    """``1 if n <= C else 0``: keep or drop (Bu et al. 2021, arXiv:2106.07830)."""
    return (norms <= max_grad_norm).to(norms.dtype)


#: Clipping functions by name: norms [B] and the clipping norm give coefficients [B].
FUNCTIONS: dict[str, ClippingFunction] = {
    "abadi": abadi,
    "automatic": automatic,
    "normalised": normalised,
    "global": global_clipping,
}


def get_clipping_function(name: str) -> ClippingFunction:
    """Return the clipping function called `name`.

    Raises:
        ConfigurationError: no clipping function has that name; all names are listed.

    Example:
        >>> get_clipping_function("global")(torch.tensor([0.5, 2.0]), 1.0).tolist()
        [1.0, 0.0]
    """
    return FUNCTIONS[one_of("clipping_fn", name, FUNCTIONS)]


def coefficients(norms: Tensor, max_grad_norm: float, function: str = "abadi") -> Tensor:
    """Each example's coefficient in the clipped sum.

    Args:
        norms: per-example gradient norms [B], float32 or float64.
        max_grad_norm: the bound C, at least `LEAST_NORM`.
        function: a name in `FUNCTIONS`.

    Returns:
        [B], same dtype.

    Raises:
        ConfigurationError: for an unknown function; all names are listed. Or C is too small.

    Guarantees:
        ``coefficients * norms <= max_grad_norm`` up to one rounding, and an example whose norm is
        NaN or infinite has coefficient 0: it is dropped, whatever the others are.
        Held by `test_no_contribution_exceeds_the_bound` and
        `test_float32_stays_within_one_rounding`.

    Example:
        >>> coefficients(torch.tensor([0.5, 2.0, float("nan")]), 1.0).tolist()
        [1.0, 0.5, 0.0]
    """
    clip = get_clipping_function(function)
    if not max_grad_norm >= LEAST_NORM:
        raise ConfigurationError(
            f"max_grad_norm={max_grad_norm!r} must be at least {LEAST_NORM}: a shorter gradient's norm "
            "may come out as 0 in float32. Scale the loss if gradients are that short."
        )
    c = clip(norms, max_grad_norm)
    return torch.where(norms.isfinite() & c.isfinite(), c, torch.zeros_like(c))
