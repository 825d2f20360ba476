"""Text by private tokens: charged one by one, repeated at no cost, drawn from the models."""

import pytest
import torch

from dptorch.errors import BudgetExhausted, ConfigurationError
from dptorch.prediction import PrivatePredictor, generate

V = 5


def counts_up(ids):
    """A language model that goes on with the next number."""
    return 8.0 * torch.eye(V)[(ids[:, -1] + 1) % V]


def knows_nothing(ids):
    return torch.zeros(len(ids), V)


def predictor(models=200, **terms):
    given = {"budget": (8.0, 1e-5), "queries": 40, "mix_with": knows_nothing, "seed": 0} | terms
    return PrivatePredictor([counts_up] * models, "mixing", **given)


def test_many_models_are_heard_through_the_mixture():
    made = predictor()
    text = generate(made, torch.tensor([0]), 30)
    assert len(text) == 31
    right = (text[1:] == (text[:-1] + 1) % V).double().mean()
    assert right > 0.6  # 0.2 by the public model
    assert made.remaining == 10
    assert torch.equal(generate(made, torch.tensor([0]), 30), text)
    assert made.remaining == 10  # the same prompt again costs nothing
    assert "of the public model's" in str(made.statement())


def test_tokens_are_charged_until_none_can_be_paid_for():
    made = predictor(queries=3)
    with pytest.raises(BudgetExhausted):
        generate(made, torch.tensor([0]), 4)
    assert made.remaining == 0


def test_text_ends_at_its_end():
    made = predictor(queries=1000, budget=(1e4, 1e-5))
    assert generate(made, torch.tensor([1]), 100, end=4).tolist()[-1] == 4


@pytest.mark.parametrize("prompt", [torch.zeros(2, 2), torch.zeros(2), torch.zeros(0).long()])
def test_what_is_no_prompt_is_refused(prompt):
    with pytest.raises(ConfigurationError, match="token ids"):
        generate(predictor(), prompt, 3)
