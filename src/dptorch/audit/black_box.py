"""Audit a run that planted canaries, by an adversary who sees the finished model only."""

from __future__ import annotations

from pathlib import Path

import torch

from dptorch.audit import bounds
from dptorch.audit.bounds import Bound
from dptorch.audit.evidence import Evidence
from dptorch.audit.result import AuditResult, judge
from dptorch.audit.scores import class_log_probabilities, logit_confidence
from dptorch.audit.thresholds import Threshold
from dptorch.errors import ConfigurationError, DataError
from dptorch.plan import PrivacyPlan
from dptorch.randomness import KeySource
from dptorch.training.canaries import CANARY_FILE, Canaries
from dptorch.training.run_folder import RunFolder, load_model

__all__ = ["audit_run", "has_canaries"]


def has_canaries(folder: Path) -> bool:
    """Whether the run in that folder planted canaries."""
    return (folder / CANARY_FILE).exists()


def audit_run(
    folder: str | Path,
    *,
    significance: float = 0.05,
    bound: str | Bound = "one-run",
    threshold: Threshold | str | tuple[float, float] = "bonferroni",
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> AuditResult:
    """Guess from a run's model which of its canaries were in, and hold the guesses against its ε.

    Args:
        folder: such as "runs/demo", of a run with planted canaries (`dptorch train --canaries`).
        significance, bound, threshold: see `dptorch.audit.result.judge`.
        device: where the model runs.
        progress: show a bar.

    Guarantees:
        With the bound "one-run": if the run is (ε, δ)-DP as its statement says, the result is REFUTED
        with probability at most `significance`.
        Held by `test_a_private_run_is_not_refuted_and_a_run_that_lies_is`.

    Raises:
        DataError: the folder holds no finished run, or one without canaries.
    """
    argument = bounds.get_bound(bound) if isinstance(bound, str) else bound
    if argument.needs_independent_scores:
        raise ConfigurationError(
            f"bound={bound!r} is for independent games, but the canaries of one run share a model. Use "
            "bound='one-run'."
        )
    run = RunFolder(Path(folder))
    about = run.read_json("run.json")
    if not has_canaries(run.path):
        raise DataError(
            f"{run.path} planted no canaries, so its model cannot be audited. Train with "
            "--canaries 1000, or audit the plan alone: --adversary white-box."
        )
    if "statement" not in about:
        raise DataError(f"{run.path}: that run has not finished or been interrupted.")
    canaries = Canaries.read(run.path / CANARY_FILE)
    model = load_model(run.path).to(device)
    log_p, labels = class_log_probabilities(
        model, (canaries.inputs, canaries.labels), progress=progress
    )
    claims = about["statement"]
    evidence = Evidence(logit_confidence(log_p, labels), canaries.member.numpy())
    notes = []
    if not KeySource(claims["key_provenance"]).is_private:
        notes.append("The noise came from a seed; whoever knows it needs no audit.")
    return judge(
        evidence,
        epsilon=float(claims["epsilon"]),
        delta=float(claims["delta"]),
        adversary="black box: sees the finished model's confidence in the made-up examples",
        bound=argument,
        threshold=threshold,
        significance=significance,
        notes=notes,
        plan=PrivacyPlan.from_json(run.path / "plan.json"),
        steps=int(claims["steps"]),
        statement=(run.path / "statement.txt").read_text(encoding="utf-8"),
    )
