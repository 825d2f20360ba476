"""The result of one test of a law."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LawTest"]


@dataclass(frozen=True)
class LawTest:
    """Whether what was seen fits one law that the plan states.

    Attributes:
        law: what was tested, in words.
        p_value: how likely a run under the plan is to look at least as bad, at most; corrected for the
            number of comparisons within the test.
        significance: its share of the audit's; 0 where nothing is left to chance.
        worst: what was seen, in words.
    """

    law: str
    p_value: float
    significance: float
    worst: str

    @property
    def broken(self) -> bool:
        """Whether the law is refuted."""
        return self.p_value <= self.significance
