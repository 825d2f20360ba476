"""Two hundred legitimate programs: none is refused, and each sums what a loop over examples sums."""

from __future__ import annotations

import pytest

from tests.engine.legitimate.batches import BATCHES
from tests.engine.legitimate.harness import Program, run
from tests.engine.legitimate.loops import LOOPS
from tests.engine.legitimate.losses import LOSSES
from tests.engine.legitimate.models import MODELS, SLOW
from tests.engine.legitimate.monitoring import MONITORED

pytestmark = pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")
PROGRAMS: dict[str, Program] = {**LOSSES, **LOOPS, **MONITORED, **BATCHES, **MODELS, **SLOW}
CASES = [
    # `make quick` runs one program in five, on the engine's own loader.
    pytest.param(name, own, marks=[pytest.mark.slow] if own or name in SLOW or i % 5 else [])
    for i, (name, program) in enumerate(PROGRAMS.items())
    for own in ([False, True] if program.loaders == "both" else [False])
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "own"), CASES)
def test_a_legitimate_program_runs_and_is_exact(
    name: str, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(PROGRAMS[name], own, monkeypatch)
