"""Charts of an audit: the ROC curve beside what the claim allows, score histograms, ε."""

from __future__ import annotations

import math

import numpy as np

from dptorch.audit.evidence import Array, Evidence
from dptorch.audit.result import AuditResult
from dptorch.audit.roc import pointwise_band, roc_curve, uniform_band
from dptorch.audit.sampling_attack import SamplingAttack
from dptorch.training.run_charts import (
    AMBER,
    BLUE,
    DASHES,
    GRID,
    INK,
    MARKS,
    MUTED,
    SERIES,
    canvas,
    data_uri,
)

__all__ = ["epsilon_bars", "every", "roc_chart", "sampling_chart", "score_histogram"]

_WASH = "#c9dbf0"


def roc_chart(evidence: Evidence, allowed: tuple[Array, Array] | None, confidence: float) -> str:
    """The measured ROC curve on logarithmic axes, with its confidence band, and the curve above which
    no attack may be if the claim is true.

    Args:
        allowed: (fpr, highest tpr) of the claim.
        confidence: of the band, such as 0.95.
    """
    figure, axes = canvas("false positive rate", "true positive rate", size=(8.6, 5.2))
    n = len(evidence)
    least = 10.0 ** math.floor(math.log10(1 / max(100, n)))
    grid = np.geomspace(least, 1.0, 300)
    for band, alpha, label in (
        (uniform_band, 0.35, "at all thresholds at once (DKW)"),
        (pointwise_band, 0.8, "at each threshold (Clopper-Pearson)"),
    ):
        low, high = band(evidence, grid, significance=1 - confidence)
        axes.fill_between(
            grid, np.maximum(low, least), high, color=_WASH, alpha=alpha, linewidth=0,
            label=f"{100 * confidence:g}% confidence, {label}",
        )  # fmt: skip
    fpr, tpr = roc_curve(evidence)
    axes.plot(
        np.maximum(fpr, least), np.maximum(tpr, least), color=BLUE, linewidth=2,
        drawstyle="steps-post", label="measured",
    )  # fmt: skip
    axes.plot(grid, grid, color=MUTED, linewidth=1, linestyle=(0, (2, 3)), label="guessing")
    if allowed is not None:
        inside = allowed[0] >= least
        axes.plot(
            allowed[0][inside], allowed[1][inside], color=AMBER, linewidth=2,
            linestyle=(0, (6, 3)), label="the most that the claim allows",
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=(least, 1), ylim=(least, 1.15))
    axes.grid(which="major", color=GRID, linewidth=1)
    axes.legend(frameon=False, labelcolor=INK, fontsize=9.5, loc="lower right")
    return data_uri(figure)


def score_histogram(evidence: Evidence) -> str:
    """How the scores of members and of the others are spread; the outermost percent is drawn at the
    edge."""
    figure, axes = canvas("score; higher means more likely a member", "share of canaries")
    ends = np.quantile(np.asarray(evidence.scores), [0.005, 0.995])
    if ends[0] == ends[1]:
        ends = ends + np.array([-0.5, 0.5])
    bins = np.linspace(ends[0], ends[1], 31)
    for scores, color, label, dashes in (
        (evidence.members, BLUE, "in", DASHES[0]), (evidence.others, AMBER, "out", DASHES[2]),
    ):  # fmt: skip
        weights = np.full(len(scores), 100 / len(scores))
        axes.hist(
            np.clip(scores, *ends), bins, weights=weights, histtype="stepfilled", color=color,
            alpha=0.18,
        )  # fmt: skip
        axes.hist(
            np.clip(scores, *ends), bins, weights=weights, histtype="step", color=color,
            linewidth=1.6, linestyle=dashes, label=label,
        )  # fmt: skip
    axes.yaxis.set_major_formatter("{x:.0f}%")
    axes.legend(frameon=False, labelcolor=INK, fontsize=9.5)
    return data_uri(figure)


def epsilon_bars(measured: float, claimed: float, ceiling: float) -> str:
    """Measured at least, claimed, and the most that could have been measured."""
    rows = [("measured, at least", measured, BLUE), ("claimed", claimed, AMBER)]
    if math.isfinite(ceiling):
        rows.append(("could have been measured", ceiling, GRID))
    figure, axes = canvas("ε", "measured against claimed")
    finite = [value for _, value, _ in rows if math.isfinite(value)]
    top = 1.3 * max([*finite, 1e-3])
    for i, (name, value, color) in enumerate(reversed(rows)):
        axes.barh(i, min(value, top), color=color, height=0.42)
        text = f"{value:.3f}" if math.isfinite(value) else "infinity"
        axes.annotate(
            f"{name}  {text}", (0, i + 0.23), xytext=(2, 3), textcoords="offset points",
            color=INK, fontsize=10.5,
        )  # fmt: skip
    axes.set(xlim=(0, top), ylim=(-0.5, len(rows) - 0.3), yticks=[])
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color=GRID, linewidth=1)
    return data_uri(figure)


def sampling_chart(attack: SamplingAttack) -> str:
    """AUC against the number of labels asked for; dashed: the most that the guarantee allows."""
    figure, axes = canvas("labels asked for, of each example", "AUC of the attack", size=(8.6, 5.2))
    for curve, color, mark in zip(attack.curves, SERIES, MARKS, strict=False):
        axes.plot(
            attack.queries, curve.auc, color=color, linewidth=2, marker=mark, label=curve.name
        )
        if curve.allowed is not None:
            axes.plot(
                attack.queries, curve.allowed, color=color, linewidth=1.4, linestyle=(0, (6, 3))
            )
    axes.axhline(0.5, color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
    axes.set(xscale="log", ylim=(0.4, 1.02))
    axes.grid(which="major", color=GRID, linewidth=1)
    axes.legend(frameon=False, labelcolor=INK, fontsize=9.5)
    return data_uri(figure)


def every(result: AuditResult, allowed: tuple[Array, Array] | None) -> dict[str, str]:
    """All charts of a result, by name."""
    return {
        "roc": roc_chart(result.evidence, allowed, 1 - result.significance),
        "histogram": score_histogram(result.evidence),
        "epsilon": epsilon_bars(result.epsilon_lower, result.claimed_epsilon, result.ceiling),
    }
