"""Parameters that torch's `fully_shard` (FSDP2) has spread over ranks, as an engine sees them.

A parameter has two objects. The *sharded* one is a DTensor, `Shard(0)`, which the model has outside its
forward passes and the optimizer holds. The *unsharded* one is an ordinary parameter that FSDP puts in
its place for a forward or backward, fills by an all-gather and empties again; it is the same object
each time. The recording follows the unsharded ones. No gradient reaches them, since the recording
detaches parameters, and so FSDP has nothing to reduce: the clipped sums are added up here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist

from dptorch.distributed.hidden import hidden
from dptorch.distributed.ranks import Ranks, explained
from dptorch.errors import ConfigurationError

__all__ = [
    "Form",
    "Names",
    "ShardedParameters",
    "in_buckets",
    "is_sharded",
    "like_parameter",
    "local_part",
    "one_fingerprint",
]

Names: TypeAlias = Sequence[str] | None
Form: TypeAlias = Callable[[Names], dict[str, Tensor]]

#: Elements of sums that are added up in one message.
BUCKET: Final = 2**23
#: Methods of FSDP that move memory, which is none of a recording's business.
_MOVES: Final = ("lazy_init", "unshard", "wait_for_unshard", "reshard")


def is_sharded(p: Tensor) -> bool:
    """Whether a parameter is a DTensor, spread over processes."""
    return type(p.data).__name__ == "DTensor"


def local_part(p: Tensor) -> Tensor:
    """Return the values of a parameter that this rank has, as an ordinary tensor."""
    if (part := getattr(p, "ds_tensor", None)) is not None:  # of ZeRO-3
        return cast(Tensor, part).detach()
    values: Any = p.detach()
    return values.to_local() if is_sharded(p) else values


def like_parameter(p: Any, part: Tensor) -> Tensor:
    """Return this rank's part of a tensor of the shape of `p` as a DTensor like `p`."""
    from torch.distributed.tensor import DTensor

    found: Tensor = DTensor.from_local(
        part.to(p.dtype),
        p.device_mesh,
        p.placements,
        run_check=False,
        shape=p.shape,
        stride=p.stride(),
    )
    return found


def one_fingerprint(ranks: Ranks, fingerprint: int) -> int:
    """Return one number for the fingerprints of all ranks' parts."""
    parts = b"".join(part.to_bytes(8, "little") for part in ranks.gather(fingerprint))
    return int.from_bytes(hashlib.blake2b(parts, digest_size=8).digest(), "little")


class ShardedParameters:
    """The trainable parameters of a model on which `fully_shard` was called.

    Args:
        model: the root module.
        parameters: its trainable parameters by name, as they are outside forward passes.
        ranks: the processes that they are spread over.

    Attributes:
        followed: parameter name -> the unsharded parameter, or the parameter itself if it is whole.
        is_whole, around_forward: as of `dptorch.distributed.placement.Placement`.

    Raises:
        ConfigurationError: for a way of spreading that is not covered.
    """

    is_whole = False
    around_forward: Callable[[], AbstractContextManager[None]] = nullcontext

    def __init__(self, model: nn.Module, parameters: dict[str, Tensor], ranks: Ranks) -> None:
        self._ranks = ranks
        self._shards: dict[str, Any] = {}
        for name, p in parameters.items():
            if is_sharded(p):
                _check(name, p)
                self._shards[name] = p
        unsharded = {id(fp.sharded_param): fp.unsharded_param for fp in _gathered_once(model)}
        self.followed: dict[str, Tensor] = {
            name: unsharded.get(id(p), p) for name, p in parameters.items()
        }
        for name in self._shards:
            if self.followed[name] is parameters[name]:
                raise ConfigurationError(
                    f"the parameter {name!r} is a DTensor that fully_shard does not know of. Call "
                    "fully_shard on the model that the engine is given, and spread its parameters in "
                    "no other way: fully_shard together with tensor parallelism is not covered."
                )

    def __contains__(self, name: str) -> bool:
        return name in self._shards

    def first_coordinate(self, name: str) -> int:
        """Return where this rank's shard begins in the parameter, in coordinates of its flat form."""
        if name not in self._shards:
            return 0
        p = self._shards[name]
        rows, of_row = _chunk(p)
        return min(int(p.shape[0]), self._ranks.rank * rows) * of_row

    def summed(self, whole: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's shards of the sums over all ranks, in one message.

        Args:
            whole: parameter name -> this rank's sum, of the whole parameter; empty afterwards.
        """
        if not (names := list(whole)):
            return {}
        sizes = [self._chunk_numel(n) for n in names]
        flat = torch.cat([self._by_rank(n, whole.pop(n)) for n in names], dim=1)
        mine = flat.new_empty(flat.shape[1])
        with explained():
            group = self._shards[names[0]].device_mesh.get_group()
            dist.reduce_scatter_tensor(mine, flat.view(-1), op=dist.ReduceOp.SUM, group=group)
        found: dict[str, Tensor] = {}
        for name, part in zip(names, mine.split(sizes), strict=True):
            local = self._shards[name].to_local()
            found[name] = part[: local.numel()].view(local.shape).clone()
        return found

    def hand_over(self, name: str, p: Tensor, value: Tensor) -> None:
        """Make a shard of a gradient the parameter's gradient."""
        p.grad = like_parameter(p, value)

    def _chunk_numel(self, name: str) -> int:
        rows, of_row = _chunk(self._shards[name])
        return rows * of_row

    def _by_rank(self, name: str, value: Tensor) -> Tensor:
        """The sum of a whole parameter, one row for each rank's shard, padded: [ranks, chunk]."""
        flat = value.reshape(-1)
        size = self._chunk_numel(name) * self._ranks.size
        return nn.functional.pad(flat, (0, size - flat.numel())).view(self._ranks.size, -1)


def in_buckets(names: Sequence[str], parameters: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Names in order, up to `BUCKET` elements together; a larger parameter for itself."""
    bucket: list[str] = []
    for name in names:
        if bucket and sum(parameters[n].numel() for n in [*bucket, name]) > BUCKET:
            yield bucket
            bucket = []
        bucket.append(name)
    if bucket:
        yield bucket


def _chunk(p: Any) -> tuple[int, int]:
    """(rows of the longest shard, coordinates of a row)."""
    rows, ranks = int(p.shape[0]), int(p.device_mesh.size())
    return -(-rows // ranks), p.numel() // max(1, rows)


def _check(name: str, p: Any) -> None:
    if p.device_mesh.ndim != 1 or len(p.placements) != 1 or not p.placements[0].is_shard(0):
        raise ConfigurationError(
            f"the parameter {name!r} is spread as {p.placements} over a mesh of {p.device_mesh.ndim} "
            "dimensions. fully_shard is covered over one dimension of ranks, by the first dimension "
            "of each parameter: not HSDP, nor together with tensor parallelism."
        )
    if p.dim() == 0:
        raise ConfigurationError(
            f"the parameter {name!r} has no dimension to be spread by. Make it a vector of one number, "
            "or leave it out: fully_shard(model, ignored_params={...})."
        )


def _gathered_once(model: nn.Module) -> list[Any]:
    """Gather every group of parameters once, so that the unsharded ones exist, and keep FSDP's moving
    of memory out of recordings; returns FSDP's own record of each parameter."""
    found = []
    for group in _groups(model):
        for name in _MOVES:
            setattr(group, name, hidden(getattr(group, name)))
        group._register_post_backward_hook = _register_after_backward(group)
        group.lazy_init()
        group.unshard()
        group.wait_for_unshard()
        found += group.fsdp_params
        group.reshard()
    return found


def _groups(model: nn.Module) -> Iterator[Any]:
    """FSDP's groups of parameters, each of which is gathered at once."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    for module in model.modules():
        if hasattr(module, "_get_fsdp_state"):
            state = module._get_fsdp_state()  # type: ignore[operator]
            if not hasattr(state, "_fsdp_param_groups"):
                raise ConfigurationError(
                    f"fully_shard of torch {torch.__version__} is not known: it keeps parameters in "
                    "another way. Use torch 2.13, or train replicated, in DistributedDataParallel."
                )
            if state._mp_policy.param_dtype not in (None, torch.float32, torch.bfloat16):
                raise ConfigurationError(
                    f"MixedPrecisionPolicy(param_dtype={state._mp_policy.param_dtype}): gradients of "
                    "single examples underflow in it. Use torch.bfloat16."
                )
            for group in state._fsdp_param_groups:
                if isinstance(group.offload_policy, CPUOffloadPolicy):
                    raise ConfigurationError(
                        "CPUOffloadPolicy keeps parameters and gradients on another device than the "
                        "forward pass, which is not covered. Leave offload_policy out."
                    )
                yield group


def _register_after_backward(group: Any) -> Callable[..., Any]:
    """FSDP puts a function of its own in front of each group, to know when its backward is over. A
    hook on the same tensors knows it too, and leaves them what the recording knows them as."""

    def register(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        with torch._C.DisableTorchFunction():
            tensors = [
                t
                for t in torch.utils._pytree.tree_leaves((args, kwargs))
                if isinstance(t, Tensor) and t.requires_grad
            ]
            if torch.is_grad_enabled() and tensors:
                torch.autograd.graph.register_multi_grad_hook(
                    tensors, lambda *_: group.post_backward()
                )
        return args, kwargs

    return register
