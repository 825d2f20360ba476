"""Tiny models with random weights in folders, as `save_pretrained` writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

WORDS = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "</s>", "good", "bad", "film", "plot", "it", "was",
    "the", "a", "very", "not", "yes", "no", ".", "|", "name", "area", "food", "serves", "in",
]  # fmt: skip


def tokenizer(*, bert: bool) -> PreTrainedTokenizerFast:
    """Words as tokens; of BERT with its marks around a text."""
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names: dict[str, Any] = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    if bert:
        names |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B [SEP]",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
    else:
        names["eos_token"] = "</s>"
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def bert_folder(folder: Path) -> str:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=32, pad_token_id=0,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer(bert=True).save_pretrained(folder)
    return str(folder)


#: RoBERTa-large, but for its widths.
ROBERTA_LARGE: dict[str, Any] = {
    "num_hidden_layers": 24, "num_attention_heads": 16, "max_position_embeddings": 514,
    "type_vocab_size": 1, "layer_norm_eps": 1e-5,
}  # fmt: skip


def roberta_large_folder(folder: Path) -> str:
    """RoBERTa-large's architecture in one two-thousandth of its size."""
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, pad_token_id=0, **ROBERTA_LARGE
    )
    RobertaForMaskedLM(config).save_pretrained(folder)
    words = tokenizer(bert=True)
    words.model_input_names = ["input_ids", "attention_mask"]
    words.save_pretrained(folder)
    return str(folder)


def gpt2_folder(folder: Path) -> str:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(WORDS), n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=5,
        eos_token_id=5, pad_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer(bert=False).save_pretrained(folder)
    return str(folder)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
