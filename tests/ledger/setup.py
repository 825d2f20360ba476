"""Small plans and runs for the tests of ledgers."""

import pytest
import sqlalchemy as sa

import dptorch
from dptorch.ledger import DatasetLedger, connection, store
from dptorch.ledger.store import Store

OS = "operating system"

#: What somebody with access to the file might do to a ledger of one run of five steps.
EDITS = {
    "edited": "UPDATE dptorch_ledger_entries SET steps = 2 WHERE seq = 4",
    "edited body": "UPDATE dptorch_ledger_entries SET body = '{}' WHERE seq = 4",
    "moved to another data set": "UPDATE dptorch_ledger_entries SET dataset = 'b' WHERE seq = 4",
    "deleted": "DELETE FROM dptorch_ledger_entries WHERE seq = 4",
    "cut off": "DELETE FROM dptorch_ledger_entries WHERE seq > 4",
    "a hash of other letters": "UPDATE dptorch_ledger_entries SET hash = 'é' WHERE seq = 4",
    "backdated": "UPDATE dptorch_ledger_entries SET time = '2020-01-01T00:00:00' WHERE seq = 4",
    "swapped": "UPDATE dptorch_ledger_entries SET seq = -seq WHERE seq IN (4, 5); "
    "UPDATE dptorch_ledger_entries SET seq = 9 + seq WHERE seq < 0",
    "appended": "INSERT INTO dptorch_ledger_entries SELECT 99, time, kind, dataset, run, session, "
    "first, steps, body, previous, hash FROM dptorch_ledger_entries WHERE seq = 4",
    "head set back": "UPDATE dptorch_ledger_head SET seq = 3",
}


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


def execute(location: str, *statements: str) -> None:
    """Statements of SQL on a ledger's database."""
    store = Store(location, create=False)
    with store._engine.begin() as connection:
        for statement in statements:
            connection.execute(sa.text(statement))
    store.close()


def do_not_look(patch: pytest.MonkeyPatch) -> None:
    """The broken twin: nobody looks what a path leads to, and the file is left to its log."""
    patch.setattr(connection, "files_of", lambda path: None)
    patch.setattr(store, "files_of", lambda path: None)
    patch.setattr(store, "files_in_use", lambda engine: None)
    patch.setattr(store, "copy_log_into_file", lambda engine: None)
