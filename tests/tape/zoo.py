"""Models of every kind that the tape must be exact on, small, in float64."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tests.oracles.torchvision_on_cpu  # noqa: F401  (transformers imports torchvision if present)
from tests.oracles.loop import Loss

B = 4


@dataclass(frozen=True)
class Case:
    """A model, a batch, and a loss with one value for each example."""

    model: nn.Module
    batch: tuple[Tensor, ...]
    loss: Loss


def squares(model: nn.Module, *batch: Tensor) -> Tensor:
    return model(*batch).square().flatten(1).sum(1)


def classes(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


ZOO: dict[str, Callable[[], Case]] = {}


def case(build: Callable[[], Case]) -> Callable[[], Case]:
    ZOO[build.__name__] = build
    return build


def labels(n: int = 3) -> Tensor:
    return torch.randint(0, n, (B,))


class Lambda(nn.Module):
    """A module from parameters and a function of (module, inputs)."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                setattr(self, name, part)
            else:
                setattr(self, name, nn.Parameter(part))
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


# -- the issue's own list --------------------------------------------------------------------------


@case
def mlp() -> Case:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))
    return Case(model, (torch.randn(B, 6), labels()), classes)


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.GroupNorm(2, outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.GroupNorm(2, outputs),
        )
        same = inputs == outputs and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        out += self.skip(x)
        return F.relu(out, inplace=True)


@case
def resnet_groupnorm() -> Case:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, 1, 1),
        Block(4, 4, 1),
        Block(4, 8, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    return Case(model, (torch.randn(B, 3, 8, 8), labels()), classes)


@case
def gpt2_tied() -> Case:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=40, n_positions=16, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return Case(GPT2LMHeadModel(config), (torch.randint(0, 40, (B, 7)),), causal_lm)


def causal_lm(model: nn.Module, ids: Tensor) -> Tensor:
    """One loss for each example from the model's own scalar mean loss."""
    return model(ids, labels=ids).loss * ids.shape[0]


@case
def vit() -> Case:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20,
        image_size=16, patch_size=4, num_labels=3, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    return Case(model, (torch.randn(B, 3, 16, 16), labels()), logits_classes)


def logits_classes(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).logits, y, reduction="none")


@case
def layer_used_twice() -> Case:
    model = Lambda(
        lambda m, x: m.b(torch.tanh(m.a(torch.tanh(m.a(x))))),
        a=nn.Linear(6, 6),
        b=nn.Linear(6, 3),
    )
    return Case(model, (torch.randn(B, 6), labels()), classes)


@case
def functional_tied_head() -> Case:
    model = Lambda(
        lambda m, i: F.linear(torch.tanh(m.l(m.e(i))), m.e.weight),
        e=nn.Embedding(11, 6),
        l=nn.Linear(6, 6),
    )

    def loss(m: nn.Module, ids: Tensor) -> Tensor:
        return F.cross_entropy(m(ids).transpose(1, 2), ids, reduction="none").sum(1)

    return Case(model, (torch.randint(0, 11, (B, 5)),), loss)


# -- linear in every spelling ----------------------------------------------------------------------


@case
def raw_matmuls() -> Case:
    model = Lambda(
        lambda m, x: torch.tanh(m.u @ torch.tanh(x @ m.w)) @ m.v.T + m.c,
        w=torch.randn(6, 5), u=torch.randn(4, 7), v=torch.randn(3, 5), c=torch.randn(3),
    )  # fmt: skip
    return Case(model, (torch.randn(B, 7, 6),), squares)


@case
def matrix_vector() -> Case:
    model = Lambda(lambda m, x: torch.tanh(x @ m.w) @ m.v, w=torch.randn(6, 5), v=torch.randn(5))
    return Case(model, (torch.randn(B, 3, 6),), squares)


@case
def einsum_heads() -> Case:
    model = Lambda(
        lambda m, x: torch.einsum("bthe,hed->btd", torch.einsum("btd,dhe->bthe", x, m.w), m.o),
        w=torch.randn(6, 2, 3), o=torch.randn(2, 3, 6),
    )  # fmt: skip
    return Case(model, (torch.randn(B, 5, 6),), squares)


@case
def einsum_experts() -> Case:
    model = Lambda(
        lambda m, x: torch.einsum("bed,efd->bef", x, m.w).tanh(), w=torch.randn(3, 4, 6)
    )
    return Case(model, (torch.randn(B, 3, 6),), squares)


@case
def token_mixing() -> Case:
    model = Lambda(
        lambda m, x: m.t(x.transpose(1, 2)).transpose(1, 2) + m.c(x),
        t=nn.Linear(5, 5), c=nn.Linear(6, 6),
    )  # fmt: skip
    return Case(model, (torch.randn(B, 5, 6),), squares)


@case
def five_dimensional_linear() -> Case:
    return Case(nn.Linear(4, 3), (torch.randn(B, 2, 3, 2, 4),), squares)


@case
def one_feature_vector() -> Case:
    model = Lambda(lambda m, x: m.a(x[:, None] * m.s), a=nn.Linear(1, 3), s=torch.randn(1))
    return Case(model, (torch.randn(B),), squares)


@case
def bilinear() -> Case:
    model = Lambda(lambda m, x, y: m.b(x, y), b=nn.Bilinear(4, 5, 3))
    return Case(model, (torch.randn(B, 4), torch.randn(B, 5)), squares)


# -- parameters that broadcast ---------------------------------------------------------------------


@case
def class_token_and_positions() -> Case:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        x = torch.cat([m.cls.expand(x.shape[0], -1, -1), x], 1) + m.pos
        x = x + m.gamma * m.l(m.n(x))
        x += m.gamma
        return x * m.scalar

    model = Lambda(
        run, cls=torch.randn(1, 1, 6), pos=torch.randn(1, 6, 6), gamma=torch.randn(6),
        scalar=torch.randn(()), l=nn.Linear(6, 6), n=nn.LayerNorm(6),
    )  # fmt: skip
    return Case(model, (torch.randn(B, 5, 6),), squares)


@case
def position_table() -> Case:
    model = Lambda(
        lambda m, i: torch.tanh(m.e(i) + m.p(torch.arange(i.shape[1]))) * m.p.weight[0],
        e=nn.Embedding(11, 6, padding_idx=0), p=nn.Embedding(9, 6),
    )  # fmt: skip
    return Case(model, (torch.randint(0, 11, (B, 5)),), squares)


@case
def ids_without_positions() -> Case:
    model = nn.Sequential(nn.Embedding(7, 5), nn.Tanh(), nn.Linear(5, 3))
    return Case(model, (torch.randint(0, 7, (B,)), labels()), classes)


@case
def assigned_and_masked() -> Case:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        x = x.clone()
        x[:, 0] = m.first
        return torch.where(x > 0, x, m.low) @ m.w

    model = Lambda(run, first=torch.randn(6), low=torch.randn(6), w=torch.randn(6, 2))
    return Case(model, (torch.randn(B, 5, 6),), squares)


# -- convolutions and normalisation ----------------------------------------------------------------


@case
def convolutions_2d() -> Case:
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding="same", groups=2),
        nn.GroupNorm(2, 8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, dilation=2, padding_mode="circular"),
        nn.ConvTranspose2d(8, 6, 3, stride=2, output_padding=1, groups=2),
        nn.InstanceNorm2d(6, affine=True),
        nn.Conv2d(6, 6, (2, 3), padding="same", groups=6),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 3),
    )
    return Case(model, (torch.randn(B, 4, 8, 8), labels()), classes)


@case
def convolutions_1d_3d() -> Case:
    model = Lambda(
        lambda m, x: m.c(m.b(m.a(x)).unflatten(2, (2, 2, -1))),
        a=nn.Conv1d(3, 4, 3, padding=2, dilation=2),
        b=nn.ConvTranspose1d(4, 2, 2, stride=1),
        c=nn.Conv3d(2, 3, (1, 2, 2), groups=1),
    )
    return Case(model, (torch.randn(B, 3, 11),), squares)


@case
def frames_folded_into_the_batch() -> Case:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        b, t = x.shape[:2]
        return m.h(m.n(m.c(x.flatten(0, 1))).mean((2, 3)).view(b, t, -1))

    model = Lambda(run, c=nn.Conv2d(3, 4, 3), n=nn.GroupNorm(2, 4), h=nn.Linear(4, 2))
    return Case(model, (torch.randn(B, 3, 3, 6, 6),), squares)


@case
def norms_of_all_kinds() -> Case:
    frozen = nn.BatchNorm2d(4).eval()
    frozen.running_mean.normal_()
    model = Lambda(
        lambda m, x: m.r(m.l(m.f(x))),
        f=frozen, l=nn.LayerNorm([4, 5, 6], bias=False), r=nn.RMSNorm(6),
    )  # fmt: skip
    return Case(model, (torch.randn(B, 4, 5, 6),), squares)


@case
def channels_last() -> Case:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(96, 3))
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(B, 4, 6, 6).to(memory_format=torch.channels_last)
    return Case(model, (x, labels()), classes)


@case
def prelu_and_weight_norm() -> Case:
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)),
        nn.PReLU(5),
        nn.Linear(5, 3),
    )
    return Case(model, (torch.randn(B, 6), labels()), classes)


# -- attention and recurrence ----------------------------------------------------------------------


@case
def attention_batch_first() -> Case:
    model = Lambda(lambda m, x: m.a(x, x, x)[0], a=nn.MultiheadAttention(8, 2, batch_first=True))
    return Case(model, (torch.randn(B, 5, 8),), squares)


@case
def attention_sequence_first() -> Case:
    model = Lambda(
        lambda m, x: m.a(*[x.transpose(0, 1)] * 3, need_weights=False)[0].transpose(0, 1),
        a=nn.MultiheadAttention(8, 2, bias=True, add_bias_kv=True),
    )
    return Case(model, (torch.randn(B, 5, 8),), squares)


@case
def transformer_encoder_masked() -> Case:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    model = Lambda(
        lambda m, x, keep: m.e(x, src_key_padding_mask=keep), e=nn.TransformerEncoder(layer, 2)
    )
    keep = torch.zeros(B, 5, dtype=torch.bool)
    keep[:, 3:] = True
    return Case(model, (torch.randn(B, 5, 8), keep), squares)


@case
def lstm_and_gru() -> Case:
    model = Lambda(
        lambda m, x: m.g(m.l(x)[0].transpose(0, 1))[0].transpose(0, 1),
        l=nn.LSTM(6, 4, 2, batch_first=True, bidirectional=True),
        g=nn.GRU(8, 3),
    )
    return Case(model, (torch.randn(B, 5, 6),), squares)


@case
def swin_windows() -> Case:
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4,
        num_labels=3, hidden_dropout_prob=0.0, drop_path_rate=0.0,
    )  # fmt: skip
    model = SwinForImageClassification(config)
    return Case(model, (torch.randn(B, 3, 16, 16), labels()), logits_classes)


def _tiny(kind: str, **extra: object) -> nn.Module:
    import transformers

    config_class, model_class = {
        "bert": ("BertConfig", "BertForSequenceClassification"),
        "roberta": ("RobertaConfig", "RobertaForSequenceClassification"),
        "distilbert": ("DistilBertConfig", "DistilBertForSequenceClassification"),
        "llama": ("LlamaConfig", "LlamaForCausalLM"),
        "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
        "opt": ("OPTConfig", "OPTForCausalLM"),
        "t5": ("T5Config", "T5ForConditionalGeneration"),
        "bart": ("BartConfig", "BartForConditionalGeneration"),
    }[kind]
    config = getattr(transformers, config_class)(**extra)
    return getattr(transformers, model_class)(config)


_ENCODER = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 20, "max_position_embeddings": 24, "num_labels": 3,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
_DECODER = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 20, "max_position_embeddings": 24,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip


def _sequence_case(model: nn.Module) -> Case:
    mask = torch.ones(B, 7, dtype=torch.long)
    mask[1, 4:] = 0

    def loss(m: nn.Module, ids: Tensor, mask: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(m(ids, attention_mask=mask).logits, y, reduction="none")

    return Case(model, (torch.randint(3, 40, (B, 7)), mask, labels()), loss)


@case
def bert() -> Case:
    return _sequence_case(_tiny("bert", **_ENCODER))


@case
def roberta() -> Case:
    return _sequence_case(_tiny("roberta", **_ENCODER | {"pad_token_id": 1}))


@case
def distilbert() -> Case:
    model = _tiny(
        "distilbert", vocab_size=40, dim=16, n_layers=2, n_heads=2, hidden_dim=20, num_labels=3,
        max_position_embeddings=24, dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0,
    )  # fmt: skip
    return _sequence_case(model)


@case
def llama() -> Case:
    return Case(_tiny("llama", **_DECODER), (torch.randint(3, 40, (B, 7)),), causal_lm)


@case
def qwen2_tied() -> Case:
    model = _tiny("qwen2", **_DECODER, tie_word_embeddings=True)
    return Case(model, (torch.randint(3, 40, (B, 7)),), causal_lm)


@case
def opt() -> Case:
    model = _tiny(
        "opt", vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        ffn_dim=20, max_position_embeddings=24, word_embed_proj_dim=16, dropout=0.0,
        attention_dropout=0.0, activation_dropout=0.0, pad_token_id=1, bos_token_id=0,
        eos_token_id=2,
    )  # fmt: skip
    return Case(model, (torch.randint(3, 40, (B, 7)),), causal_lm)


@case
def t5_relative_bias() -> Case:
    model = _tiny(
        "t5", vocab_size=40, d_model=16, d_kv=8, d_ff=20, num_layers=2, num_heads=2,
        dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return Case(model, (torch.randint(3, 40, (B, 7)), torch.randint(3, 40, (B, 5))), seq2seq)


@case
def bart() -> Case:
    model = _tiny(
        "bart", vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=20,
        decoder_ffn_dim=20, max_position_embeddings=24, dropout=0.0, pad_token_id=1,
        bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
    )  # fmt: skip
    return Case(model, (torch.randint(3, 40, (B, 7)), torch.randint(3, 40, (B, 5))), seq2seq)


def seq2seq(model: nn.Module, ids: Tensor, target: Tensor) -> Tensor:
    return model(input_ids=ids, labels=target).loss * ids.shape[0]


@case
def lora_on_gpt2() -> Case:
    from peft import LoraConfig, get_peft_model

    base = gpt2_tied()
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    model = get_peft_model(base.model, config).to(torch.float64)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)  # zero at first, which would hide errors in lora_A
    return Case(model, base.batch, base.loss)


@case
def frozen_but_biases() -> Case:
    base = mlp()
    for name, p in base.model.named_parameters():
        p.requires_grad_(name.endswith("bias"))
    return base
