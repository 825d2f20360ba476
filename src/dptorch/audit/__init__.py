"""Measure what a run leaks, and hold it against what it claims.

audit       one call for a plan or a run: white_box, black_box
evidence    scores of canaries, and whether each was in
bounds      what such scores prove: a lower bound on ε, one argument a file
thresholds  how to choose a threshold without looking at the labels it is judged on
games       adversaries: Dirac canaries on the engine, the step game, new tokens
scores      signs of membership, one family a file
membership  trained attacks: LanguageMIA, ImageMIA
sampling_attack
            labels alone, asked again and again, against what the answers' guarantee allows
attacked_run
            the same on a run, beside models with and without protection of the same data
result      claim, measurement and verdict
roc, audit_charts, audit_page
            curves, numbers people read off them, and the page
"""

from dptorch.audit.attacked_run import attack_run
from dptorch.audit.audit_page import write_report
from dptorch.audit.auditing import audit
from dptorch.audit.evidence import Evidence
from dptorch.audit.games import audit_step, new_token_canaries, play_dirac, play_steps
from dptorch.audit.membership import ImageMIA, LanguageMIA
from dptorch.audit.result import AuditResult, judge
from dptorch.audit.sampling_attack import SamplingAttack, play_sampling

__all__ = [
    "AuditResult",
    "Evidence",
    "ImageMIA",
    "LanguageMIA",
    "SamplingAttack",
    "attack_run",
    "audit",
    "audit_step",
    "judge",
    "new_token_canaries",
    "play_dirac",
    "play_sampling",
    "play_steps",
    "write_report",
]
