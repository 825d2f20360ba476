"""The loss some tokens at a time: exact, and without the logits of all tokens."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2Config, Gemma2ForCausalLM

from dptorch.errors import ConfigurationError
from dptorch.integrations.transformers.chunked_loss import chunked_cross_entropy
from dptorch.tape import trusted_reads
from tests.integrations.transformers import setup
from tests.integrations.transformers.setup import (
    build,
    largest_error,
    loop_over_examples,
    one_step_of_sgd,
    trainer_of,
)

pytestmark = setup.quiet


def adapted(name):
    lora = LoraConfig(r=2, target_modules=setup.TARGETS[name], init_lora_weights=False)
    return get_peft_model(build(name), lora)


@pytest.mark.parametrize("tokens", [1, 3, 100])
def test_the_value_and_the_gradient_are_the_loops(tokens, float64):
    hidden, weight, bias = torch.randn(4, 7, 5), torch.randn(11, 5), torch.randn(11)
    labels = torch.randint(0, 11, (4, 7))
    labels[0, 2:], labels[1, :], labels[3, 0] = -100, -100, -100
    hidden.requires_grad_()
    loss = chunked_cross_entropy(hidden, weight, bias, labels, tokens)
    rows = [
        torch.nn.functional.cross_entropy(h @ weight.T + bias, y, reduction="sum")
        / max(int((y != -100).sum()), 1)
        for h, y in zip(hidden, labels, strict=True)
    ]
    expected = torch.stack(rows).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(value, hidden)[0] for value in (loss, expected))
    )


def exact(m, batch):
    """One example's mean over its tokens; the models' own loss is in float32."""
    logits = m(input_ids=batch["input_ids"]).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, batch["labels"][0, 1:])


@pytest.mark.slow
@pytest.mark.parametrize("make", [adapted, build])
@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "bloom"])
def test_a_step_is_the_clipped_sum(name, make, tmp_path, float64):
    """Of adapters, and of all parameters: GPT-2, OPT and BLOOM tie the head to the embedding, whose
    norm has a cross term."""
    model = make(name)
    expected = loop_over_examples(model, name, loss=exact)
    trainer = trainer_of(
        model, name, tmp_path, given={"loss_chunk": 3}, per_device_train_batch_size=5,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    assert largest_error(one_step_of_sgd(trainer), expected) < 1e-9


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor with the vocabulary as a dimension keeps."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and setup.WORDS in out.shape:
            self.size = max(self.size, out.untyped_storage().nbytes() // out.element_size())
        return out


@pytest.mark.slow
@pytest.mark.parametrize("make", [adapted, build])
def test_the_logits_of_all_tokens_are_never_there(make, tmp_path):
    sizes = []
    for given in ({}, {"loss_chunk": 2}):
        trainer = trainer_of(make("gpt2"), "gpt2", tmp_path, given=given)
        with trusted_reads(), Largest() as largest:  # it looks on, and changes nothing
            trainer.train()
        sizes.append(largest.size)
    assert sizes[0] >= setup.ROWS * (max(setup.RAGGED) - 1) * setup.WORDS
    assert sizes[1] < sizes[0] / 3


def test_a_model_that_caps_its_logits_is_refused(tmp_path):
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=setup.WORDS, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=4, max_position_embeddings=16,
        pad_token_id=0, bos_token_id=1, eos_token_id=1, final_logit_softcapping=0.5,
    )  # fmt: skip
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(Gemma2ForCausalLM(config), lora)
    with pytest.raises(ConfigurationError, match="does more with its logits"):
        trainer_of(model, "llama", tmp_path, given={"loss_chunk": 2})


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("bert", {"loss_chunk": 2}, "no causal language model"),
        ("gpt2", {"loss_chunk": 0}, "a number of tokens"),
    ],
)
def test_what_it_does_not_serve_is_refused(name, given, message, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        trainer_of(build(name), name, tmp_path, given=given)
