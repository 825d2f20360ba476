"""Models as users write and take them: recurrent, packed, convolutional, attending, of libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torch.utils.data import TensorDataset

import dptorch
from tests.engine.legitimate.harness import N, Program, linear
from tests.engine.legitimate.loops import loss_of

__all__ = ["MODELS", "SLOW"]


class Made(nn.Module):
    """A model of named parts and a function of them."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self._forward = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(self, *args, **kwargs)


def of(forward: Callable[..., Any], **parts: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Make a model; its parts are made anew each time."""

    def make() -> nn.Module:
        return Made(forward, **{name: part() for name, part in parts.items()})

    return make


def sequences(width: int = 4, length: int = 6) -> Any:
    """(x [6, 4], class)."""
    return TensorDataset(torch.randn(N, length, width), torch.arange(N) % 3)


def tokens(vocabulary: int = 11, length: int = 6) -> Any:
    """(ids [6], class)."""
    return TensorDataset(torch.randint(1, vocabulary, (N, length)), torch.arange(N) % 3)


def images() -> Any:
    """(x [3, 8, 8], class)."""
    return TensorDataset(torch.randn(N, 3, 8, 8), torch.arange(N) % 3)


def lengths() -> Any:
    """(x [6, 4], its length, class)."""
    return TensorDataset(torch.randn(N, 6, 4), torch.randint(1, 7, (N,)), torch.arange(N) % 3)


def _packed(m: Any, x: Tensor, length: Tensor) -> Tensor:
    packed = pack_padded_sequence(x, length.cpu(), batch_first=True, enforce_sorted=False)
    _, h = m.rnn(packed)
    return m.head(h[0][-1] if isinstance(h, tuple) else h[-1])  # type: ignore[no-any-return]


def _padded_again(m: Any, x: Tensor, length: Tensor) -> Tensor:
    packed = pack_padded_sequence(x, length.cpu(), batch_first=True, enforce_sorted=False)
    out, _ = pad_packed_sequence(m.rnn(packed)[0], batch_first=True, total_length=6)
    return m.head(out.sum(1))  # type: ignore[no-any-return]


def _keeping(m: Any, x: Tensor) -> Tensor:
    """A loss of each example's own is left in an attribute, as layers of experts do."""
    h = torch.tanh(m.body(x))
    m.beside = h.square().mean(1)
    return m.head(h)  # type: ignore[no-any-return]


def _with_what_was_kept(m: Any, b: Any) -> Tensor:
    loss = F.cross_entropy(m(b[0]), b[1])
    return loss + 0.5 * m.beside.mean()  # type: ignore[no-any-return]


def _with_length(m: nn.Module, b: Any) -> Tensor:
    return F.cross_entropy(m(b[0], b[1]), b[2])


def _vae(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mu, logvar = m.encoder(x).chunk(2, dim=-1)
    z = mu + torch.exp(0.5 * logvar) * 0.3
    return m.decoder(z), mu, logvar


def _elbo(m: nn.Module, b: Any) -> Tensor:
    out, mu, logvar = m(b[0])
    kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp(), dim=1)
    return F.mse_loss(out, b[0]) + 0.1 * kl.mean()


def _elbo_summed(m: nn.Module, b: Any) -> Tensor:
    out, mu, logvar = m(b[0])
    kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return F.mse_loss(out, b[0], reduction="sum") + kl


class Policy(nn.Module):
    """A Gaussian policy with a spread of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Linear(5, 3)
        self.log_std = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> torch.distributions.Normal:
        return torch.distributions.Normal(self.mean(x), self.log_std.exp())


def _policy_once(m: nn.Module, b: Any) -> Tensor:
    p = m(b[0])
    return -(p.log_prob(b[0][:, :3]) * b[0][:, 3:4]).sum(1).mean()


def _attention(m: Any, x: Tensor) -> Tensor:
    return m.head(m.attention(x, x, x, need_weights=False)[0].mean(1))  # type: ignore[no-any-return]


def _masked_attention(m: Any, ids: Tensor) -> Tensor:
    h = m.embed(ids)
    out = m.encoder(h, src_key_padding_mask=ids < 4)
    keep = (ids >= 4).unsqueeze(-1)
    return m.head((out * keep).sum(1) / keep.sum(1).clamp(min=1))  # type: ignore[no-any-return]


def _causal(m: Any, ids: Tensor) -> Tensor:
    h = m.embed(ids) + m.places(torch.arange(ids.shape[1]))
    mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
    return m.head(m.encoder(h, mask=mask, is_causal=True))  # type: ignore[no-any-return]


def _next(m: nn.Module, b: Any) -> Tensor:
    scores = m(b[0])
    return F.cross_entropy(scores[:, :-1].reshape(-1, 11), b[0][:, 1:].reshape(-1))


def _encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)


def _encoder() -> nn.Module:
    return nn.TransformerEncoder(_encoder_layer(), 1, enable_nested_tensor=False)


def _conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


def _checkpointed(m: Any, x: Tensor) -> Tensor:
    return m.head(checkpoint(m.body, x, use_reentrant=False))  # type: ignore[no-any-return]


def _checkpointed_in_segments(m: Any, x: Tensor) -> Tensor:
    return m.head(checkpoint_sequential(m.body, 2, x, use_reentrant=False))  # type: ignore[no-any-return]


def _body() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())


def _partly_frozen() -> nn.Module:
    model = linear()
    model[0].requires_grad_(False)  # type: ignore[index]
    return model


def _tied(m: Any, ids: Tensor) -> Tensor:
    return F.linear(m.embed(ids), m.embed.weight)


def _experts(m: Any, x: Tensor) -> Tensor:
    gate = torch.softmax(m.gate(x), -1)
    return gate[:, :1] * m.first(x) + gate[:, 1:] * m.second(x)


def _two_heads(m: Any, x: Tensor) -> dict[str, Tensor]:
    h = torch.tanh(m.body(x))
    return {"class": m.first(h), "value": m.second(h).squeeze(-1)}


def _two_losses(m: nn.Module, b: Any) -> Tensor:
    out = m(b[0])
    return F.cross_entropy(out["class"], b[1]) + 0.3 * F.mse_loss(out["value"], b[0][:, 0])


def _own_loss(m: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    out = m.head(x)
    return F.cross_entropy(out, y), out


def _autocast(m: nn.Module, b: Any) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = m(b[0])
        return F.cross_entropy(out, b[1])


def _autocast_outputs(m: nn.Module, b: Any) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = m(b[0])
    return F.cross_entropy(out.float(), b[1])


MODELS: dict[str, Program] = {
    "RNN": Program(
        loss_of, of(lambda m, x: m.head(m.rnn(x)[0][:, -1]),
            rnn=lambda: nn.RNN(4, 5, batch_first=True), head=lambda: nn.Linear(5, 3)), sequences
    ),
    "GRU, sequence first": Program(
        loss_of, of(lambda m, x: m.head(m.rnn(x.transpose(0, 1))[1][-1]),
            rnn=lambda: nn.GRU(4, 5, 2), head=lambda: nn.Linear(5, 3)), sequences
    ),
    "LSTM, two directions": Program(
        loss_of, of(lambda m, x: m.head(m.rnn(x)[0].mean(1)),
            rnn=lambda: nn.LSTM(4, 5, batch_first=True, bidirectional=True),
            head=lambda: nn.Linear(10, 3)), sequences
    ),
    "overlapping windows": Program(
        loss_of, of(
            lambda m, x: m.head(F.pad(x, (0, 1)).as_strided((len(x), 4, 3), (6, 1, 1)).flatten(1)),
            head=lambda: nn.Linear(12, 3))
    ),
    "a loss in an attribute": Program(
        _with_what_was_kept, of(_keeping, body=lambda: nn.Linear(5, 6), head=lambda: nn.Linear(6, 3))
    ),
    "LSTM, packed": Program(
        _with_length, of(_packed, rnn=lambda: nn.LSTM(4, 5, batch_first=True),
            head=lambda: nn.Linear(5, 3)), lengths
    ),
    "GRU, packed and padded again": Program(
        _with_length, of(_padded_again, rnn=lambda: nn.GRU(4, 5, batch_first=True),
            head=lambda: nn.Linear(5, 3)), lengths
    ),
    "embedding, mean of tokens": Program(
        loss_of, of(lambda m, ids: m.head(m.embed(ids).mean(1)),
            embed=lambda: nn.Embedding(11, 8, padding_idx=0), head=lambda: nn.Linear(8, 3)), tokens
    ),
    "bags of words": Program(
        loss_of, of(lambda m, ids: m.head(m.bag(ids)),
            bag=lambda: nn.EmbeddingBag(11, 8, mode="sum"), head=lambda: nn.Linear(8, 3)), tokens
    ),
    "tied embedding": Program(
        _next, of(_tied, embed=lambda: nn.Embedding(11, 8)), tokens
    ),
    "transformer with a padding mask": Program(
        loss_of, of(_masked_attention, embed=lambda: nn.Embedding(11, 8), encoder=_encoder,
            head=lambda: nn.Linear(8, 3)), tokens
    ),
    "causal transformer": Program(
        _next, of(_causal, embed=lambda: nn.Embedding(11, 8), places=lambda: nn.Embedding(6, 8),
            encoder=_encoder, head=lambda: nn.Linear(8, 11)), tokens
    ),
    "attention": Program(
        loss_of, of(_attention, attention=lambda: nn.MultiheadAttention(4, 2, batch_first=True),
            head=lambda: nn.Linear(4, 3)), sequences
    ),
    "convolutions": Program(loss_of, _conv, images),
    "convolutions over time": Program(
        loss_of, of(lambda m, x: m.head(F.relu(m.conv(x.transpose(1, 2))).amax(2)),
            conv=lambda: nn.Conv1d(4, 5, 3), head=lambda: nn.Linear(5, 3)), sequences
    ),
    "layer norm": Program(
        loss_of, lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3))
    ),
    "dropout": Program(
        loss_of, lambda: nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.Linear(6, 3)),
        tolerance=None,
    ),
    "partly frozen": Program(loss_of, _partly_frozen),
    "residual": Program(
        loss_of, of(lambda m, x: m.head(x + torch.relu(m.body(x))),
            body=lambda: nn.Linear(5, 5), head=lambda: nn.Linear(5, 3))
    ),
    "mixture of experts, soft": Program(
        loss_of, of(_experts, gate=lambda: nn.Linear(5, 2), first=lambda: nn.Linear(5, 3),
            second=lambda: nn.Linear(5, 3))
    ),
    "two heads": Program(
        _two_losses, of(_two_heads, body=lambda: nn.Linear(5, 6), first=lambda: nn.Linear(6, 3),
            second=lambda: nn.Linear(6, 1))
    ),
    "bilinear": Program(
        loss_of, of(lambda m, x: m.layer(x, x.flip(1)), layer=lambda: nn.Bilinear(5, 5, 3))
    ),
    "VAE": Program(
        _elbo, of(_vae, encoder=lambda: nn.Linear(5, 6), decoder=lambda: nn.Linear(3, 5))
    ),
    "VAE, sums": Program(
        _elbo_summed, of(_vae, encoder=lambda: nn.Linear(5, 6), decoder=lambda: nn.Linear(3, 5)),
        reduction="sum",
    ),
    "Gaussian policy": Program(_policy_once, Policy, tolerance=2e-3),
    "loss in the model": Program(
        lambda m, b: m(b[0], b[1])[0], of(_own_loss, head=lambda: nn.Linear(5, 3))
    ),
    "checkpointing": Program(
        loss_of, of(_checkpointed, body=_body, head=lambda: nn.Linear(6, 3))
    ),
    "checkpointing in segments": Program(
        loss_of, of(_checkpointed_in_segments, body=_body, head=lambda: nn.Linear(6, 3))
    ),
    "autocast": Program(_autocast, tolerance=5e-2),
    "autocast, loss in float32": Program(_autocast_outputs, tolerance=5e-2),
    "double precision": Program(
        lambda m, b: loss_of(m, (b[0].double(), b[1])), lambda: linear().double()
    ),
    "weight norm": Program(
        loss_of,
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 6)), nn.Linear(6, 3)),
    ),
    "prelu": Program(loss_of, lambda: nn.Sequential(nn.Linear(5, 6), nn.PReLU(6), nn.Linear(6, 3))),
    "instance scale by hand": Program(
        loss_of, of(lambda m, x: m.head(x / x.norm(dim=1, keepdim=True)),
            head=lambda: nn.Linear(5, 3))
    ),
    "fourier features": Program(
        loss_of, of(lambda m, x: m.head(torch.cat([x.sin(), x.cos()], -1)),
            head=lambda: nn.Linear(10, 3))
    ),
    "batch norm in evaluation": Program(
        loss_of, lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).eval(),
        tolerance=None,
    ),
}  # fmt: skip


def _sentences() -> Any:
    """(ids [6], mask [6], class)."""
    mask = (torch.arange(6) < torch.randint(2, 7, (N, 1))).long()
    return TensorDataset(torch.randint(1, 30, (N, 6)), mask, torch.arange(N) % 3)


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=30,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=3,
        )
    )


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=30,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=3,
            max_position_embeddings=8,
        )
    )
    model.set_experts_implementation("batched_mm")
    found: nn.Module = model
    return found


def _compiled_loss(m: nn.Module, b: Any) -> Tensor:
    """A function of the loop that is compiled with the model inside."""

    @torch.compile(backend="eager")
    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(m(x), y)

    return loss(b[0], b[1])


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=30,
            n_positions=8,
            n_embd=8,
            n_layer=1,
            n_head=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=30,
            d_model=8,
            d_kv=4,
            d_ff=16,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    )


def switch(prepare: bool = True) -> nn.Module:
    """A Switch Transformer; if it is prepared, all of its experts run."""
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    model = SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(
            vocab_size=30,
            d_model=8,
            d_kv=4,
            d_ff=8,
            num_layers=1,
            num_sparse_encoder_layers=1,
            num_decoder_layers=1,
            num_sparse_decoder_layers=1,
            num_heads=2,
            num_experts=3,
            dropout_rate=0.0,
            router_jitter_noise=0.0,
            decoder_start_token_id=0,
            pad_token_id=0,
        )
    )
    return dptorch.prepare(model, report=None) if prepare else model


def longformer() -> nn.Module:
    """A Longformer without global attention under a head of one's own."""
    from transformers import LongformerConfig, LongformerModel

    config = LongformerConfig(
        vocab_size=30,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=16,
        attention_window=[4],
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    body = LongformerModel(config, add_pooling_layer=False)

    def forward(m: Any, ids: Tensor, mask: Tensor) -> Tensor:
        return m.head(m.body(ids, attention_mask=mask).last_hidden_state[:, 0])  # type: ignore[no-any-return]

    return Made(forward, body=body, head=nn.Linear(8, 3))


def timm_model(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        torch.manual_seed(0)
        return timm.create_model(  # type: ignore[no-any-return]
            name, num_classes=3, img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2
        )

    return make


def _labels_of(b: Any) -> Tensor:
    return torch.where(b[1] == 1, b[0], -100)


SLOW: dict[str, Program] = {
    "BERT": Program(
        lambda m, b: m(input_ids=b[0], attention_mask=b[1], labels=b[2]).loss, bert, _sentences
    ),
    "BERT, loss outside": Program(
        lambda m, b: F.cross_entropy(m(b[0], attention_mask=b[1]).logits, b[2]), bert, _sentences
    ),
    "GPT-2": Program(
        lambda m, b: m(input_ids=b[0], attention_mask=b[1], labels=_labels_of(b)).loss,
        gpt2, _sentences,
    ),
    "T5": Program(
        lambda m, b: m(input_ids=b[0], attention_mask=b[1], labels=_labels_of(b)).loss,
        t5, _sentences,
    ),
    "ViT of timm": Program(loss_of, timm_model("vit_tiny_patch16_224"), images),
    "compiled": Program(
        loss_of, lambda: torch.compile(linear(), backend="eager"),  # type: ignore[arg-type,return-value]
    ),
    "compiled with the loss": Program(_compiled_loss),
    "Switch Transformer": Program(
        lambda m, b: m(input_ids=b[0], attention_mask=b[1], labels=_labels_of(b)).loss,
        switch, _sentences,
    ),
    "Longformer": Program(
        lambda m, b: F.cross_entropy(m(b[0], b[1]), b[2]), longformer, _sentences,
    ),
    "Mixtral": Program(
        lambda m, b: m(input_ids=b[0], attention_mask=b[1], labels=_labels_of(b)).loss,
        mixtral, _sentences,
    ),
    "compiled whole": Program(
        loss_of, lambda: torch.compile(linear(), backend="eager", fullgraph=True),  # type: ignore[arg-type,return-value]
    ),
}  # fmt: skip
