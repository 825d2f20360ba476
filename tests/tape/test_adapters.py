"""Adapters of PEFT on a small Llama: each is a loop over examples, or is refused for a reason."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
import transformers
from tests.oracles.loop import norms_of, one_example_loop, relative_error

import dptorch
from dptorch.errors import ExamplesMixError, PrivacyError

pytestmark = pytest.mark.slow

WORDS, WIDTH, B = 30, 8, 4
TWO = ["q_proj", "v_proj"]

#: By name: the class of PEFT, and its settings.
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LoraConfig", {"r": 2, "target_modules": TWO}),
    "LoRA of embeddings": ("LoraConfig", {"r": 2, "target_modules": ["embed_tokens"]}),
    "rsLoRA": ("LoraConfig", {"r": 2, "target_modules": TWO, "use_rslora": True}),
    "DoRA": ("LoraConfig", {"r": 2, "target_modules": TWO, "use_dora": True}),
    "IA3": ("IA3Config", {"target_modules": ["k_proj", "down_proj"],
                          "feedforward_modules": ["down_proj"]}),
    "LoHa": ("LoHaConfig", {"r": 2, "target_modules": TWO}),
    "LoKr": ("LoKrConfig", {"r": 2, "target_modules": TWO}),
    "OFT": ("OFTConfig", {"oft_block_size": 4, "target_modules": TWO}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 4, "target_modules": TWO}),
    "VeRA": ("VeraConfig", {"r": 2, "target_modules": TWO[:1]}),
    "RandLoRA": ("RandLoraConfig", {"r": 2, "target_modules": TWO[:1]}),
    "FourierFT": ("FourierFTConfig", {"n_frequency": 6, "target_modules": TWO}),
    "WaveFT": ("WaveFTConfig", {"n_frequency": 6, "target_modules": TWO}),
    "VB-LoRA": ("VBLoRAConfig", {"r": 2, "num_vectors": 6, "vector_length": 4, "topk": 2,
                                 "target_modules": TWO}),
    "HRA": ("HRAConfig", {"r": 2, "target_modules": TWO}),
    "MiSS": ("MissConfig", {"r": 2, "target_modules": TWO}),
    "C3A": ("C3AConfig", {"block_size": 4, "target_modules": TWO}),
    "SHiRA": ("ShiraConfig", {"r": 2, "target_modules": TWO}),
    "RoAd": ("RoadConfig", {"group_size": 4, "target_modules": TWO}),
    "GraLoRA": ("GraloraConfig", {"r": 2, "gralora_k": 2, "target_modules": TWO}),
    "DeLoRA": ("DeloraConfig", {"r": 2, "target_modules": TWO}),
    "LN tuning": ("LNTuningConfig", {}),
    "trainable tokens": ("TrainableTokensConfig", {"token_indices": [3, 4, 5]}),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 3}),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 3}),
    "p-tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 3, "encoder_hidden_size": 6}),
    "adaption prompt": ("AdaptionPromptConfig", {"adapter_len": 3, "adapter_layers": 1}),
}  # fmt: skip
ADALORA = ("AdaLoraConfig", {"init_r": 3, "target_r": 2, "total_step": 9, "target_modules": TWO})
CPT = ("CPTConfig", {"cpt_token_ids": [3, 4], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]})
#: FourierFT computes in float32, whatever it is given.
LOOSE = {"FourierFT": 1e-5}


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
        pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def adapted(adapter: tuple[str, dict[str, Any]], dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model with an adapter, away from where it begins: half of them begin at zero."""
    torch.manual_seed(0)
    name, settings = adapter
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(peft, name)(task_type="CAUSAL_LM", **settings)
        model: nn.Module = peft.get_peft_model(llama(), config).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


def texts() -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, mask and labels [B, T] of texts of two lengths."""
    ids = torch.randint(3, WORDS, (B, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return ids, mask, ids.masked_fill(mask == 0, -100)


def own_loss(model: nn.Module, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    return loss * len(ids)


def loss_of_logits(model: nn.Module, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=-100) * len(ids)


def errors(model: nn.Module, loss: Callable[..., Tensor]) -> tuple[float, dict[str, Tensor]]:
    """The largest relative error of a norm or gradient, and the gradients of the loop."""
    expected = one_example_loop(model, texts(), loss)
    with dptorch.record(model) as tape:
        value = loss(model, *texts())
    value.backward()
    found = tape.per_example_gradients()
    worst = max(relative_error(found[name], g) for name, g in expected.items())
    return max(worst, relative_error(tape.norms(), norms_of(expected))), expected


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_is_the_loop(name: str) -> None:
    loose = LOOSE.get(name)
    model = adapted(ADAPTERS[name], torch.float64 if loose is None else torch.float32)
    error, expected = errors(model, own_loss)
    assert expected
    assert all(bool((g != 0).any()) for g in expected.values())
    # The model's own loss takes its logits in float32.
    assert error < (loose or 1e-6)


def test_dora_on_transposed_weights_is_the_loop() -> None:
    """PEFT makes a Parameter of the frozen weight's transpose in each forward pass."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_positions=16, n_embd=WIDTH, n_layer=1, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    adapter = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], init_lora_weights=False,
        use_dora=True, fan_in_fan_out=True,
    )  # fmt: skip
    model = peft.get_peft_model(transformers.GPT2LMHeadModel(config), adapter).double()
    error, expected = errors(model, own_loss)
    assert all(bool((g != 0).any()) for g in expected.values())
    assert error < 1e-6


def test_adalora_is_the_loop_without_its_penalty() -> None:
    """Its own loss has a term of the parameters alone, which is no example's and cannot be clipped."""
    model = adapted(ADALORA)
    error, expected = errors(model, loss_of_logits)
    assert error < 1e-9
    assert any("lora_E" in name for name in expected)
    with pytest.raises(PrivacyError, match=r"parameters .* alone joins the loss"):
        errors(model, own_loss)


def test_a_loss_that_is_a_mean_over_all_tokens_of_the_batch_is_refused() -> None:
    """CPT weighs tokens and takes one mean: a long text would rescale all others."""
    with pytest.raises(ExamplesMixError, match="a statistic over the examples"):
        errors(adapted(CPT), own_loss)


def test_a_factor_forgotten_is_caught() -> None:
    """The twin takes the norm of one factor of LoRA."""
    model = adapted(ADAPTERS["LoRA"])
    expected = one_example_loop(model, texts(), own_loss)
    half = {name: g for name, g in expected.items() if "lora_A" in name}
    assert 0 < len(half) < len(expected)
    assert relative_error(norms_of(half), norms_of(expected)) > 1e-3
