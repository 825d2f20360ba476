"""What a private step on several ranks needs: bytes on each rank, and bytes that it sends.

Sizes alone decide it, so that a model may be on the meta device, where it takes no memory. What is left
out is what ordinary training has as well: activations, and buffers of the communication library. See
docs/scale.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor, nn

from dptorch.distributed.sharded import BUCKET
from dptorch.errors import one_of

__all__ = ["OPTIMIZERS", "STRATEGIES", "Cost", "Sizes", "cost", "sizes_of"]

STRATEGIES: Final = ("ddp", "zero1", "zero2", "zero3", "fsdp2", "tensor")
#: Numbers that an optimizer keeps for each parameter.
OPTIMIZERS: Final = {"sgd": 0, "momentum": 1, "adam": 2}
_FLOAT: Final = 4  # bytes: sums, noise and states are float32


@dataclass(frozen=True)
class Sizes:
    """What of a model decides the cost; all but the last in numbers of values.

    Attributes:
        trainable: parameters that are trained.
        frozen: those that are not.
        largest: of them, the largest trainable parameter.
        block: parameters of the largest block: what FSDP2 and ZeRO-3 gather at once.
        factors: of one example, inputs and output gradients of the layers that are trained; None if
            that is not known.
        widest: the same of the one layer that has the most.
    """

    trainable: int
    frozen: int
    largest: int
    block: int
    factors: int | None = None
    widest: int | None = None


@dataclass(frozen=True)
class Cost:
    """Bytes of one rank, as if there were no activations.

    Attributes:
        parameters: in memory between steps.
        gathered: parameters of other ranks, while a block runs.
        optimizer: its state, and ZeRO's float32 copies.
        factors: of a physical batch, kept until its gradients are clipped.
        sums: what is formed and sent, or this rank's part of clipped sum and noise; the larger of both.
        sent: in a step, over the network, by an algorithm that sends no more than a ring.
    """

    parameters: int
    gathered: int
    optimizer: int
    factors: int
    sums: int
    sent: int

    @property
    def total(self) -> int:
        """Most memory at any time of a step: in the backward, or once the factors make sums."""
        step = max(self.gathered + self.factors, self.sums)
        return self.parameters + self.optimizer + step


def sizes_of(model: nn.Module, run: Callable[[nn.Module], object] | None = None) -> Sizes:
    """Return the sizes of a model, which may be on the meta device.

    Args:
        model: the whole of it, before `fully_shard`.
        run: makes a forward pass of one example, for the factors; its parameters stay as they are.

    Example:
        >>> import torch
        >>> with torch.device("meta"):
        ...     model = nn.Sequential(nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 10))
        ...     sizes = sizes_of(model, lambda m: m(torch.empty(1, 1000)))
        >>> sizes.trainable, sizes.block, sizes.factors
        (1011010, 1001000, 3010)
    """
    trainable = [p.numel() for p in model.parameters() if p.requires_grad]
    every = sum(p.numel() for p in model.parameters())
    blocks = [sum(p.numel() for p in block.parameters()) for block in _blocks(model)]
    found: dict[nn.Module, int] = {}
    if run is not None:
        handles = [
            m.register_forward_hook(lambda m, x, y: found.__setitem__(m, _numel(x) + _numel(y)))
            for m in model.modules()
            if any(p.requires_grad for p in m.parameters(recurse=False))
        ]
        try:
            run(model)
        finally:
            for handle in handles:
                handle.remove()
    return Sizes(
        sum(trainable),
        every - sum(trainable),
        max(trainable, default=0),
        max([every - sum(blocks), *blocks]),
        None if run is None else sum(found.values()),
        None if run is None else max(found.values(), default=0),
    )


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The entries of the outermost lists of modules, in which models keep what they repeat."""
    if isinstance(model, nn.ModuleList | nn.Sequential):
        yield from model
    else:
        for child in model.children():
            yield from _blocks(child)


def cost(
    sizes: Sizes,
    strategy: str,
    ranks: int,
    *,
    physical_batch_size: int = 1,
    physical_batches: int = 1,
    optimizer: str = "adam",
    parameter_bytes: int = 4,
    layer_wise: bool = False,
    reshard_after_forward: bool = True,
) -> Cost:
    """Return what a step costs a rank.

    Args:
        sizes: from `sizes_of`.
        strategy: one of `STRATEGIES`. "tensor" is tensor parallelism whose layers are all divided, by
            turns by columns and by rows: half of their inputs and outputs are divided, and the other
            half, or its gradients, is added up over the ranks.
        ranks: how many there are.
        physical_batch_size: examples that go through the model of a rank at once.
        physical_batches: how many of these a rank has in a logical batch: under "tensor" all of them.
        optimizer: one of `OPTIMIZERS`.
        parameter_bytes: 4 in float32, 2 in bfloat16, of which ZeRO keeps float32 copies too. FSDP2
            keeps float32, and gathers in this type.
        layer_wise: layers are clipped one by one, in the backward.
        reshard_after_forward: as `fully_shard` is told.

    Raises:
        ConfigurationError: `strategy` or `optimizer` is not known.

    Example:
        >>> ten_billion = Sizes(10**10, 0, 10**9, 10**9)
        >>> found = cost(ten_billion, "fsdp2", 64, parameter_bytes=2)
        >>> found.parameters // 10**6, found.optimizer // 10**6
        (625, 1250)
    """
    one_of("strategy", strategy, STRATEGIES)
    kept = OPTIMIZERS[one_of("optimizer", optimizer, OPTIMIZERS)]
    p, every, f = sizes.trainable, sizes.trainable + sizes.frozen, _FLOAT
    b = parameter_bytes
    away = (ranks - 1) / ranks  # of a vector, what a rank sends of it around a ring
    part = -(-p // ranks)
    formed = sizes.largest if layer_wise else min(p, max(BUCKET, sizes.largest))
    factors = (sizes.widest if layer_wise else sizes.factors) or 0
    # Sums are formed, copied into one message, and come back as a part.
    parameters, gathered, states, sums = b * every, 0, kept * part, max(2 * formed, part) + part
    if strategy == "ddp":  # all-reduced in its place; the noisy sum is a vector of its own
        states, sums = kept * p, 2 * p
        sent = 2 * f * p * away
    elif strategy == "tensor":
        parameters, sums = b * -(-every // ranks), 2 * part
        factors = round(factors * (1 + 1 / ranks) / 2)
        sent = b * (sizes.factors or 0) * physical_batch_size * physical_batches * away
    elif strategy in ("fsdp2", "zero3"):
        kept_in = f if strategy == "fsdp2" else b
        states += part if kept_in < f else 0  # float32 copies
        # The block that runs, and the one that is gathered for later.
        parameters, gathered = kept_in * -(-every // ranks), 2 * b * sizes.block
        passes = 2 if reshard_after_forward else 1
        sent = physical_batches * (passes * b * every + f * p) * away
    else:
        states += part if b < f else 0  # float32 copies
        sent = (physical_batches * f * p + b * p) * away
    held = b * factors * physical_batch_size
    return Cost(parameters, gathered, f * states, held, f * sums, round(sent))


def _numel(value: Any) -> int:
    """Values in the tensors of some arguments or outputs."""
    if isinstance(value, Tensor):
        return value.numel()
    if isinstance(value, dict):
        return sum(map(_numel, value.values()))
    return sum(map(_numel, value)) if isinstance(value, list | tuple) else 0
