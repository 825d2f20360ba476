"""PrivatePredictor: charged before answered, never over the budget, repeats free, bad input refused."""

import threading

import numpy as np
import pytest
import torch
from tests.ledger.setup import execute
from tests.prediction.setup import Says, ensemble, predictor, rows
from torch import nn

import dptorch
from dptorch.errors import BudgetExhausted, ConfigurationError, LedgerError
from dptorch.ledger import Cap, open_ledger
from dptorch.plan.prediction_plan import ANSWERS
from dptorch.prediction import PrivatePredictor
from dptorch.prediction import predictor as module
from dptorch.prediction.mechanisms import NoisyAnswers


@pytest.mark.parametrize("mechanism", ANSWERS)
def test_the_budget_pays_for_what_was_asked_and_no_more(mechanism):
    made = predictor(mechanism, queries=6, threshold=-1e9 if mechanism[0] == "c" else None)
    assert made.remaining == 6
    made.predict(rows(4))
    assert made.remaining == 2
    with pytest.raises(BudgetExhausted, match="pays for 2 more"):
        made.predict(rows(3, start=100))
    assert made.remaining == 2  # nothing was spent
    made.predict(rows(2, start=100))
    assert made.remaining == 0
    assert made.spent().epsilon == pytest.approx(2.0, rel=1e-3)
    with pytest.raises(BudgetExhausted):
        made.predict(rows(1, start=200))


def spent_at_each_draw(made):
    """What was charged whenever noise was drawn, over three queries."""
    seen = []
    draw = made._draws.normal

    def watched(shape):
        seen.append(round(made.account.spent, 9))
        return draw(shape)

    made._draws.normal = watched
    for start in (0, 10, 20):
        made.predict(rows(1, start))
    return seen


class AnswersFirst(PrivatePredictor):
    """A broken twin: it charges when the answer is there."""

    def _release(self, combined) -> NoisyAnswers:
        found = self._mechanism.release(combined, self.plan, self._draws)
        self.account.charge([self.plan.event(len(combined))])
        return found


def test_charged_before_the_noise_is_drawn():
    assert spent_at_each_draw(predictor("gaussian", queries=4)) == [0.25, 0.5, 0.75]
    twin = AnswersFirst(ensemble(2), clip=1.0, budget=(1.0, 1e-5), queries=4)
    assert spent_at_each_draw(twin) == [0.0, 0.25, 0.5]


def test_exact_repeats_are_free_and_near_ones_are_not():
    made = predictor("gaussian", queries=10)
    first = made.predict(rows(3))
    again = made.predict(torch.cat([rows(3), rows(1)]))
    assert again.charged == 0
    assert torch.equal(again.scores[:3], first.scores)
    assert torch.equal(again.scores[3], first.scores[0])
    near = made.predict(torch.nextafter(rows(3), torch.tensor(9.0)))
    assert near.charged == 3
    assert not torch.equal(near.scores, first.scores)
    assert made.predict(rows(3).double()).charged == 3  # other bytes
    assert made.predict(-rows(1)).charged == 0  # -0.0 is 0.0


def test_a_cache_by_near_match_would_be_caught(monkeypatch):
    exact = module._keys
    monkeypatch.setattr(module, "_keys", lambda inputs: exact(inputs.round(decimals=3)))
    made = predictor("gaussian", queries=10)
    made.predict(rows(3))
    assert made.predict(torch.nextafter(rows(3), torch.tensor(9.0))).charged == 0


def test_averaging_over_one_query_gains_nothing():
    made = predictor("gaussian", queries=10)
    scores = torch.stack([made.predict(rows(1)).scores for _ in range(50)])
    assert float(scores.std(0).max()) == 0.0


def test_the_work_is_the_same_for_known_rows_and_new_ones():
    seen = []

    def counted(inputs):
        seen.append(len(inputs))
        return torch.zeros(len(inputs), 3)

    made = predictor("gaussian", of=[counted], queries=10)
    for inputs in (rows(4), rows(4), rows(8)):
        made.predict(inputs)
    assert seen == [4, 4, 8]


def test_a_budget_goes_on_where_it_was(tmp_path):
    patients = open_ledger(tmp_path / "ledger.db").dataset("patients")
    predictor("gaussian", queries=5, ledger=patients, name="shop").predict(rows(3))
    again = predictor("gaussian", queries=5, ledger=patients, name="shop")
    assert again.remaining == 2
    with pytest.raises(BudgetExhausted):
        again.predict(rows(3))
    with pytest.raises(LedgerError, match="another plan"):
        predictor("gaussian", queries=6, ledger=patients, name="shop")


@pytest.mark.slow
def test_a_predictor_reserves_its_budget_under_the_cap(tmp_path):
    ledger = open_ledger(tmp_path / "ledger.db")
    patients = ledger.dataset("patients")
    patients.set_cap(Cap(4.0, 1e-5))
    first = predictor("gaussian", ledger=patients, name="first")
    with pytest.raises(BudgetExhausted, match="cap"):
        predictor("laplace", ledger=patients, budget=(3.5, 1e-5))
    first.predict(rows(1))
    assert patients.total().committed < 4.0
    first.close()  # gives 19 of 20 answers back
    predictor("laplace", ledger=patients, budget=(2.5, 1e-5)).predict(rows(1))
    with pytest.raises(LedgerError, match="closed"):
        first.predict(rows(1, start=50))
    assert [run.steps for run in patients.runs()] == [1, 1]
    assert ledger.verify().problems == []


def test_the_cap_and_the_runs_must_be_for_the_same_unit(tmp_path):
    patients = open_ledger(tmp_path / "ledger.db").dataset("patients")
    predictor("gaussian", ledger=patients).predict(rows(1))
    with pytest.raises(ConfigurationError, match="unit"):
        predictor("gaussian", ledger=patients, unit="user")


def test_a_ledger_that_cannot_be_written_answers_nothing(tmp_path):
    location = str(tmp_path / "ledger.db")
    made = predictor("gaussian", ledger=open_ledger(location).dataset("patients"), name="shop")
    made.predict(rows(1))
    execute(location, "DELETE FROM dptorch_ledger_entries WHERE seq = 3")
    with pytest.raises(LedgerError, match="lacks entry"):
        made.predict(rows(1, start=5))
    (tmp_path / "ledger.db").unlink()
    with pytest.raises(LedgerError, match="gone"):
        made.predict(rows(1, start=6))


def test_threads_never_overspend():
    made = predictor("gaussian", queries=40)
    answered = []

    def ask(start):
        for i in range(20):
            try:
                answered.append(made.predict(rows(1, start + i)).charged)
            except BudgetExhausted:
                return

    threads = [threading.Thread(target=ask, args=(100 * i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(answered) == 40
    assert made.account.spent == pytest.approx(1.0)


def test_a_public_model_stands_in_when_the_budget_is_spent():
    made = predictor("gaussian", queries=2, on_exhausted=Says([0.0, 0.0, 5.0, 0.0]))
    assert made.predict(rows(2)).source == "private"
    after = made.predict(rows(2, start=9))
    assert after.source == "public"
    assert after.labels.tolist() == [2, 2]
    assert made.account.spent == pytest.approx(1.0)


def trained_privately():
    model = nn.Linear(1, 3)
    engine = dptorch.PrivacyEngine(
        model, sample_rate=0.5, steps=1, noise_multiplier=2.0, target_delta=1e-5, sample_size=8
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine.attach(optimizer)
    data = torch.utils.data.TensorDataset(rows(8), torch.zeros(8, dtype=torch.int64))
    for x, y in engine.loader(data):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, engine


@pytest.mark.slow
def test_a_model_that_was_trained_privately_needs_no_noise():
    model, engine = trained_privately()
    statement = engine.statement()
    for shown in (statement, statement.to_dict()):
        made = PrivatePredictor(model, trained_with=shown)
        answers = made.predict(rows(5))
        assert answers.source == "covered"
        assert torch.equal(answers.scores, model(rows(5)).detach().double())
        assert made.remaining is None
        assert made.spent().epsilon == statement.epsilon
        assert "Already covered, no noise needed" in str(made.statement())
        assert made.statement().to_dict()["covered_by_training"] is True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"private_randomness": False}, "seed"),
        ({"epsilon": float("inf")}, "infinite"),
        ({"epsilon": None}, "not the statement"),
    ],
)
def test_a_statement_that_shows_nothing_covers_nothing(change, message):
    good = {"epsilon": 1.0, "delta": 1e-5, "private_randomness": True}
    assert PrivatePredictor(Says([1, 0]), trained_with=good).covered is not None
    with pytest.raises(ConfigurationError, match=message):
        PrivatePredictor(Says([1, 0]), trained_with=good | change)
    with pytest.raises(ConfigurationError, match="one model"):
        PrivatePredictor([Says([1, 0])] * 2, trained_with=good)


def test_the_statement_says_what_is_guaranteed():
    made = predictor("gaussian", 5, queries=20)
    made.predict(rows(3))
    said, values = str(made.statement()), made.statement().to_dict()
    assert "These 3 answers are" in said
    assert "mu=" in said
    assert "counted in this process alone" in said
    assert values["sensitivity"] == pytest.approx(2 / 5)
    assert values["private_randomness"] is False  # a seed
    assert values["epsilon"] == pytest.approx(made.spent().epsilon)


@pytest.mark.parametrize(
    "inputs",
    [
        torch.tensor([[float("nan")]]),
        torch.tensor([[float("inf")]]),
        torch.zeros(0, 1),
        torch.zeros(3),
        [[1.0]],
    ],
)
def test_bad_inputs_are_refused_and_cost_nothing(inputs):
    made = predictor("gaussian")
    with pytest.raises(ConfigurationError, match="inputs"):
        made.predict(inputs)
    assert made.account.spent == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"of": []}, "models"),
        ({"of": [3]}, "no model"),
        ({"clip": None}, "clip=None"),
        ({"mechanism": "gnmax", "clip": 1.0}, "Votes have none"),
        ({"mechanism": "mixing", "mix_with": None}, "needs a public model"),
        ({"mix_with": Says([1, 0])}, "needs a public model"),
        ({"budget": None}, "budget=None"),
        ({"on_exhausted": "shrug"}, "on_exhausted='shrug'"),
        ({"mechanism": "gauss"}, "mechanism='gauss'"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        predictor(arguments.pop("mechanism", "gaussian"), **arguments)


def test_outputs_that_are_no_logits_are_refused_before_anything_is_spent():
    for of in ([lambda x: torch.zeros(len(x))], [lambda x: torch.zeros(len(x), 1)]):
        made = predictor("gaussian", of=of)
        with pytest.raises(ConfigurationError, match="shape"):
            made.predict(rows(2))
        assert made.account.spent == 0
    made = predictor("gaussian", of=[Says([1, 0]), Says([1, 0, 0])])
    with pytest.raises(ConfigurationError, match="same classes"):
        made.predict(rows(2))


def test_models_that_overflow_contribute_a_bounded_vote():
    made = predictor("gaussian", of=[Says([np.nan, 0, 0, 0]), Says([1e308, -1e308, 0, 0])])
    assert torch.isfinite(made.predict(rows(2)).scores).all()
