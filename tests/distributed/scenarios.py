"""Models, and one private run of each, that one process and several ranks train alike."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import dptorch
from dptorch.clipping.sums import ClippedSum
from dptorch.noise import GaussianNoise
from dptorch.noise.spans import Columns
from tests.distributed.launched import leave_out_shared_memory
from tests.engine.setup import make_data, make_model
from tests.source import REPOSITORY

__all__ = [
    "MODELS",
    "Trained",
    "close",
    "in_place",
    "initialized",
    "loss_of",
    "programs",
    "same_as_one",
    "settings_of",
    "train",
    "values_of",
]

VOCABULARY = 13
SIZE = 24
EXACT = 1e-6


def conv_net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2), nn.GroupNorm(4, 8), nn.ReLU(),
        nn.Flatten(), nn.LazyLinear(3),
    )  # fmt: skip


def _conv_net() -> nn.Module:
    model = conv_net()
    with torch.no_grad():
        model(torch.zeros(1, 2, 6, 6))
    return model


def images() -> TensorDataset:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(SIZE, 2, 6, 6, generator=generator)
    return TensorDataset(x, torch.randint(0, 3, (SIZE,), generator=generator))


class NextToken(nn.Module):
    """A language model's logits for all tokens but the last, [B, T - 1, V]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens).logits
        return logits[:, :-1]


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(5)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=6, n_embd=8, n_layer=2, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        attn_implementation="eager", bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return NextToken(GPT2LMHeadModel(config))


def checkpointed() -> nn.Module:
    """Each block's activations are computed again in the backward."""
    model: Any = gpt2()
    model.model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()  # type: ignore[no-any-return]


def lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    model: Any = gpt2()
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    model.model = get_peft_model(model.model, config)
    return model  # type: ignore[no-any-return]


def sentences() -> TensorDataset:
    generator = torch.Generator().manual_seed(6)
    tokens = torch.randint(0, VOCABULARY, (SIZE, 6), generator=generator)
    return TensorDataset(tokens, tokens[:, 1:])


#: name -> model, data set.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], TensorDataset]]] = {
    "MLP": (make_model, make_data),
    "convolutions with GroupNorm": (_conv_net, images),
    "tied GPT-2": (gpt2, sentences),
    "LoRA": (lora, sentences),
    "checkpointed GPT-2": (checkpointed, sentences),
}


@dataclass
class Trained:
    """What a run left behind.

    Attributes:
        values: the trainable parameters, flat.
        sums: what noise was added to, of each step, flat.
        noise: the noise itself, of each step, flat.
        epsilon: spent.
        local: how many examples this rank had of each step.
        places: of each step, where in the whole gradient the coordinates of its noise and sums lie.
    """

    values: Tensor
    sums: list[Tensor] = field(default_factory=list)
    noise: list[Tensor] = field(default_factory=list)
    epsilon: float = 0.0
    local: list[int] = field(default_factory=list)
    places: list[Tensor] = field(default_factory=list)


def settings_of(**more: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "sample_rate": 0.3,
        "sample_size": SIZE,
        "steps": 3,
        "noise_multiplier": 1.0,
        "max_grad_norm": 0.2,
        "target_delta": 1e-3,
        "seed": 0,
        "self_check": False,
    }
    return base | more


def loss_of(outputs: Tensor, labels: Tensor) -> Tensor:
    """The mean over examples of each one's own cross entropy."""
    if outputs.dim() == 2:
        return F.cross_entropy(outputs, labels)
    return F.cross_entropy(outputs.transpose(1, 2), labels, reduction="none").mean(1).mean()


def train(
    name: str = "MLP",
    *,
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    wrap_after: Callable[[nn.Module], nn.Module] = lambda model: model,
    zero: dict[str, Any] | None = None,
    limit: int | None = None,
    lr: float = 0.5,
    each_step: Callable[[dptorch.PrivacyEngine], object] = lambda engine: None,
    **settings: Any,
) -> Trained:
    """Train one of `MODELS`, on however many ranks there are; noise and sums are watched.

    Args:
        zero: a configuration of DeepSpeed to train it with.
    """
    make, data = MODELS[name]
    model = wrap(make())
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr)
    if zero is not None:
        model, optimizer = initialized(model, optimizer, zero)
    engine = dptorch.PrivacyEngine(model, **settings_of(**settings))
    model = wrap_after(model)
    found = Trained(torch.empty(0))
    plain = GaussianNoise.privatize

    def privatize(self: GaussianNoise, clipped: ClippedSum, *rest: Any, **more: Any) -> Any:
        found.sums.append(_flat(clipped.values.values()))
        zeros = {n: torch.zeros_like(v) for n, v in clipped.values.items()}
        of_zero = ClippedSum(zeros, clipped.max_norm, clipped.scales)
        found.places.append(_places(clipped, more.get("offsets")))
        found.noise.append(_flat(plain(self, of_zero, *rest, **more).values.values()))
        return plain(self, clipped, *rest, **more)

    GaussianNoise.privatize = privatize  # type: ignore[method-assign]
    try:
        engine.attach(optimizer)
        loader = engine.loader(data(), max_physical_batch_size=limit)
        while not engine.exhausted:
            for x, y in loader:
                assert loader.current is not None
                found.local.append(loader.current.examples)
                loss = loss_of(model(x), y)
                if zero is not None:
                    model.backward(loss)
                    model.step()
                else:
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                each_step(engine)
    finally:
        GaussianNoise.privatize = plain  # type: ignore[method-assign]
    found.values = _flat(values_of(p) for p in trainable)
    found.epsilon = engine.get_privacy_spent().epsilon
    return found


def initialized(model: nn.Module, optimizer: Any, config: dict[str, Any]) -> tuple[Any, Any]:
    """What ``deepspeed.initialize`` returns, on ranks that `on_ranks` started."""
    import deepspeed

    leave_out_shared_memory()
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    found = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return found[0], found[1]


def _places(clipped: ClippedSum, offsets: Any) -> Tensor:
    found, at = [], 0
    for name, value in clipped.values.items():
        place = at if offsets is None else offsets[name]
        if isinstance(place, Columns):
            rows = torch.arange(value.shape[0]) * place.row
            found.append((place.first + rows[:, None] + torch.arange(value.shape[1])).flatten())
        else:
            found.append(torch.arange(place, place + value.numel()))
        at += value.numel()
    return torch.cat(found)


def values_of(p: Any) -> Tensor:
    """The values of a parameter, wherever they are."""
    if hasattr(p, "ds_id"):  # of ZeRO-3
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([p]):
            return p.detach().clone()  # type: ignore[no-any-return]
    values = p.detach()
    return values.full_tensor() if hasattr(values, "full_tensor") else values  # type: ignore[no-any-return]


def _flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether two vectors differ by at most `tolerance` of the length of the second."""
    return bool((a.double() - b.double()).norm() <= tolerance * b.double().norm())


def same_as_one(ranks: list[Trained], alone: Trained) -> None:
    """Assert that the ranks' shards are the parameters, sums and noise of one process."""
    for found in ranks:
        assert not isinstance(found, Exception), found
        assert found.epsilon == alone.epsilon
        assert close(found.values, alone.values, EXACT)
    for step, whole in enumerate(alone.noise):
        assert torch.equal(in_place(ranks, "noise", step), whole)
        assert close(in_place(ranks, "sums", step), alone.sums[step], EXACT)


def in_place(ranks: list[Trained], what: str, step: int) -> Tensor:
    """The slices of all ranks at their places in the whole gradient."""
    places = torch.cat([found.places[step] for found in ranks])
    values = torch.cat([getattr(found, what)[step] for found in ranks])
    whole = torch.full((int(places.max()) + 1,), torch.nan)
    whole[places] = values
    return whole


def programs() -> list[str]:
    """The Python programs of the page; `test_zero` runs the third."""
    page = (REPOSITORY / "docs" / "scale.md").read_text()
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)
