"""What a private trainer releases, against a loop over single examples, on eight architectures."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    DataCollatorWithPadding,
    FNetConfig,
    FNetForSequenceClassification,
    Trainer,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from dptorch.errors import ConfigurationError, ExamplesMixError, PrivacyError
from dptorch.integrations.transformers import DPSeq2SeqTrainer
from dptorch.integrations.transformers.private_trainer import PrivateTrainer
from tests.integrations.transformers import setup
from tests.integrations.transformers.setup import (
    WORDS,
    build,
    collator,
    data,
    largest_error,
    loop_over_examples,
    one_step_of_sgd,
    tokenizer,
    trainer_of,
)

pytestmark = [setup.quiet, pytest.mark.usefixtures("float64")]
TOLERANCE = 1e-9
EVERY = [
    name if name in ("gpt2", "bert") else pytest.param(name, marks=pytest.mark.slow)
    for name in setup.MODELS
]


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_a_step_is_the_clipped_sum_over_single_examples(name, tmp_path):
    """Texts, and labels, of different lengths, in two physical batches of five."""
    model = build(name)
    expected = loop_over_examples(model, name)
    trainer = trainer_of(
        model, name, tmp_path, per_device_train_batch_size=5, gradient_accumulation_steps=2
    )
    assert largest_error(one_step_of_sgd(trainer), expected) < TOLERANCE
    assert trainer.engine.sampling_run == {"poisson": 1}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(setup.MODELS))
def test_adapters_are_exact(name, tmp_path):
    lora = LoraConfig(r=2, target_modules=setup.TARGETS[name], init_lora_weights=False)
    model = get_peft_model(build(name), lora)
    expected = loop_over_examples(model, name)
    assert expected
    assert all("lora" in n for n in expected)
    trainer = trainer_of(model, name, tmp_path)
    assert largest_error(one_step_of_sgd(trainer), expected) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_sequence_to_sequence_trainer_is_exact_and_generates(checkpointed, tmp_path):
    model = build("t5")
    expected = loop_over_examples(model, "t5")
    trainer = trainer_of(
        model,
        "t5",
        tmp_path,
        cls=DPSeq2SeqTrainer,
        predict_with_generate=True,
        generation_max_length=4,
        gradient_checkpointing=checkpointed,
        gradient_checkpointing_kwargs={"use_reentrant": True} if checkpointed else None,
    )
    assert largest_error(one_step_of_sgd(trainer), expected) < TOLERANCE
    assert trainer.predict(data("t5")).predictions.shape[0] == setup.ROWS


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [0.1, 0.5])
def test_label_smoothing_is_exact(epsilon, tmp_path):
    def loss(model, batch):
        labels = batch.pop("labels")
        scores = model(**batch).logits[:, :-1].log_softmax(-1)
        counted = labels[:, 1:] != -100
        hit = scores.gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0]
        smooth = -((1 - epsilon) * hit + epsilon * scores.mean(-1))
        return smooth[counted].mean()

    model = build("gpt2")
    expected = loop_over_examples(model, "gpt2", loss=loss)
    trainer = trainer_of(model, "gpt2", tmp_path, label_smoothing_factor=epsilon)
    assert largest_error(one_step_of_sgd(trainer), expected) < TOLERANCE


@pytest.mark.slow
def test_a_loss_of_ones_own_with_class_weights_is_exact(tmp_path):
    weights = torch.tensor([0.2, 1.0, 3.0])

    def weighted(outputs, labels, num_items_in_batch=None):
        assert num_items_in_batch is None
        return torch.nn.functional.cross_entropy(
            outputs.logits, labels, weight=weights, reduction="none"
        ).mean()

    def alone(model, batch):
        return weighted(model(input_ids=batch["input_ids"]), batch["labels"])

    model = build("bert")
    expected = loop_over_examples(model, "bert", loss=alone)
    trainer = trainer_of(model, "bert", tmp_path, given={"compute_loss_func": weighted})
    assert largest_error(one_step_of_sgd(trainer), expected) < TOLERANCE


@pytest.mark.slow
def test_a_loss_over_the_number_of_items_is_refused_in_words(tmp_path):
    def summed(outputs, labels, num_items_in_batch=None):
        loss = torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum")
        return loss / num_items_in_batch

    trainer = trainer_of(build("bert"), "bert", tmp_path, given={"compute_loss_func": summed})
    with pytest.raises(ConfigurationError, match="num_items_in_batch is None under privacy"):
        trainer.train()


@pytest.mark.slow
def test_a_row_without_a_label_that_counts_adds_nothing(tmp_path):
    dataset = data("gpt2")
    masked = [row if i else [-100] * len(row) for i, row in enumerate(dataset["labels"])]
    dataset = dataset.remove_columns("labels").add_column("labels", masked)
    model = build("gpt2")
    rest = loop_over_examples(model, "gpt2", dataset=dataset.select(range(1, setup.ROWS)))
    expected = {n: g * (setup.ROWS - 1) / setup.ROWS for n, g in rest.items()}
    trainer = trainer_of(model, "gpt2", tmp_path, dataset=dataset)
    assert largest_error(one_step_of_sgd(trainer), expected) < TOLERANCE


# -- broken twins ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_count_of_all_examples_tokens_is_caught(tmp_path, monkeypatch):
    """The twin passes `num_items_in_batch` on, as the Trainer does."""

    def passed_on(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        count = (inputs["labels"][:, 1:] != -100).sum()
        return Trainer.compute_loss(self, model, inputs, return_outputs, count)

    monkeypatch.setattr(PrivateTrainer, "compute_loss", passed_on)
    with pytest.raises(PrivacyError):
        one_step_of_sgd(trainer_of(build("gpt2"), "gpt2", tmp_path))


@pytest.mark.slow
def test_a_number_of_tokens_is_caught(tmp_path, monkeypatch):
    """The same twin, with the count as a number of Python: the step is another."""

    def passed_on(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        count = sum(n - 1 for n in setup.RAGGED)
        return Trainer.compute_loss(self, model, inputs, return_outputs, count)

    model = build("gpt2")
    expected = loop_over_examples(model, "gpt2")
    monkeypatch.setattr(PrivateTrainer, "compute_loss", passed_on)
    try:
        error = largest_error(one_step_of_sgd(trainer_of(model, "gpt2", tmp_path)), expected)
    except PrivacyError:
        error = 1.0
    assert error > 1e-3


@pytest.mark.slow
def test_the_trainers_own_clipping_is_off_and_would_be_seen(tmp_path):
    model = build("gpt2")
    expected = loop_over_examples(model, "gpt2")
    trainer = trainer_of(model, "gpt2", tmp_path, max_grad_norm=1e-4)
    assert largest_error(one_step_of_sgd(trainer), expected) < TOLERANCE

    twin = trainer_of(build("gpt2"), "gpt2", tmp_path)
    attach = twin._attach

    def clip(optimizer, *_):
        for group in optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1e-4)

    def attach_and_clip(optimizer):
        attach(optimizer)
        optimizer.register_step_pre_hook(clip)

    twin._attach = attach_and_clip
    assert largest_error(one_step_of_sgd(twin), expected) > 1e-3


def test_what_the_collator_pads_does_not_count():
    """The setup's own check: rows of different lengths share a batch."""
    batch = collator("gpt2")([dict(row) for row in data("gpt2")])
    assert (batch["labels"] == -100).any()
    assert batch["input_ids"].shape[1] == max(setup.RAGGED)


def fnet() -> nn.Module:
    return FNetForSequenceClassification(
        FNetConfig(
            vocab_size=WORDS,
            hidden_size=8,
            num_hidden_layers=1,
            intermediate_size=12,
            max_position_embeddings=16,
            hidden_dropout_prob=0.0,
            num_labels=3,
        )
    )


def xlnet() -> nn.Module:
    return XLNetForSequenceClassification(
        XLNetConfig(
            vocab_size=WORDS,
            d_model=8,
            n_layer=1,
            n_head=2,
            d_inner=12,
            dropout=0.0,
            summary_last_dropout=0.0,
            num_labels=3,
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize("make", [fnet, xlnet])
def test_models_that_read_their_padding_are_refused_unless_rows_are_of_one_length(make, tmp_path):
    torch.set_default_dtype(torch.float32)  # XLNet makes its positions in it
    torch.manual_seed(0)
    with pytest.raises(ExamplesMixError, match="how far its batch is padded"):
        trainer_of(make(), "bert", tmp_path).train()
    collate = DataCollatorWithPadding(tokenizer(), padding="max_length", max_length=16)
    trainer = trainer_of(make(), "bert", tmp_path)
    trainer.data_collator = collate
    trainer.train()
    assert trainer.state.global_step == 1
