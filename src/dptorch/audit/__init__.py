"""Measure what a run leaks, and hold it against what it claims.

evidence    scores of canaries, and whether each was in
bounds      what such scores prove: a lower bound on ε, one argument a file
thresholds  how to choose a threshold without looking at the labels it is judged on
games       adversaries: the step game
result      claim, measurement and verdict
roc         curves and the numbers people read off them
"""

from dptorch.audit.audit import audit
from dptorch.audit.evidence import Evidence
from dptorch.audit.games import audit_step, play_steps
from dptorch.audit.result import AuditResult, judge

__all__ = ["AuditResult", "Evidence", "audit", "audit_step", "judge", "play_steps"]
