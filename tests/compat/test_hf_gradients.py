"""private-transformers' gradient tests, through its adapter: four micro-batches of four examples (three
virtual steps and a step) against a loop that clips one example after the other, in float64.

The models are those that private-transformers supports, small and with random weights. It refuses tied
weights under ghost clipping, and freezes a vision model's tokens and position embeddings; here all
parameters are trained, tied or not, in every mode.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dptorch.compat.private_transformers import PrivacyEngine

MICRO, PARTS = 4, 4
BOUND = 1.0
Batch = dict[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]
pytestmark = pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")

ENCODER = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 20, "max_position_embeddings": 24, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "classifier_dropout_prob": 0.0,
}  # fmt: skip
GPT = {
    "vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "resid_pdrop": 0.0,
    "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
OPT = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "ffn_dim": 20, "max_position_embeddings": 24, "word_embed_proj_dim": 16, "dropout": 0.0,
    "attention_dropout": 0.0, "activation_dropout": 0.0, "layerdrop": 0.0,
}  # fmt: skip
BART = {
    "vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 20, "max_position_embeddings": 24, "dropout": 0.0, "attention_dropout": 0.0,
    "activation_dropout": 0.0,
}  # fmt: skip
T5 = {
    "vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 20, "num_layers": 2, "num_heads": 2,
    "dropout_rate": 0.0, "decoder_start_token_id": 0,
}  # fmt: skip
IMAGE = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20,
    "image_size": 16, "patch_size": 4, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "num_labels": 10,
}  # fmt: skip
BEIT = {
    "use_relative_position_bias": True, "use_absolute_position_embeddings": True,
    "layer_scale_init_value": 0.5, "drop_path_rate": 0.0,
}  # fmt: skip


def tokens(length: int = 8) -> Tensor:
    return torch.randint(3, 40, (MICRO * PARTS, length))


def classification() -> Batch:
    return {"input_ids": tokens(), "labels": torch.randint(0, 2, (MICRO * PARTS,))}


def generation() -> Batch:
    return {"input_ids": tokens()}


def translation() -> Batch:
    return {"input_ids": tokens(), "decoder_input_ids": tokens(6)}


def pictures() -> Batch:
    return {
        "pixel_values": torch.randn(MICRO * PARTS, 3, 16, 16, dtype=torch.float64),
        "labels": torch.randint(0, 10, (MICRO * PARTS,)),
    }


def of_class(model: nn.Module, batch: Batch) -> Tensor:
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    return F.cross_entropy(model(**inputs).logits, batch["labels"], reduction="none")


def of_next_token(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(**batch).logits[..., :-1, :].permute(0, 2, 1)
    words = batch.get("decoder_input_ids", batch["input_ids"])
    return F.cross_entropy(logits, words[..., 1:], reduction="none").mean(dim=1)


CLASSIFIERS = {
    "bert": ("BertForSequenceClassification", ENCODER),
    "roberta": ("RobertaForSequenceClassification", ENCODER),
    "albert": ("AlbertForSequenceClassification", ENCODER | {"embedding_size": 8}),
}
GENERATORS = {
    "gpt": ("OpenAIGPTLMHeadModel", GPT),
    "gpt2": ("GPT2LMHeadModel", GPT),
    "opt": ("OPTForCausalLM", OPT),
    "opt, projected": (
        "OPTForCausalLM",
        OPT | {"word_embed_proj_dim": 12, "do_layer_norm_before": False},
    ),
}
TRANSLATORS = {
    "bart": ("BartForConditionalGeneration", BART),
    "t5": ("T5ForConditionalGeneration", T5),
}
IMAGES = {
    "vit": ("ViTForImageClassification", IMAGE),
    "deit": ("DeiTForImageClassification", IMAGE),
    "beit": ("BeitForImageClassification", IMAGE | BEIT),
}


def build(kind: str, settings: dict[str, Any]) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    model_class = getattr(transformers, kind)
    model: nn.Module = model_class(model_class.config_class(**settings)).double()
    if settings.get("tie_word_embeddings") is False:
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone())  # T5 is tied whatever it is told
    with torch.no_grad():
        for p in model.parameters():  # some begin at zero, where errors would not show
            p.add_(0.1 * torch.randn_like(p))
    return model.train()


def through_engine(model: nn.Module, batch: Batch, loss: Loss, mode: str) -> dict[str, Tensor]:
    model = copy.deepcopy(model)
    optimizer = torch.optim.Adam(params=model.parameters(), lr=1e-4)
    engine = PrivacyEngine(
        module=model,
        batch_size=MICRO * PARTS,
        max_grad_norm=BOUND,
        noise_multiplier=0.0,
        sample_size=1000,
        epochs=1,
        numerical_stability_constant=0.0,
        clipping_mode=mode,
    )
    engine.attach(optimizer=optimizer)
    optimizer.zero_grad()
    parts = [
        {k: v[i : i + MICRO] for k, v in batch.items()} for i in range(0, MICRO * PARTS, MICRO)
    ]
    for i, part in enumerate(parts, 1):
        if i == len(parts):
            optimizer.step(loss=loss(model, part))
        else:
            optimizer.virtual_step(loss=loss(model, part))
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    engine.detach()
    return found


def one_by_one(
    model: nn.Module, batch: Batch, loss: Loss, bound: float, mode: str = "default"
) -> dict[str, Tensor]:
    """The oracle: clip each example's gradient, whole or layer by layer."""
    parameters = dict(model.named_parameters())
    groups: dict[str, list[str]] = {}
    for n in parameters:
        groups.setdefault(n.rpartition(".")[0] if mode == "per_layer" else "", []).append(n)
    total = {n: torch.zeros_like(p) for n, p in parameters.items()}
    for i in range(MICRO * PARTS):
        model.zero_grad()
        loss(model, {k: v[i : i + 1] for k, v in batch.items()}).sum().backward()
        gradients = {n: p.grad for n, p in parameters.items() if p.grad is not None}
        for group in groups.values():
            inside = [n for n in group if n in gradients]
            norm = math.sqrt(sum(float(gradients[n].square().sum()) for n in inside))
            share = bound / math.sqrt(len(groups))
            for n in inside:
                total[n] += min(1.0, share / norm if norm else 1.0) * gradients[n]
    return {n: t / (MICRO * PARTS) for n, t in total.items()}


def compare(kind: str, settings: dict[str, Any], data: Batch, loss: Loss, mode: str) -> nn.Module:
    model = build(kind, settings)
    found = through_engine(model, data, loss, mode)
    expected = one_by_one(model, data, loss, BOUND, mode)
    assert found.keys() == expected.keys()
    for name, g in expected.items():
        off = float((found[name] - g).abs().max())
        assert off < 1e-9, f"{name} is off by {off}"
    return model


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ghost", "default"])
@pytest.mark.parametrize("model", CLASSIFIERS)
def test_classification(model: str, mode: str) -> None:
    torch.manual_seed(1)
    compare(*CLASSIFIERS[model], classification(), of_class, mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ghost", "default"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("model", GENERATORS)
def test_generation(model: str, tied: bool, mode: str) -> None:
    torch.manual_seed(1)
    kind, settings = GENERATORS[model]
    built = compare(
        kind, settings | {"tie_word_embeddings": tied}, generation(), of_next_token, mode
    )
    assert (built.get_input_embeddings().weight is built.get_output_embeddings().weight) == tied


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ghost", "default"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("model", TRANSLATORS)
def test_conditional_generation(model: str, tied: bool, mode: str) -> None:
    torch.manual_seed(1)
    kind, settings = TRANSLATORS[model]
    built = compare(
        kind, settings | {"tie_word_embeddings": tied}, translation(), of_next_token, mode
    )
    assert (built.get_input_embeddings().weight is built.get_output_embeddings().weight) == tied


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ghost", "default"])
@pytest.mark.parametrize("model", IMAGES)
def test_image_classification(model: str, mode: str) -> None:
    torch.manual_seed(1)
    compare(*IMAGES[model], pictures(), of_class, mode)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gpt2", "opt"])
def test_per_layer_is_per_layer(model: str) -> None:
    torch.manual_seed(1)
    kind, settings = GENERATORS[model]
    data = generation()
    built = compare(kind, settings, data, of_next_token, "per_layer")
    flat = one_by_one(built, data, of_next_token, BOUND)
    found = through_engine(built, data, of_next_token, "per_layer")
    assert max(float((found[n] - g).abs().max()) for n, g in flat.items()) > 1e-3


@pytest.mark.slow
def test_the_comparison_sees_what_it_should() -> None:
    """A bound that is off by a millionth, or no clipping at all, is found out."""
    torch.manual_seed(1)
    data = generation()
    model = build(*GENERATORS["gpt2"])
    found = through_engine(model, data, of_next_token, "default")
    for bound in (BOUND * (1 + 1e-6), 1e9):
        other = one_by_one(model, data, of_next_token, bound)
        assert max(float((found[n] - g).abs().max()) for n, g in other.items()) > 1e-8
