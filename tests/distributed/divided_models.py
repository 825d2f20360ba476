"""Models that `parallelize_module` divides, the ways to divide them, and a run of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint

import dptorch
from dptorch.engine import load_shards, save_shards
from tests.distributed.scenarios import (
    MODELS,
    VOCABULARY,
    loss_of,
    sentences,
    settings_of,
    values_of,
)
from tests.engine.setup import make_data

WIDTH, HEADS = 8, 4


class Block(nn.Module):
    """Attention and an MLP; on a rank of several, some of its heads and some of its hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        q, k, v = (f(h).unflatten(-1, (-1, WIDTH // HEADS)) for f in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in (q, k, v)), is_causal=True
        )
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        return x + self.down(nn.functional.gelu(self.up(self.second(x))))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Logits of the next tokens, [B, T - 1, V]; head and embedding are tied where asked for."""

    def __init__(self, *, tied: bool = False, checkpointed: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH, padding_idx=9)
        self.places = nn.Embedding(6, WIDTH)
        self.block = Block()
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.checkpointed = checkpointed
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        x = checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x)
        return self.head(x)[:, :-1]  # type: ignore[no-any-return]


def _transformer(**how: bool) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(5)
        return Transformer(**how)

    return make


MODELS |= {
    "transformer": (_transformer(), sentences),
    "tied transformer": (_transformer(tied=True), sentences),
    "checkpointed transformer": (_transformer(checkpointed=True), sentences),
}
BLOCK = {
    **dict.fromkeys(("block.q", "block.k", "block.v", "block.up"), ColwiseParallel),
    **dict.fromkeys(("block.out", "block.down"), RowwiseParallel),
}


def by_rows() -> dict[str, Any]:
    """The vocabulary is divided, of the embedding and of the head: 13 tokens, so not evenly."""
    return {name: style() for name, style in BLOCK.items()} | {
        "tokens": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }


def by_columns() -> dict[str, Any]:
    """The features are divided, of the embedding, of the places and of what the head takes."""
    return {
        "tokens": ColwiseParallel(output_layouts=Replicate()),
        "places": ColwiseParallel(output_layouts=Replicate()),
        "head": RowwiseParallel(input_layouts=Replicate()),
    }


def divided(plan: Callable[[], dict[str, Any]]) -> Callable[[nn.Module], nn.Module]:
    def wrap(model: nn.Module) -> nn.Module:
        ranks = torch.distributed.get_world_size()
        parallelize_module(model, init_device_mesh("cpu", (ranks,)), plan())
        if isinstance(model, Transformer) and "tied" in plan.__name__:
            model.head.weight = model.tokens.weight
        return model

    return wrap


def tied() -> dict[str, Any]:
    return by_rows()


def mlp() -> dict[str, Any]:
    return {"0": ColwiseParallel(), "2": RowwiseParallel()}


def gathered() -> dict[str, Any]:
    """All that is between the layers is replicated."""
    return {
        "0": ColwiseParallel(output_layouts=Replicate()),
        "2": RowwiseParallel(input_layouts=Replicate()),
    }


def columns() -> dict[str, Any]:
    """The first keeps its output divided, and the second puts it together."""
    return {
        "0": ColwiseParallel(),
        "2": ColwiseParallel(input_layouts=Shard(-1), output_layouts=Replicate()),
    }


def adam(model: nn.Module, folder: str, load: str | None) -> tuple[Tensor, float]:
    engine = dptorch.PrivacyEngine(model, **settings_of(steps=4))
    optimizer = engine.attach(torch.optim.Adam(model.parameters(), 0.01))
    if load == "file":
        engine.load_checkpoint(f"{folder}/run.pt")
    elif load == "folder":
        load_shards(f"{folder}/run", engine)
    for x, y in engine.loader(make_data()):
        loss_of(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if load is None and engine.steps_done == 2:
            engine.save_checkpoint(f"{folder}/run.pt")
            save_shards(f"{folder}/run", engine)
    values = torch.cat([values_of(p).flatten() for p in model.parameters()])
    return values, engine.get_privacy_spent().epsilon
