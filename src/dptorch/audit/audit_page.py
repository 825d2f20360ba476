"""Write the page about an audit: self-contained HTML with the claim beside the measurement."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dptorch.accounting import trade_off_curve
from dptorch.atomic_files import replacing
from dptorch.audit import audit_charts
from dptorch.audit.evidence import Array
from dptorch.audit.result import AuditResult
from dptorch.audit.roc import auc, auc_interval, tpr_at_fpr
from dptorch.errors import ConfigurationError, PrivacyError
from dptorch.training.run_page import missing_packages, page_template, wilson_interval

__all__ = ["Risk", "allowed_curve", "posterior", "render_audit", "risks", "write_report"]

_RATES = (0.01, 0.001, 0.0)
_PRIORS = (0.01, 0.1, 0.5)


def posterior(prior: float, tpr: float, fpr: float) -> float:
    """How sure one may be that someone is a member once the attack says so (Bayes).

    Args:
        prior: belief before.
        tpr, fpr: how often the attack says so of members, and of others.

    Example:
        >>> posterior(0.5, tpr=0.03, fpr=0.01)
        0.75
    """
    said = prior * tpr + (1 - prior) * fpr
    return prior * tpr / said if said > 0 else prior


def allowed_curve(result: AuditResult, fpr: Array | None = None) -> tuple[Array, Array] | None:
    """(fpr, highest true positive rate) of any attack if the claim is true; None where nothing is
    claimed.

    From the plan's privacy loss where there is a plan, and from (ε, δ) alone otherwise.
    """
    grid = np.concatenate([[0.0], np.geomspace(1e-6, 1.0, 200)]) if fpr is None else fpr
    if result.plan is not None and result.steps is not None:
        try:
            history = result.plan.history(result.steps)
            rates, fnr = trade_off_curve(history, adjacency=result.plan.adjacency, fpr=grid)
            return rates, 1 - fnr
        except (ConfigurationError, PrivacyError):
            pass  # no curve for this event; (ε, δ) is still a claim
    if math.isinf(result.claimed_epsilon):
        return None
    growth = math.exp(min(result.claimed_epsilon, 700.0))
    falling = result.delta + growth * grid
    mirrored = 1 - (1 - result.delta - grid) / growth
    return grid, np.clip(np.minimum(falling, mirrored), 0, 1)


@dataclass(frozen=True)
class Risk:
    """What an alarm of an attack means to someone with a prior belief.

    Attributes:
        prior: belief that the person is a member, before.
        allowed: belief after an alarm, at most, if the claim is true.
        measured: belief after an alarm of this attack.
    """

    prior: float
    allowed: float
    measured: float


def risks(result: AuditResult, fpr: float = 0.01) -> list[Risk]:
    """Posterior beliefs for an attack with that false positive rate."""
    curve = allowed_curve(result, np.array([fpr]))
    most = 1.0 if curve is None else float(curve[1][0])
    found = tpr_at_fpr(result.evidence, fpr)
    return [Risk(p, posterior(p, most, fpr), posterior(p, found, fpr)) for p in _PRIORS]


def _with_chance(result: AuditResult, fpr: float) -> float | None:
    """The true positive rate that a true claim allows where chance favours the attack: at the largest
    false positive rate that fits the measured one, as many canaries as fit that (95 % each)."""
    evidence = result.evidence
    possible = wilson_interval(fpr, len(evidence.others))[1]
    curve = allowed_curve(result, np.array([possible]))
    return None if curve is None else wilson_interval(float(curve[1][0]), len(evidence.members))[1]


def render_audit(result: AuditResult) -> str:
    """The page as text.

    Raises:
        ConfigurationError: jinja2 or matplotlib is missing.
    """
    if missing := missing_packages():
        raise ConfigurationError(
            f"The report needs {' and '.join(missing)}. Install with: pip install 'dptorch[report]'."
        )
    rates = np.array(_RATES)
    allowed = allowed_curve(result, rates)
    low, high = auc_interval(result.evidence)
    return str(
        page_template("dptorch.audit").render(
            result=result,
            charts=audit_charts.every(result, allowed_curve(result)),
            auc=auc(result.evidence),
            auc_low=low,
            auc_high=high,
            members=len(result.evidence.members),
            others=len(result.evidence.others),
            rates=[
                (
                    rate,
                    tpr_at_fpr(result.evidence, rate),
                    None if allowed is None else allowed[1][i],
                    _with_chance(result, rate),
                )
                for i, rate in enumerate(_RATES)
            ],
            risks=risks(result),
            risk_fpr=0.01,
            infinite=math.isinf,
        )
    )


def write_report(result: AuditResult, path: str | Path) -> Path:
    """Write the self-contained HTML page; whole or not at all.

    Raises:
        ConfigurationError: jinja2 or matplotlib is missing (extra `report`).
    """
    path = Path(path)
    text = render_audit(result)
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path
