"""Small plans and runs for the tests of ledgers."""

import dptorch
from dptorch.ledger import DatasetLedger

OS = "operating system"


def plan(steps: int = 10, noise: float = 2.0, rate: float = 0.1) -> dptorch.PrivacyPlan:
    return dptorch.make_plan(
        sample_rate=rate, sample_size=100, steps=steps, noise_multiplier=noise, target_delta=1e-5
    )


def take(patients: DatasetLedger, steps: int, of: dptorch.PrivacyPlan | None = None) -> str:
    """A run that takes some steps and closes; returns its id."""
    of = of or plan()
    record = patients.run(of, OS)
    for step in range(steps):
        record.count(step, of.event(1))
    record.close()
    return record.run
