"""`audit`: one call for a plan, an engine or a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dptorch.audit.black_box import audit_run, has_canaries
from dptorch.audit.result import AuditResult
from dptorch.audit.white_box import audit_plan
from dptorch.engine.privacy_engine import PrivacyEngine
from dptorch.errors import ConfigurationError, DataError, one_of
from dptorch.plan import PrivacyPlan

__all__ = ["ADVERSARIES", "audit"]

ADVERSARIES = ("auto", "white-box", "black-box")


def audit(
    target: PrivacyPlan | PrivacyEngine | str | Path,
    *,
    adversary: str = "auto",
    significance: float = 0.05,
    **settings: Any,
) -> AuditResult:
    """Hold a claim of privacy against a measurement.

    ====================  ==========================================================================
    a plan, an engine     white box: the engine runs the plan on canaries before an adversary who
                          sees the noisy gradient of every step. Sharp, seconds. It is about the
                          library and the plan, not about your model or loop.
    the folder of a run   black box: if the run planted canaries (`dptorch train --canaries 1000`),
                          its model is asked about them. About that run, and seldom sharp. Without
                          canaries, or with ``adversary="white-box"``, the run's plan is audited.
    ====================  ==========================================================================

    Args:
        target: what is audited; a string or path is a run's folder or a plan's JSON file.
        adversary: "auto", "white-box" or "black-box".
        significance: α: how often the audit of a true claim says REFUTED, at most.
        settings: for a plan see `audit_plan`, for a run `audit_run`.

    Returns:
        claim, lower bound, ceiling and verdict; ``print`` it, or pass it to `write_report`.

    Raises:
        ConfigurationError, DataError: for something that cannot be audited.

    Example:
        >>> from dptorch import make_plan
        >>> plan = make_plan(sample_rate=0.1, sample_size=1000, steps=20, target_epsilon=2.0)
        >>> print(audit(plan, canaries=300, seed=0).verdict)
        NOT REFUTED
    """
    one_of("adversary", adversary, ADVERSARIES)
    if isinstance(target, PrivacyEngine):
        target = target.plan
    if isinstance(target, (str, Path)):
        path = Path(target)
        if path.is_dir():
            if adversary == "black-box" or (adversary == "auto" and has_canaries(path)):
                return audit_run(path, significance=significance, **settings)
            settings.setdefault("statement", _statement(path))
            path = path / "plan.json"
        if not path.is_file():
            raise DataError(
                f"{path} does not exist: expected the folder of a run, such as runs/demo, or a plan "
                "as JSON."
            )
        target = PrivacyPlan.from_json(path)
    if not isinstance(target, PrivacyPlan):
        raise ConfigurationError(
            f"{type(target).__name__} cannot be audited: expected a plan or a run (a PrivacyPlan, a "
            "PrivacyEngine, or the path of a run's folder). For scores of your own there is "
            "dptorch.audit.judge."
        )
    if adversary == "black-box":
        raise ConfigurationError(
            "adversary='black-box' asks a trained model, and a plan has none: pass a run's folder."
        )
    return audit_plan(target, significance=significance, **settings)


def _statement(folder: Path) -> str | None:
    path = folder / "statement.txt"
    return path.read_text(encoding="utf-8") if path.exists() else None
