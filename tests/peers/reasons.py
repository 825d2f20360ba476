"""Why a test or an example of a peer does not pass: refused on purpose, or not applicable."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tests.peers.suites import Outcome

__all__ = ["NOT_APPLICABLE", "REFUSED", "Reason", "Verdict", "judge"]

Kind = Literal["passed", "refused on purpose", "not applicable", "unexplained"]
REFUSED: Kind = "refused on purpose"
NOT_APPLICABLE: Kind = "not applicable"


@dataclass(frozen=True)
class Reason:
    """A reason, and which failures it explains.

    Attributes:
        kind: `REFUSED` or `NOT_APPLICABLE`.
        test: a pattern that is found in the names of the tests.
        said: a pattern that is found in their errors, so that another failure stays unexplained.
        why: one sentence for the page.
    """

    kind: Kind
    test: str
    said: str
    why: str

    def explains(self, test: str, message: str) -> bool:
        return bool(re.search(self.test, test) and re.search(self.said, message, re.DOTALL))


@dataclass(frozen=True)
class Verdict:
    """What came of one test: its kind, the reason, and the error where there is no reason."""

    kind: Kind
    why: str = ""


def judge(outcomes: Mapping[str, Outcome], reasons: Sequence[Reason]) -> dict[str, Verdict]:
    """Each test's verdict. What its own suite skips is not applicable, for the reason it gives."""
    return {test: _judged(test, *outcome, reasons) for test, outcome in outcomes.items()}


def _judged(test: str, outcome: str, message: str, reasons: Sequence[Reason]) -> Verdict:
    if outcome == "passed":
        return Verdict("passed")
    if outcome == "skipped":
        own = message.removeprefix("Skipped: ").removeprefix("SkipTest: ")
        return Verdict(NOT_APPLICABLE, f"Skipped by its own suite: {own}.")
    for reason in reasons:
        if reason.explains(test, message):
            return Verdict(reason.kind, reason.why)
    return Verdict("unexplained", " ".join(message.split())[:300])
