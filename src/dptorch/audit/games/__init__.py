"""Games between a mechanism and an adversary who tells whether a canary was in."""

from dptorch.audit.games.steps import SCORES, SortedBlocks, audit_step, play_steps

__all__ = ["SCORES", "SortedBlocks", "audit_step", "play_steps"]
