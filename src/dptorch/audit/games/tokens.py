"""Canaries for language models: a token of its own at the end of each (Panda et al. 2025, *Privacy
Auditing of Large Language Models*, arXiv:2503.06808).

A token that occurs in one text only is learned from that text alone, so its probability tells far
more than that of any sequence of ordinary tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dptorch.audit.evidence import Evidence
from dptorch.audit.result import FEWEST_CANARIES
from dptorch.audit.scores.signals import device_of, evaluating, logits_of
from dptorch.errors import ConfigurationError
from dptorch.randomness import RootKey
from dptorch.tape.recording.model_hooks import hooks_of

__all__ = ["TokenCanaries", "new_token_canaries"]

PURPOSE = "token canaries"


@dataclass(frozen=True, eq=False)
class TokenCanaries:
    """Canaries that are token sequences, each ending in a token of its own.

    Attributes:
        ids: int64 [M, T].
        member: bool [M]: whether each belongs into the training data.
    """

    ids: Tensor
    member: Tensor

    @property
    def inside(self) -> Tensor:
        """The sequences to add to the training data, each a record of its own, [n, T]."""
        return self.ids[self.member]

    def evidence(self, model: nn.Module, *, batch_size: int = 32) -> Evidence:
        """Score each canary by the log probability of its own token after its prefix."""
        device = device_of(model)
        found = []
        with evaluating(model), torch.no_grad():
            for part in self.ids.split(batch_size):
                logits = logits_of(model(input_ids=part[:, :-1].to(device)))[:, -1]
                log_p = logits.double().log_softmax(-1)
                found.append(log_p.gather(1, part[:, -1:].to(device))[:, 0].cpu())
        return Evidence(torch.cat(found).numpy(), self.member.numpy())


def new_token_canaries(
    model: Any,
    tokenizer: Any,
    count: int,
    *,
    prefixes: Sequence[str] | None = None,
    length: int = 16,
    seed: int | None = None,
) -> TokenCanaries:
    """Add `count` tokens to tokenizer and model, and make a canary of each.

    Call it before the engine is made: the embeddings grow. The new rows start equal, at the mean of
    the others. Add `canaries.inside` to the training data, train, and hold the claim against
    ``judge(canaries.evidence(model), epsilon=..., delta=..., adversary=...)``. How many
    are in is a secret of the audit: give the plan a rate and a batch size, not the data's length.

    Args:
        model: with ``resize_token_embeddings``, as Hugging Face models have.
        tokenizer: with ``add_tokens``.
        prefixes: public texts to begin canaries with, reused in turn; by default random tokens. They
            must not come from the private data.
        length: tokens of a canary, its own included.
        seed: for tests; by default secret randomness.

    Raises:
        ConfigurationError: fewer than 20, or a model that has an engine already.
    """
    if count < FEWEST_CANARIES or length < 2:
        raise ConfigurationError(
            f"count={count}, length={length}: expected at least {FEWEST_CANARIES} canaries of two or "
            "more tokens."
        )
    if hooks_of(model) is not None:
        raise ConfigurationError(
            "the model already has a privacy engine, which follows its embeddings as they are. Make "
            "canaries first, then the engine."
        )
    key = RootKey.from_os() if seed is None else RootKey.from_seed(seed)
    stream = int.from_bytes(key.derive(PURPOSE, 0)[:16], "little")
    rng = np.random.Generator(np.random.Philox(key=stream))
    before = model.get_input_embeddings().weight.shape[0]
    ordinary = min(before, len(tokenizer))
    tokenizer.add_tokens([f"<canary-{i}>" for i in range(count)])
    if len(tokenizer) > before:
        model.resize_token_embeddings(len(tokenizer))
    own = torch.arange(len(tokenizer) - count, len(tokenizer))
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            if layer is not None:
                layer.weight[own] = layer.weight[:ordinary].mean(0)
    if prefixes is None:
        head = torch.from_numpy(rng.integers(0, ordinary, size=(count, length - 1)))
    else:
        rows = [tokenizer(text)["input_ids"] for text in prefixes]
        rows = [row[: length - 1] for row in rows if len(row) >= length - 1]
        if not rows:
            raise ConfigurationError(f"no prefix has {length - 1} tokens. Lower length={length}.")
        head = torch.tensor([rows[i % len(rows)] for i in range(count)])
    return TokenCanaries(
        ids=torch.cat([head, own[:, None]], dim=1),
        member=torch.from_numpy(rng.random(count) < 0.5),
    )
