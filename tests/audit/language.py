"""A tiny causal language model, its tokenizer, and texts of one distribution."""

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

WORDS = 60


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<unk>": 0, "<bos>": 1} | {f"w{i}": i + 2 for i in range(WORDS)}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", bos_token="<bos>")


def make_model(width: int = 32) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=WORDS + 2, n_embd=width, n_layer=1, n_head=2, n_positions=64,
        bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def make_texts(count: int, seed: int, words: int = WORDS) -> list[str]:
    rng = np.random.default_rng(seed)
    return [
        " ".join(f"w{i}" for i in rng.integers(0, words, size=rng.integers(6, 14)))
        for _ in range(count)
    ]


def fit(model: GPT2LMHeadModel, rows: list[list[int]], steps: int, lr: float = 1e-2) -> None:
    """Train without privacy until it knows the rows by heart."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = labels[i, : len(row)] = torch.tensor(row)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
