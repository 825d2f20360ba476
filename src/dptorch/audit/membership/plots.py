"""Plots of a membership attack, written only where a folder is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dptorch.audit.evidence import Evidence
from dptorch.audit.roc import roc_curve
from dptorch.errors import ConfigurationError

__all__ = ["save"]


def save(folder: Path, result: dict[str, Any], evidence: Evidence) -> None:
    """Write roc_curve.png, scores.png and feature_importance.png.

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
