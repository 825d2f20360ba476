"""BloGSSFTTrainer on TRL: a tiny GPT-2 and its tokenizer, loaded from disk."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from peft import LoraConfig
from tests.integrations.transformers.setup import WORDS, build, ids, tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig

from dptorch.audit import LanguageMIA
from dptorch.blogs.trl_trainer import BloGSSFTTrainer
from dptorch.errors import ConfigurationError, PrivacyWarning
from dptorch.integrations.transformers import sft_trainer
from dptorch.integrations.transformers.private_trainer import PRIVATE_FOLDER

pytestmark = pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")

TEXTS = [f"record {i} says that {i * 7 % 13} is after {i * 5 % 11}" for i in range(37)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and a tokenizer as `from_pretrained` finds them."""
    path = tmp_path_factory.mktemp("gpt2")
    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(
        TEXTS, trainers.WordLevelTrainer(special_tokens=["[UNK]", "<|endoftext|>"])
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="[UNK]",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=32,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=1,
    )
    GPT2LMHeadModel(config).save_pretrained(path)
    return path


def _trainer(folder, tmp_path, *, arguments=None, config=SFTConfig, **kwargs):
    settings = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "learning_rate": 1e-2,
        "disable_tqdm": True,
    }
    made = {}
    if folder is not None:
        made["model"] = AutoModelForCausalLM.from_pretrained(folder)
        made["tokenizer"] = AutoTokenizer.from_pretrained(folder)
    defaults = {
        **made,
        "train_dataset": Dataset.from_dict({"text": TEXTS}),
        "target_epsilon": 1.0,
        "mechanism_options": {"index": "0.1.21"},
        "seed": 0,
    }
    if kwargs.get("mechanism") == "gaussian":
        del defaults["mechanism_options"]
    return BloGSSFTTrainer(
        args=config(str(tmp_path), **{**settings, **(arguments or {})}), **{**defaults, **kwargs}
    )


@pytest.mark.slow
def test_forgetnets_call(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    training_args = TrainingArguments(
        str(tmp_path), num_train_epochs=1, report_to=[], save_strategy="no", logging_steps=1
    )
    with pytest.warns(PrivacyWarning, match="withdrawn"):
        trainer = BloGSSFTTrainer(
            model=model,
            args=training_args,
            train_dataset=Dataset.from_dict({"body": TEXTS}),
            eval_dataset=Dataset.from_dict({"body": TEXTS[:5]}),
            tokenizer=tokenizer,
            dataset_text_field="body",
            target_epsilon=200.0,
            delta=1e-5,
            clip_value=1.0,
        )
    trainer.train()
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert set(moved) == set(before)
    spent = trainer.get_privacy_spent()
    assert 0 < spent <= 200.0
    assert f"{spent:.4f}"
    assert spent.formal_epsilon == float("inf")
    assert trainer.privacy_statement().guarantee == "none (heuristic)"
    assert "eval_loss" in trainer.evaluate()


def texts(seed):
    return [
        " ".join(f"w{word}" for word in row) for row in ids([5 + i % 4 for i in range(14)], seed)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["opt", "bloom", "llama"])
def test_a_step_of_the_documents_causal_models(name, tmp_path):
    """Beside GPT-2: the shuffle moves every parameter."""
    model = build(name)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = _trainer(
        None, tmp_path, model=model, tokenizer=tokenizer(), target_epsilon=200.0,
        train_dataset=Dataset.from_dict({"text": texts(1)}),
        arguments={"num_train_epochs": 1, "per_device_train_batch_size": 7},
    )  # fmt: skip
    trainer.train()
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == set(before)
    assert 0 < trainer.get_privacy_spent() <= 200.0


@pytest.mark.slow
def test_every_parameter_of_a_causal_bert_moves(tmp_path, monkeypatch):
    """Its head has a dense layer and a normalisation before the output embeddings."""

    def run(folder):
        model = causal_bert()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        rows = Dataset.from_dict({"text": texts(1)})
        trainer = _trainer(
            None, tmp_path / folder, model=model, tokenizer=tokenizer(), target_epsilon=200.0,
            train_dataset=rows, eval_dataset=rows.select([0, 1]),
            arguments={
                "num_train_epochs": 1, "per_device_train_batch_size": 7,
                "per_device_eval_batch_size": 1,
            },
        )  # fmt: skip
        trainer.train()
        with torch.no_grad():
            own = [
                model(**trainer.data_collator([row]), use_cache=False).loss
                for row in trainer.eval_dataset
            ]
        error = abs(trainer.evaluate()["eval_loss"] - torch.stack(own).mean())
        return {n for n, p in model.named_parameters() if torch.equal(p, before[n])}, error

    unmoved, error = run("whole")
    assert not {n for n in unmoved if "cls." in n}, unmoved
    assert error < 1e-5
    # The broken twin: TRL's fused head.
    monkeypatch.setattr(sft_trainer, "_layers_before_output", lambda model: False)
    unmoved, error = run("fused")
    assert {n for n in unmoved if "transform" in n}
    assert error > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "opt", "bloom", "llama"])
def test_the_attack_takes_every_feature_of_the_documents_models(name):
    model = causal_bert() if name == "bert" else build(name)
    mia = LanguageMIA(models=("Logistic Regression",), permutations=0)
    result = mia.attack(texts(1), texts(2), model, tokenizer())
    assert 0 <= result["roc_auc"] <= 1
    assert any("gradient_norm" in feature for feature in result["feature_importance"])
    assert not any("left out" in warning for warning in result["warnings"])


def causal_bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=WORDS, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=12, max_position_embeddings=16, is_decoder=True, pad_token_id=0,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertLMHeadModel(config)


class Watch(TrainerCallback):
    """The accumulated gradients before the shuffle, and those that the optimizer gets."""

    def __init__(self):
        self.pairs = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        raw = [p.grad.clone() for g in optimizer.param_groups for p in g["params"]]
        self._raw = raw

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        def look(inner, *_):
            stepped = [p.grad.clone() for g in inner.param_groups for p in g["params"]]
            self.pairs.append((self._raw, stepped))

        optimizer.optimizer.register_step_pre_hook(look)


@pytest.mark.slow
def test_every_optimizer_step_gets_shuffled_gradients_and_only_those(folder, tmp_path):
    """37 rows in batches of 4, two to a step: the last step of an epoch has one."""
    watch = Watch()
    trainer = _trainer(
        folder, tmp_path, arguments={"max_grad_norm": 0.0}, clip_value=1e3, callbacks=[watch]
    )
    trainer.train()
    steps = trainer.privacy_statement()
    assert len(watch.pairs) == trainer.state.global_step == 10
    assert steps.steps == steps.steps_planned == 10
    for raw, stepped in watch.pairs:
        multisets = [
            (Counter(r.flatten().tolist()), r, s) for r, s in zip(raw, stepped, strict=True)
        ]
        assert all(m == Counter(s.flatten().tolist()) for m, _, s in multisets)
        assert not any(torch.equal(r, s) for _, r, s in multisets if r.numel() > 100)


@pytest.mark.slow
def test_the_index_so_far_is_in_every_entry_of_the_log(folder, tmp_path):
    trainer = _trainer(folder, tmp_path, eval_dataset=Dataset.from_dict({"text": TEXTS[:5]}))
    trainer.train()
    values = [entry["nominal_epsilon"] for entry in trainer.state.log_history]
    assert values == sorted(values)
    assert len(set(values)) == 10
    assert values[-1] == float(trainer.get_privacy_spent()) <= 1.0
    assert not any("epsilon" in e for e in trainer.state.log_history)


@pytest.mark.slow
def test_adapters_and_frozen_parameters(folder, tmp_path):
    trainer = _trainer(
        folder,
        tmp_path,
        peft_config=LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM"),
    )
    model = trainer.model
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer.train()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(trainer.privacy_statement().block_sizes)
    assert moved
    assert all("lora" in name for name in moved)


@pytest.mark.slow
def test_training_stops_at_the_target(folder, tmp_path):
    trainer = _trainer(folder, tmp_path, arguments={"max_steps": 4})
    trainer.args.max_steps = 100
    trainer.train()
    assert 4 <= trainer.state.global_step < 100
    assert trainer.get_privacy_spent() <= 1.0
    with pytest.raises(ConfigurationError, match="stands at its target"):
        trainer.train()


@pytest.mark.slow
def test_a_resumed_run_goes_on_counting(folder, tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 6}
    whole = _trainer(folder, tmp_path, arguments=arguments)
    whole.train()
    resumed = _trainer(folder, tmp_path, arguments=arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert resumed.privacy_statement().steps == 10
    assert resumed.get_privacy_spent() == whole.get_privacy_spent()
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_callers_arguments_stay_as_they_are(folder, tmp_path):
    args = SFTConfig(str(tmp_path), use_cpu=True, report_to=[], max_steps=1)
    trainer = BloGSSFTTrainer(
        AutoModelForCausalLM.from_pretrained(folder),
        args,
        Dataset.from_dict({"body": TEXTS}),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        dataset_text_field="body",
        target_epsilon=100.0,
    )
    assert args.dataset_text_field == "text"
    assert trainer.args.dataset_text_field == "body"


def test_bad_arguments_are_refused(folder, tmp_path):
    with pytest.raises(ConfigurationError, match="Did you mean 'clip_value'"):
        _trainer(folder, tmp_path, clip_valu=1.0)
    with pytest.raises(ConfigurationError, match="attainable minimum"):
        _trainer(folder, tmp_path, target_epsilon=1e-6)
    stream = Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()
    with pytest.raises(ValueError, match="max_steps"):
        _trainer(folder, tmp_path, train_dataset=stream)


GAUSSIAN = {"mechanism": "gaussian", "target_epsilon": 8.0}


@pytest.mark.slow
@pytest.mark.filterwarnings("error:a batch did not come:dptorch.errors.PrivacyWarning")
def test_noise_under_the_same_call(folder, tmp_path):
    """Poisson batches of 8 in the mean in parts of at most 4; 10 steps for two epochs of 37."""
    trainer = _trainer(
        folder, tmp_path, eval_dataset=Dataset.from_dict({"text": TEXTS[:5]}), seed=None, **GAUSSIAN
    )
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    spent = trainer.get_privacy_spent()
    assert trainer.state.global_step == trainer._blogs.steps_done == 10
    assert spent.formal_epsilon == float(spent) <= 8.0
    assert trainer._blogs.engine.sampling_run == {"poisson": 10}
    assert not any(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())
    entries = [e for e in trainer.state.log_history if "not_private_loss" in e]
    assert [e["epsilon"] for e in entries] == sorted({e["epsilon"] for e in entries})
    assert entries[-1]["epsilon"] == pytest.approx(float(spent))
    assert "differentially private" in str(trainer.privacy_statement())
    assert "eval_loss" in trainer.evaluate()


@pytest.mark.slow
def test_noisy_steps_clip_each_record_whatever_its_parts(folder, tmp_path):
    """The same seed whole or in parts of 2: the same run, so noise is added once a step."""
    runs = []
    for rows, parts in ((8, 1), (2, 4)):
        arguments = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": parts}
        trainer = _trainer(folder, tmp_path, arguments=arguments, **GAUSSIAN)
        trainer.train()
        runs.append([p.detach().clone() for p in trainer.model.parameters()])
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_noise_on_adapters_alone(folder, tmp_path):
    trainer = _trainer(
        folder,
        tmp_path,
        peft_config=LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM"),
        **GAUSSIAN,
    )
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all("lora" in name for name in moved)


class Kill(TrainerCallback):
    """Ends a run before its ninth step, as Ctrl-C does."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 8:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_resumed_private_run_goes_on_with_its_steps(folder, tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 6}
    whole = _trainer(folder, tmp_path / "whole", arguments=arguments, **GAUSSIAN)
    whole.train()
    killed = _trainer(folder, tmp_path, arguments=arguments, callbacks=[Kill()], **GAUSSIAN)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = _trainer(folder, tmp_path, arguments=arguments, **GAUSSIAN)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert resumed._blogs.steps_done == 10
    assert float(resumed.get_privacy_spent()) == float(whole.get_privacy_spent())
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert not (tmp_path / PRIVATE_FOLDER).exists()  # the run is complete
    other = _trainer(folder, tmp_path, arguments=arguments, **GAUSSIAN)
    with pytest.raises(ConfigurationError, match="not known what the checkpoint"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


@pytest.mark.parametrize("setting", ["packing", "padding_free"])
def test_joined_records_are_refused(folder, tmp_path, setting):
    with pytest.raises(ConfigurationError, match=setting):
        _trainer(folder, tmp_path, arguments={setting: True}, **GAUSSIAN)
