"""Perplexity against a loop over single texts."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers")

from dptorch import PrivacyEngine
from dptorch.errors import DataError
from dptorch.integrations.perplexity import perplexity
from tests.audit.language import WORDS, make_model, make_texts, make_tokenizer


def by_hand(model, texts, tokenizer):
    """Every token weighs the same; texts one at a time, without padding."""
    loss, tokens = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            loss += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    return math.exp(loss / tokens)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_it_weighs_tokens_and_ignores_padding(batch_size):
    model, tokenizer, texts = make_model().eval(), make_tokenizer(), make_texts(40, 1)
    with torch.no_grad():
        model.transformer.wte.weight.mul_(20)  # predictions that differ from token to token
    expected = by_hand(model, texts, tokenizer)
    assert expected > 1.2 * WORDS
    assert perplexity(model, texts, tokenizer, batch_size=batch_size) == pytest.approx(expected)
    of_texts = [by_hand(model, [text], tokenizer) for text in texts]
    assert abs(sum(of_texts) / 40 - expected) > 1.0  # the twin: a mean over texts is another number


def test_a_model_that_knows_nothing_has_the_size_of_its_vocabulary():
    model = make_model()
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    assert perplexity(model, make_texts(5, 2), make_tokenizer()) == pytest.approx(WORDS + 2)


def test_data_sets_with_a_column_and_texts_without_a_next_token():
    model, tokenizer, texts = make_model(), make_tokenizer(), make_texts(6, 3)
    tokenizer.bos_token = tokenizer.eos_token = None
    rows = [{"body": text} for text in [*texts, "w1"]]
    assert perplexity(model, rows, tokenizer, text_column="body") == pytest.approx(
        by_hand(model.eval(), texts, tokenizer)
    )
    with pytest.raises(DataError, match="no text has two tokens"):
        perplexity(model, ["w1"], tokenizer)


def test_a_model_in_private_training_is_left_as_it_was():
    model = make_model()
    before = perplexity(model, make_texts(6, 4), make_tokenizer())
    engine = PrivacyEngine(
        model, batch_size=2, sample_size=8, steps=2, noise_multiplier=1.0, target_delta=1e-3
    )
    model.train()
    assert perplexity(model, make_texts(6, 4), make_tokenizer()) == pytest.approx(before)
    assert model.training
    assert engine.steps_done == 0
