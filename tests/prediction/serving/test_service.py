"""A service of a run: what it loads, and what it does not serve."""

import pytest
from tests.prediction.serving.setup import QUERIES, arrays, make_run, row, service_of

from dptorch.errors import BudgetExhausted, ConfigurationError, DataError, LedgerError
from dptorch.prediction.serving.service import open_service


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("service"))


def test_answers_are_classes_and_the_budget_is_public(run, tmp_path):
    service = service_of(run, str(tmp_path / "ledger.db"))
    reply = service.answer([row(i) for i in range(5)])
    assert set(reply.answers) <= {"0", "1"}
    assert reply.charged == 5
    found = service.budget()
    assert (found["remaining"], found["queries"], found["unit"]) == (
        QUERIES - 5,
        QUERIES,
        "example",
    )
    assert 0 < found["epsilon_spent"] < 8.0
    again = service_of(run, str(tmp_path / "ledger.db"))  # after a restart
    assert again.budget()["remaining"] == QUERIES - 5


def test_together_costs_the_same(run, tmp_path):
    service = service_of(run, str(tmp_path / "ledger.db"))
    reply = service.answer([row(i) for i in range(30)], together=True)
    assert len(reply.answers) == reply.charged == 30


def test_models_that_do_not_agree_answer_null(run, tmp_path):
    terms = {"mechanism": "confident-gnmax", "threshold": 1e6}
    service = service_of(run, str(tmp_path / "ledger.db"), **terms)
    assert service.answer([row(1)]).answers == [None]


def test_another_plan_on_the_budget_is_refused(run, tmp_path):
    service_of(run, str(tmp_path / "ledger.db"))
    with pytest.raises(LedgerError, match="another plan"):
        service_of(run, str(tmp_path / "ledger.db"), queries=QUERIES + 1)
    with pytest.raises(LedgerError, match="another plan"):
        service_of(run, str(tmp_path / "ledger.db"), budget=(9.0, 1e-5))
    other = service_of(run, str(tmp_path / "ledger.db"), queries=3, name="second")
    with pytest.raises(BudgetExhausted):
        other.answer([row(i) for i in range(4)])


def test_a_run_of_shards_needs_a_budget(run):
    with pytest.raises(ConfigurationError, match="--budget"):
        open_service(run)


def test_rows_that_do_not_fit_are_refused(run, tmp_path):
    service = service_of(run, str(tmp_path / "ledger.db"))
    for bad in (
        [{"age": "old", "sex": "f"}],
        [{"age": 3, "sex": "x"}],
        [{"age": None, "sex": "f"}],
    ):
        with pytest.raises(DataError, match="row"):
            service.answer(bad)
    assert service.predictor.account.spent == 0


def test_a_model_that_was_trained_privately_has_no_budget_to_spend():
    service = arrays((3,))
    reply = service.answer([[0.1, 0.2, 0.3]] * 4)
    assert (len(reply.answers), reply.charged, reply.source) == (4, 0, "covered")
    assert service.budget() == {
        "run": "arrays", "needed": False, "epsilon_spent": 1.5, "delta": 1e-5
    }  # fmt: skip
    for bad in ([[1.0]], [[1.0, 2.0], [1.0]], [[1e300] * 3]):
        with pytest.raises((DataError, ConfigurationError)):
            service.answer(bad)
