"""Games between a mechanism and an adversary who tells whether a canary was in."""

from dptorch.audit.games.dirac import DiracGame, play_dirac
from dptorch.audit.games.step_game import SCORES, SortedBlocks, audit_step, play_steps
from dptorch.audit.games.tokens import TokenCanaries, new_token_canaries

__all__ = [
    "SCORES",
    "DiracGame",
    "SortedBlocks",
    "TokenCanaries",
    "audit_step",
    "new_token_canaries",
    "play_dirac",
    "play_steps",
]
