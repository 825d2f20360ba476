"""States of models and optimizers that are spread over ranks, as the whole tensors of one process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten, tree_unflatten

from dptorch.distributed.sharded import is_sharded

__all__ = ["gathered", "is_spread", "shards_of_model", "shards_of_optimizer"]


def is_spread(model: nn.Module) -> bool:
    """Whether this rank has less than the whole of some parameter."""
    return any(is_sharded(p) for p in model.parameters())


def gathered(state: Any) -> Any:
    """Return a state with whole tensors in place of shards; on the CPU. All ranks call it."""
    leaves, spec = tree_flatten(state)
    if not any(isinstance(leaf, Tensor) and is_sharded(leaf) for leaf in leaves):
        return state  # the object itself, with whatever else it carries
    return tree_unflatten([_whole(leaf) for leaf in leaves], spec)


def _whole(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor) or not is_sharded(leaf):
        return leaf
    spread: Any = leaf.detach()
    return spread.full_tensor().cpu()


def shards_of_model(model: nn.Module, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what `gathered` returned of ``model.state_dict()``, as this rank holds it."""
    if not is_spread(model):
        return state
    mine = model.state_dict()
    return {name: _shard(value, mine.get(name)) for name, value in state.items()}


def shards_of_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return what `gathered` returned of ``optimizer.state_dict()``, as this rank holds it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not any(map(is_sharded, parameters)):
        return state
    places = [i for group in state["param_groups"] for i in group["params"]]
    by_place = dict(zip(places, parameters, strict=True))
    return {
        **state,
        "state": {
            i: {name: _shard(value, by_place.get(i)) for name, value in each.items()}
            for i, each in state["state"].items()
        },
    }


def _shard(value: Any, like: Any) -> Any:
    """This rank's part of a whole tensor of the shape of `like`, if that is spread over ranks."""
    if not isinstance(value, Tensor) or not isinstance(like, Tensor) or not is_sharded(like):
        return value
    if value.shape != like.shape:
        return value  # a count of steps
    from torch.distributed.tensor import DTensor

    spread: Any = like
    mesh, mine = spread.device_mesh, value
    for axis, layout in enumerate(spread.placements):
        if layout.is_shard():
            parts, rank = mine.chunk(mesh.size(axis), layout.dim), mesh.get_local_rank(axis)
            none = mine.narrow(layout.dim, 0, 0)
            mine = parts[rank] if rank < len(parts) else none
    return DTensor.from_local(
        mine.clone().to(spread.device),
        mesh,
        spread.placements,
        run_check=False,
        shape=value.shape,
        stride=value.stride(),
    )
