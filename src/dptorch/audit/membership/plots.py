"""Plots of a membership attack, written only where a folder is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dptorch.audit.evidence import Array, Evidence
from dptorch.audit.roc import roc_curve
from dptorch.errors import ConfigurationError

__all__ = ["precision_recall", "save"]


def precision_recall(evidence: Evidence) -> tuple[Array, Array, Array]:
    """Return (threshold, precision, recall), one value for each score at or above which one may say
    "member", from the highest on.

    Example:
        >>> import numpy as np
        >>> found = precision_recall(Evidence(np.array([0.9, 0.6, 0.2]), np.array([True, False, True])))
        >>> [values.round(2).tolist() for values in found]
        [[0.9, 0.6, 0.2], [1.0, 0.5, 0.67], [0.5, 0.5, 1.0]]
    """
    scores = np.asarray(evidence.scores)
    thresholds = np.unique(scores)[::-1]
    said = np.sort(scores)
    members = np.sort(evidence.members)
    every = len(said) - np.searchsorted(said, thresholds)
    right = len(members) - np.searchsorted(members, thresholds)
    return thresholds, right / every, right / len(members)


def save(folder: Path, result: dict[str, Any], evidence: Evidence) -> None:
    """Write roc_curve.png, precision_recall.png with both thresholds marked, scores.png and
    feature_importance.png.

    Raises:
        ConfigurationError: matplotlib is missing.
    """
    try:
        from dptorch.training.run_charts import AMBER, BLUE, DASHES, MUTED, canvas

        folder.mkdir(parents=True, exist_ok=True)
        figure, axes = canvas("false positive rate", f"ROC, AUC {result['roc_auc']:.3f}")
    except ImportError as error:
        raise ConfigurationError(
            "plot_dir needs matplotlib: pip install 'dptorch[audit]'."
        ) from error
    fpr, tpr = roc_curve(evidence)
    least = 0.5 / len(evidence)
    axes.plot(np.maximum(fpr, least), np.maximum(tpr, least), color=BLUE, linewidth=2)
    axes.plot([least, 1], [least, 1], color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
    axes.set(xscale="log", yscale="log", xlim=(least, 1), ylim=(least, 1.1))
    figure.savefig(folder / "roc_curve.png", dpi=150)
    _save_precision_recall(folder, result, evidence)
    figure, axes = canvas("probability of being a member", "scores")
    for scores, color, label, dashes in (
        (evidence.members, BLUE, "members", DASHES[0]), (evidence.others, AMBER, "others", DASHES[2]),
    ):  # fmt: skip
        axes.hist(
            scores,
            np.linspace(0, 1, 21),
            histtype="step",
            color=color,
            linestyle=dashes,
            label=label,
        )
    axes.legend(frameon=False)
    figure.savefig(folder / "scores.png", dpi=150)
    figure, axes = canvas("AUC lost", "feature importance")
    top = list(result["feature_importance"].items())[:12][::-1]
    axes.barh([name for name, _ in top], [value for _, value in top], color=BLUE)
    figure.savefig(folder / "feature_importance.png", dpi=150)


def _save_precision_recall(folder: Path, result: dict[str, Any], evidence: Evidence) -> None:
    from dptorch.training.run_charts import AMBER, BLUE, MUTED, SERIES, canvas

    figure, axes = canvas("recall", f"precision, area {result['precision_recall_auc']:.3f}")
    _, precision, recall = precision_recall(evidence)
    axes.step(recall, precision, where="pre", color=BLUE, linewidth=2)
    share = len(evidence.members) / len(evidence)
    axes.plot([0, 1], [share, share], color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
    marks = (
        ("standard", 0.5, "o", AMBER),
        ("optimal", result["optimal_threshold"], "s", SERIES[2]),
    )
    for name, threshold, marker, color in marks:
        axes.plot(
            result[f"recall_{name}"],
            result[f"precision_{name}"],
            marker,
            color=color,
            markersize=9,
            label=f"{name} threshold, {threshold:.2f}",
        )
    axes.set(xlim=(0, 1.02), ylim=(0, 1.05))
    axes.legend(frameon=False)
    figure.savefig(folder / "precision_recall.png", dpi=150)
