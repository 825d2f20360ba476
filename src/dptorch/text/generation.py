"""Text that a trained model goes on with; post-processing, covered by the model's own guarantee."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dptorch.errors import ConfigurationError, DataError

__all__ = ["generate"]


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    new_tokens: int = 40,
    greedy: bool = False,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """Return what the model writes after each prompt, up to the end of the text.

    Args:
        model, tokenizer: of a causal language model.
        prompts: what texts begin with; the empty one begins with the token for the end of a text.
        new_tokens: at most so many.
        greedy: take the likeliest token at each place, instead of drawing one.
        temperature: below 1 the likely tokens are drawn more often.
        seed: of the draws, which is no secret: a sample tells nothing but the model.

    Raises:
        ConfigurationError: for a temperature or a number of tokens that is not positive.
        DataError: a prompt is longer than the model reads.
    """
    if temperature <= 0 or new_tokens < 1:
        raise ConfigurationError(
            f"temperature={temperature}, new_tokens={new_tokens}: expected positive numbers."
        )
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    drawn = {} if greedy else {"temperature": temperature, "top_k": 0}
    longest = getattr(model.config, "max_position_embeddings", None)
    texts = []
    try:
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]),
        ):
            torch.manual_seed(seed)
            for (
                prompt
            ) in prompts:  # one by one: what stands beside a prompt does not change its text
                ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
                ids = list(ids) or [tokenizer.eos_token_id]
                room = new_tokens if longest is None else min(new_tokens, longest - len(ids))
                if room < 1:
                    raise DataError(
                        f"a prompt of {len(ids)} tokens leaves no room in a model that reads {longest}."
                    )
                given = torch.tensor([ids], device=device)
                found = model.generate(
                    input_ids=given,
                    attention_mask=torch.ones_like(given),
                    max_new_tokens=room,
                    do_sample=not greedy,
                    pad_token_id=tokenizer.pad_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                    **drawn,
                )
                texts.append(
                    tokenizer.decode(found[0, len(ids) :], skip_special_tokens=True).strip()
                )
    finally:
        model.train(was_training)
    return texts
