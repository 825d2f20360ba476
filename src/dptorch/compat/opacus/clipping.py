"""Opacus's arguments about clipping, as those of `dptorch.plan.make_plan`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from dptorch.clipping import AdaptiveClipping
from dptorch.errors import ConfigurationError, one_of
from dptorch.plan import PrivacyPlan

__all__ = ["check_count_noise", "clipping_arguments"]

_CLIPPING = ("flat", "per_layer", "adaptive")


def clipping_arguments(
    model: nn.Module,
    clipping: str,
    max_grad_norm: float | Sequence[float],
    adaptive: Mapping[str, float | None],
) -> dict[str, Any]:
    """Return the arguments of `make_plan` about clipping."""
    one_of("clipping", clipping, _CLIPPING)
    given = {name: value for name, value in adaptive.items() if value is not None}
    if given and clipping != "adaptive":
        raise ConfigurationError(
            f"clipping={clipping!r} with arguments of adaptive clipping: use clipping='adaptive', or "
            "leave them out."
        )
    if clipping != "per_layer":
        if not isinstance(max_grad_norm, (int, float)):
            raise ConfigurationError(
                f"max_grad_norm is a list and clipping={clipping!r}: one norm for each parameter "
                "goes with clipping='per_layer'."
            )
        settings = AdaptiveClipping(**given) if clipping == "adaptive" else None
        return {"max_grad_norm": max_grad_norm, "adaptive_clipping": settings}
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    if isinstance(max_grad_norm, (int, float)) or len(max_grad_norm) != len(names):
        raise ConfigurationError(
            f"clipping='per_layer' needs max_grad_norm as a list of {len(names)} norms, one for each "
            f"trainable parameter, but it is {max_grad_norm!r}. For a total norm of C give "
            f"[C / {len(names)} ** 0.5] * {len(names)}."
        )
    return {"clipping_style": dict(zip(names, map(float, max_grad_norm), strict=True))}


def check_count_noise(plan: PrivacyPlan) -> None:
    """Refuse adaptive clipping whose count of unclipped examples costs more than a whole step.

    Raises:
        ConfigurationError: the noise multiplier is at least twice `unclipped_num_std`.
    """
    if plan.adaptive_clipping is None:
        return
    stddev = plan.adaptive_clipping.stddev(plan.expected_batch_size)
    if plan.noise_multiplier >= 2 * stddev:
        raise ConfigurationError(
            f"noise_multiplier={plan.noise_multiplier:g} with unclipped_num_std={stddev:g}: the noisy "
            "count of unclipped examples would cost more than the whole step. Use unclipped_num_std "
            f"well above {plan.noise_multiplier / 2:g}, or less noise."
        )
