"""Tiny models with random weights, data of ragged lengths and private trainers on them."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    DataCollatorForSeq2Seq,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
    TrainingArguments,
)

from dptorch.integrations.transformers import DPTrainer, PrivacyArguments
from tests.oracles.loop import norms_of, one_example_loop

ROWS, WORDS = 10, 30
BOUND = 0.05

quiet = pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=WORDS,
            n_embd=8,
            n_layer=1,
            n_head=2,
            n_positions=16,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=1,
            eos_token_id=1,
            pad_token_id=0,
        )
    )


CLASSIFIER: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 3,
    "pad_token_id": 0,
}


def bert() -> nn.Module:
    return BertForSequenceClassification(BertConfig(**CLASSIFIER))


def opt() -> nn.Module:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=WORDS,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            ffn_dim=12,
            max_position_embeddings=16,
            word_embed_proj_dim=8,
            dropout=0.0,
            attention_dropout=0.0,
            layerdrop=0.0,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
        )
    )


def bloom() -> nn.Module:
    return BloomForCausalLM(
        BloomConfig(
            vocab_size=WORDS,
            hidden_size=8,
            n_layer=1,
            n_head=2,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
        )
    )


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
        )
    )


def t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=WORDS,
            d_model=8,
            d_kv=4,
            d_ff=12,
            num_layers=2,
            num_heads=2,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def roberta() -> nn.Module:
    return RobertaForSequenceClassification(RobertaConfig(**CLASSIFIER))


def qwen2() -> nn.Module:
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=WORDS,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
        )
    )


MODELS = {
    "gpt2": gpt2, "bert": bert, "opt": opt, "bloom": bloom, "llama": llama, "t5": t5,
    "roberta": roberta, "qwen2": qwen2,
}  # fmt: skip
CLASSIFIERS = ("bert", "roberta")
#: Where adapters go.
TARGETS = {
    "gpt2": ["c_attn"], "bert": ["query", "value"], "opt": ["q_proj", "v_proj"],
    "bloom": ["query_key_value"], "llama": ["q_proj", "v_proj"], "t5": ["q", "v"],
    "roberta": ["query", "value"], "qwen2": ["q_proj", "v_proj"],
}  # fmt: skip


def build(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = MODELS[name]()
    model.eval()
    return model


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"[PAD]": 0, "</s>": 1, "[UNK]": 2} | {f"w{i}": i for i in range(3, WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", eos_token="</s>", pad_token="[PAD]"
    )


def ids(lengths: list[int], seed: int = 1) -> list[list[int]]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(3, WORDS, (n,), generator=g).tolist() for n in lengths]


RAGGED = [4 + 3 * i % 7 for i in range(ROWS)]


def data(name: str, lengths: list[int] = RAGGED) -> Dataset:
    """Texts of those lengths; classes, the text itself or another text of another length as labels."""
    texts = ids(lengths)
    labels: list[Any] = texts
    if name in CLASSIFIERS:
        labels = [i % 3 for i in range(len(texts))]
    elif name == "t5":
        labels = ids([2 + i % 4 for i in range(len(texts))], seed=2)
    return Dataset.from_dict(
        {"input_ids": texts, "attention_mask": [[1] * len(t) for t in texts], "labels": labels}
    )


def collator(name: str) -> Any:
    """Pads texts, and labels with -100, as DataCollatorForSeq2Seq does for every model."""
    if name in CLASSIFIERS:
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(tokenizer())
    return DataCollatorForSeq2Seq(tokenizer())


def arguments(folder: Any, cls: Any = TrainingArguments, **settings: Any) -> Any:
    return cls(
        str(folder),
        **{
            "num_train_epochs": 1,
            "per_device_train_batch_size": ROWS,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "logging_strategy": "no",
            **settings,
        },
    )


def trainer_of(
    model: nn.Module,
    name: str,
    folder: Any,
    *,
    cls: Any = DPTrainer,
    privacy: dict[str, Any] | None = None,
    dataset: Any = None,
    given: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """A private trainer without noise on all ten rows, unless told otherwise."""
    defaults: dict[str, Any] = {
        "noise_multiplier": 0.0, "target_delta": 1e-3, "max_grad_norm": BOUND, "seed": 0,
    }  # fmt: skip
    return cls(
        model,
        arguments(folder, cls.arguments_class, **settings),
        train_dataset=data(name) if dataset is None else dataset,
        data_collator=collator(name),
        processing_class=tokenizer(),
        privacy=PrivacyArguments(**{**defaults, **(privacy or {})}),
        **(given or {}),
    )


def ran(trainer: Any) -> Any:
    """The trainer, once it has trained."""
    trainer.train()
    return trainer


class Kill(TrainerCallback):
    """Ends the process's training in the middle, as Ctrl-C does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def one_step_of_sgd(trainer: Any) -> dict[str, Tensor]:
    """What one step at learning rate 1 takes off the parameters."""
    parameters = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in parameters.items()}
    trainer.optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda _: 1.0)
    trainer.train()
    return {n: before[n] - p.detach() for n, p in parameters.items()}


def loop_over_examples(
    model: nn.Module, name: str, bound: float = BOUND, dataset: Any = None, loss: Any = None
) -> dict[str, Tensor]:
    """The mean over rows of clipped gradients of each one's own loss, one row at a time."""
    rows = list(data(name) if dataset is None else dataset)
    copied = copy.deepcopy(model).train()

    def own_loss(m: nn.Module, at: Tensor) -> Tensor:
        batch = collator(name)([dict(rows[int(at)])])
        return m(**batch).loss if loss is None else loss(m, batch)

    each = one_example_loop(copied, [torch.arange(len(rows))], own_loss)
    factors = (bound / norms_of(each)).clamp(max=1.0)
    return {
        n: (g * factors.reshape(-1, *[1] * (g.dim() - 1))).sum(0) / len(rows)
        for n, g in each.items()
    }


def largest_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference over the largest expected value."""
    size = max(float(v.abs().max()) for v in expected.values())
    return max(float((found[n] - v).abs().max()) for n, v in expected.items()) / size
