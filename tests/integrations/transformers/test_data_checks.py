"""Bad data and bad settings are said before the first step; nothing is spent."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from datasets import Dataset
from transformers import (
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    GPT2Config,
    GPT2ForSequenceClassification,
    default_data_collator,
)

from dptorch.errors import ConfigurationError, DataError, PrivacyWarning
from dptorch.integrations.transformers import DPTrainer, PrivacyArguments
from dptorch.integrations.transformers.label_smoothing import SmoothLabels
from tests.integrations.transformers import setup
from tests.integrations.transformers.setup import arguments, build, collator, data, tokenizer

PRIVACY = PrivacyArguments(noise_multiplier=1.0, target_delta=1e-5)


def make(folder, name="gpt2", *, privacy=PRIVACY, **given):
    settings = {
        "model": build(name), "args": arguments(folder, per_device_train_batch_size=4),
        "train_dataset": data(name), "data_collator": collator(name),
        "processing_class": tokenizer(),
    }  # fmt: skip
    return DPTrainer(**{**settings, **given}, privacy=privacy)


def changed(**columns):
    rows = data("gpt2").to_dict()
    return Dataset.from_dict({**rows, **columns})


def test_no_pad_token(tmp_path):
    unpadded = copy.deepcopy(tokenizer())
    unpadded.pad_token = None
    with pytest.raises(ConfigurationError, match=r"tokenizer\.pad_token = tokenizer\.eos_token"):
        make(tmp_path, processing_class=unpadded)


def test_a_classifier_that_does_not_know_the_padding(tmp_path):
    config = GPT2Config(vocab_size=setup.WORDS, n_embd=8, n_layer=1, n_head=2, num_labels=3)
    config.pad_token_id = None
    model = GPT2ForSequenceClassification(config)
    with pytest.raises(ConfigurationError, match=r"model\.config\.pad_token_id = 0"):
        make(
            tmp_path,
            model=model,
            train_dataset=data("bert"),
            data_collator=DataCollatorWithPadding(tokenizer()),
        )


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_labels_missing(name, tmp_path):
    rows = data(name).rename_column("labels", "target")
    with pytest.raises(ConfigurationError, match=r"no labels: it holds input_ids.*target"):
        make(
            tmp_path,
            name,
            train_dataset=rows,
            data_collator=DataCollatorWithPadding(tokenizer()),
        )


def test_empty_texts(tmp_path):
    texts = data("gpt2")["input_ids"]
    rows = changed(input_ids=[[] if i == 3 else t for i, t in enumerate(texts)])
    with pytest.raises(DataError, match="row 3 of the training data has no tokens"):
        make(tmp_path, train_dataset=rows)
    with pytest.raises(DataError, match="no rows"):
        make(tmp_path, train_dataset=data("gpt2").select([]))


def test_rows_whose_labels_are_all_masked_are_counted(tmp_path):
    labels = data("gpt2")["labels"]
    rows = changed(labels=[[-100] * len(t) if i in (2, 9) else t for i, t in enumerate(labels)])
    with pytest.warns(PrivacyWarning, match="2 of 10 rows have no label that counts"):
        make(tmp_path, train_dataset=rows)


def test_rows_are_counted_where_a_selection_left_them(tmp_path):
    """`select` keeps the table and an index of it: what was left out is not looked at."""
    texts = data("gpt2")["input_ids"]
    rows = changed(input_ids=[[] if i == 3 else t for i, t in enumerate(texts)])
    kept = rows.select([0, 1, 4, 5, 8, 9])
    assert make(tmp_path, train_dataset=kept).plan.sample_size == 6


def test_a_tokenizer_of_another_model(tmp_path):
    texts = [list(t) for t in data("gpt2")["input_ids"]]
    texts[5][0] = 31_000
    with pytest.raises(DataError, match="token 31000, but the model knows 30"):
        make(tmp_path, train_dataset=changed(input_ids=texts))


def test_rows_that_the_collator_does_not_pad(tmp_path):
    with pytest.raises(ConfigurationError, match="cannot be put into a batch"):
        make(tmp_path, data_collator=default_data_collator)


def test_streams_and_missing_data(tmp_path):
    with pytest.raises(ConfigurationError, match="a stream"):
        make(
            tmp_path,
            train_dataset=data("gpt2").to_iterable_dataset(),
            args=arguments(tmp_path, max_steps=2),
        )
    with pytest.raises(ConfigurationError, match="train_dataset is missing"):
        make(tmp_path, train_dataset=None)


def test_several_devices_in_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.TrainingArguments.n_gpu", property(lambda self: 2))
    with pytest.raises(ConfigurationError, match="2 GPUs in one process"):
        make(tmp_path)


def test_choosing_on_private_data(tmp_path):
    stop = EarlyStoppingCallback(early_stopping_patience=1)
    with pytest.raises(ConfigurationError, match="eval_is_public"):
        make(tmp_path, callbacks=[stop])
    trainer = make(tmp_path)
    trainer.add_callback(stop)
    with pytest.raises(ConfigurationError, match="eval_is_public"):
        trainer.train()
    assert trainer.engine.steps_done == 0
    rows, public = data("gpt2"), dataclasses.replace(PRIVACY, eval_is_public=True)
    for evaluation in (rows, {"other": data("gpt2"), "same": rows}):
        with pytest.raises(ConfigurationError, match="holds rows of train_dataset"):
            make(tmp_path, train_dataset=rows, eval_dataset=evaluation, privacy=public)
    with pytest.raises(ConfigurationError, match="releases every trial"):
        trainer.hyperparameter_search()
    with pytest.raises(ConfigurationError, match="the engine belongs to one"):
        make(tmp_path, model=None, model_init=lambda: build("gpt2"))


def test_batches_of_a_loader_of_its_own(tmp_path):
    trainer = make(tmp_path)
    with pytest.raises(ConfigurationError, match="Leave that method out"):
        trainer.training_step(trainer.model, {"input_ids": torch.ones(2, 3, dtype=torch.long)})


@pytest.mark.parametrize("labels", [torch.rand(4), torch.ones(4, 3)])
def test_smoothed_labels_that_are_no_classes(labels):
    with pytest.raises(ConfigurationError, match="Set it to 0"):
        SmoothLabels(0.1)({"logits": torch.randn(4, 3)}, labels)


def test_privacy_of_another_kind(tmp_path):
    with pytest.raises(ConfigurationError, match="give PrivacyArguments"):
        make(tmp_path, privacy={"target_epsilon": 8})


def test_labels_taken_from_a_model_that_needs_them(tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        return outputs.logits.mean()

    with pytest.raises(ConfigurationError, match="DataCollatorForSeq2Seq"):
        make(tmp_path, "t5", compute_loss_func=loss)


def test_a_batch_larger_than_the_data(tmp_path):
    with pytest.raises(ConfigurationError, match="larger than sample_size=10"):
        make(tmp_path, args=arguments(tmp_path, per_device_train_batch_size=64))


@pytest.mark.slow
def test_a_plain_data_set_of_torch_will_do(tmp_path):
    rows = [
        {"input_ids": torch.tensor(t), "labels": torch.tensor(t), "note": i}
        for i, t in enumerate(setup.ids([6] * 8))
    ]
    trainer = make(
        tmp_path,
        train_dataset=rows,
        data_collator=default_data_collator,
        args=arguments(tmp_path, per_device_train_batch_size=4, max_steps=2),
    )
    trainer.train()
    assert trainer.engine.sampling_run == {"poisson": 2}
