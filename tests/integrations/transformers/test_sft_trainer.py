"""DPSFTTrainer on TRL: texts as they come, prompts with completions, adapters, packed rows."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import GPT2LMHeadModel
from trl import SFTConfig

from dptorch.errors import ConfigurationError
from dptorch.integrations.transformers import DPSFTTrainer, PrivacyArguments
from tests.integrations.transformers import setup
from tests.integrations.transformers.setup import (
    BOUND,
    arguments,
    build,
    largest_error,
    loop_over_examples,
    one_step_of_sgd,
    tokenizer,
)

pytestmark = setup.quiet
TEXTS = [" ".join(f"w{3 + (i * 7 + j) % 27}" for j in range(3 + i % 5)) for i in range(setup.ROWS)]


def sft(model, folder, *, dataset=None, privacy=None, given=None, **settings):
    defaults = {"noise_multiplier": 0.0, "target_delta": 1e-3, "max_grad_norm": BOUND, "seed": 0}
    settings = {"max_length": 16, "bf16": False} | settings
    return DPSFTTrainer(
        model,
        arguments(folder, SFTConfig, **settings),
        train_dataset=dataset or Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer(),
        privacy=PrivacyArguments(**{**defaults, **(privacy or {})}),
        **(given or {}),
    )


def tokens_of(trainer):
    """The rows that TRL has made, for the loop over examples."""
    rows = trainer.train_dataset
    return Dataset.from_dict({n: list(rows[n]) for n in ("input_ids", "labels")})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_step_is_the_clipped_sum_over_single_texts(name, tmp_path, float64):
    trainer = sft(
        build(name), tmp_path, per_device_train_batch_size=5, gradient_accumulation_steps=2
    )
    expected = loop_over_examples(build(name), name, dataset=tokens_of(trainer))
    assert largest_error(one_step_of_sgd(trainer), expected) < 1e-9


@pytest.mark.slow
def test_only_completions_count_and_adapters_alone_are_trained(tmp_path, float64):
    pairs = Dataset.from_dict(
        {
            "prompt": ["w3 w4 w5"] * setup.ROWS,
            "completion": [" ".join(text.split()[: 1 + i % 4]) for i, text in enumerate(TEXTS)],
        }
    )
    lora = LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False)
    trainer = sft(build("gpt2"), tmp_path, dataset=pairs, given={"peft_config": lora})
    assert any(-100 in row for row in trainer.train_dataset["labels"])
    same = get_peft_model(build("gpt2"), lora)
    same.load_state_dict(trainer.model.state_dict())
    expected = loop_over_examples(same, "gpt2", dataset=tokens_of(trainer))
    assert all("lora" in name for name in expected)
    assert largest_error(one_step_of_sgd(trainer), expected) < 1e-9


@pytest.mark.slow
def test_labels_are_smoothed_on_models_that_transformers_does_not_list(tmp_path, float64):
    class OwnModel(GPT2LMHeadModel):
        pass

    def own(name):
        model = build("gpt2")
        model.__class__ = OwnModel if name == "own" else GPT2LMHeadModel
        return sft(model, tmp_path, label_smoothing_factor=0.3)

    steps = [one_step_of_sgd(own(name)) for name in ("own", "listed")]
    assert largest_error(*steps) < 1e-12


@pytest.mark.slow
def test_the_unit_is_the_user_whose_texts_they_are(tmp_path):
    rows = Dataset.from_dict({"text": TEXTS, "uid": [i // 2 for i in range(setup.ROWS)]})
    trainer = sft(
        build("gpt2"),
        tmp_path,
        dataset=rows,
        privacy={"user_column": "uid", "max_examples_per_user": 2, "noise_multiplier": 1.0},
        per_device_train_batch_size=5,
    )
    trainer.train()
    assert (trainer.plan.unit, trainer.plan.sample_size) == ("user", 5)
    assert "user" in trainer.privacy_statement().unit_text


@pytest.mark.slow
def test_a_run_with_noise_logs_and_evaluates(tmp_path):
    trainer = sft(
        build("gpt2"),
        tmp_path,
        privacy={"noise_multiplier": 1.0},
        given={"eval_dataset": Dataset.from_dict({"text": TEXTS[:3]})},
        per_device_train_batch_size=2,
        logging_strategy="steps",
        logging_steps=1,
        eval_strategy="epoch",
    )
    trainer.train()
    entries = trainer.state.log_history
    assert all(entry["epsilon"] > 0 for entry in entries)
    names = {name for entry in entries for name in entry}
    assert {"not_private_eval_loss", "not_private_eval_entropy"} <= names
    assert not {n for n in names if "entropy" in n or "loss" in n or "tokens" in n} - {
        n for n in names if n.startswith("not_private_")
    }
    assert "differentially private" in str(trainer.privacy_statement())


def test_packed_rows_are_a_unit_of_their_own_or_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="unit='packed sequence'"):
        sft(build("gpt2"), tmp_path, packing=True)
    packed = {"unit": "packed sequence"}
    with pytest.raises(ConfigurationError, match="packing_strategy='wrapped'"):
        sft(build("gpt2"), tmp_path, packing=True, privacy=packed)


@pytest.mark.slow
def test_packed_rows_are_exact(tmp_path, float64):
    trainer = sft(
        build("gpt2"),
        tmp_path,
        packing=True,
        packing_strategy="wrapped",
        privacy={"unit": "packed sequence"},
        per_device_train_batch_size=4,
    )
    rows = len(trainer.train_dataset)
    assert 1 < rows < setup.ROWS
    assert trainer.plan.sample_size == rows
    expected = loop_over_examples(build("gpt2"), "gpt2", dataset=tokens_of(trainer))
    assert largest_error(one_step_of_sgd(trainer), expected) < 1e-9
    assert "packed row" in str(trainer.privacy_statement())


@pytest.mark.parametrize(
    ("setting", "value"), [("padding_free", True), ("loss_type", "dft"), ("use_liger_kernel", True)]
)
def test_what_joins_records_or_hides_parameters_is_refused(setting, value, tmp_path):
    with pytest.raises(ConfigurationError, match=setting):
        sft(build("gpt2"), tmp_path, **{setting: value})


@pytest.mark.slow
def test_training_arguments_will_do(tmp_path):
    trainer = DPSFTTrainer(
        build("gpt2"),
        arguments(tmp_path, max_steps=1),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer(),
        privacy=PrivacyArguments(noise_multiplier=1.0, target_delta=1e-3, seed=0),
    )
    assert isinstance(trainer.args, SFTConfig)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert any(
        not torch.equal(p, q) for p, q in zip(trainer.model.parameters(), before, strict=True)
    )
