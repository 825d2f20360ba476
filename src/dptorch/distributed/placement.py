"""Where the parameters of a model are: all of them on every rank, or a part on each (FSDP2, ZeRO).

`placement_of` finds out. The engine asks a placement for three things: what the model's forward passes
use in place of each parameter, the sum over all ranks as far as this rank needs it, and where that
part lies in the whole gradient, so that its noise is that part of the whole's noise.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from torch import Tensor, nn

from dptorch.clipping.sums import ClippedSum
from dptorch.distributed.ranks import Ranks
from dptorch.distributed.sharded import (
    Form,
    Names,
    ShardedParameters,
    in_buckets,
    is_sharded,
    one_fingerprint,
)
from dptorch.distributed.zero import ZeroParameters, is_zero
from dptorch.errors import ConfigurationError
from dptorch.noise.spans import Offsets
from dptorch.tape import Tape

__all__ = ["Placement", "Replicated", "Sharded", "placement_of"]


class Placement(Protocol):
    """What an engine asks.

    Attributes:
        is_whole: whether this rank can run the model without the others.
        followed: parameter name -> what the model's forward passes use.
        around_forward: makes what a recorded forward pass runs in.
        offsets: parameter name -> place of this rank's part in the whole gradient; None where the
            part is the whole. Known once `add_up` was called.
        data_ranks: those that have other examples than this one.
    """

    @property
    def is_whole(self) -> bool: ...

    @property
    def followed(self) -> dict[str, Tensor]: ...

    @property
    def around_forward(self) -> Callable[[], AbstractContextManager[None]]: ...

    @property
    def offsets(self) -> Offsets | None: ...

    @property
    def data_ranks(self) -> Ranks: ...

    def begin_alike(self) -> None:
        """Give ranks the same random numbers where they have the same examples, and the same values
        where they have the same part of a parameter."""

    def any_rank(self, wanted: bool) -> bool:
        """Return whether a rank wants what changes the messages of a backward pass; where it has
        none, whether this one does."""

    def norms(self, tape: Tape, names: Names) -> Tensor:
        """Return the norm of each example's whole gradient, as `Tape.norms`."""

    def formed(self, names: Names, form: Form) -> dict[str, Tensor]:
        """Return what ``form(names)`` returns, the sums over the examples of this rank; or, where a
        rank keeps a shard of the sum over all ranks, that, formed some parameters at a time."""

    def add_up(self, clipped: ClippedSum) -> ClippedSum:
        """Return this rank's part of the sum over all ranks; takes the tensors of `clipped` over."""

    def common(self, fingerprint: int) -> int:
        """Return the fingerprint of the whole sum, from that of this rank's part: one number for all
        ranks."""

    def hand_over(self, name: str, p: Tensor, value: Tensor) -> None:
        """Hand this rank's part of the gradient of parameter `p` to the optimizer."""

    def remove(self) -> None:
        """Leave the model as it was, as far as that can be."""


class Replicated:
    """Every rank has all parameters."""

    is_whole = True
    offsets: Offsets | None = None
    around_forward: Callable[[], AbstractContextManager[None]] = nullcontext

    def __init__(self, ranks: Ranks, parameters: dict[str, Tensor]) -> None:
        self._ranks = self.data_ranks = ranks
        self.followed = parameters

    def begin_alike(self) -> None:
        """See `Placement`. Each rank has examples of its own."""

    def any_rank(self, wanted: bool) -> bool:
        """See `Placement`. A backward pass of a whole model sends nothing."""
        return wanted

    def norms(self, tape: Tape, names: Names) -> Tensor:
        """See `Placement`."""
        return tape.norms(names)

    def remove(self) -> None:
        """See `Placement`."""

    def formed(self, names: Names, form: Form) -> dict[str, Tensor]:
        """See `Placement`."""
        return form(names)

    def add_up(self, clipped: ClippedSum) -> ClippedSum:
        """See `Placement`.

        Raises:
            ConfigurationError: DeepSpeed has divided the parameters since.
        """
        if any(map(is_zero, self.followed.values())):
            raise ConfigurationError(
                "deepspeed.initialize was called after the engine was made. Call it before, and give "
                "the engine what it returned first. Nothing was spent."
            )
        self._ranks.add_up_(clipped.values.values())
        return clipped

    def common(self, fingerprint: int) -> int:
        """See `Placement`.

        Raises:
            PrivacyError: the sum is not the same on all ranks.
        """
        self._ranks.refuse_different_sums(fingerprint)
        return fingerprint

    def hand_over(self, name: str, p: Tensor, value: Tensor) -> None:
        """See `Placement`."""
        p.grad = value.to(p.dtype)


class Sharded:
    """Each rank steps on a part of every parameter that FSDP2 or ZeRO took, and on the others whole.

    The clipped sums of a rank's examples are formed, added up and scattered some parameters at a time,
    after each physical batch: each rank keeps its shard of the sum, adds its slice of the noise and
    steps on it. No rank ever has the whole sum (`test_no_rank_has_the_whole_sum`).
    """

    def __init__(self, ranks: Ranks, shards: ShardedParameters | ZeroParameters) -> None:
        self._ranks = self.data_ranks = ranks
        self._shards = shards
        self.is_whole = shards.is_whole
        self.followed = shards.followed
        self.around_forward = shards.around_forward
        self.offsets: Offsets | None = None

    def begin_alike(self) -> None:
        """See `Placement`. Each rank has examples of its own."""

    def any_rank(self, wanted: bool) -> bool:
        """See `Placement`."""
        return self._ranks.any_rank(wanted)

    def norms(self, tape: Tape, names: Names) -> Tensor:
        """See `Placement`. Examples are whole on their rank."""
        return tape.norms(names)

    def remove(self) -> None:
        """See `Placement`. What was put around FSDP's and ZeRO's functions is without effect."""

    def formed(self, names: Names, form: Form) -> dict[str, Tensor]:
        """See `Placement`."""
        found: dict[str, Tensor] = {}
        for some in in_buckets(list(self.followed if names is None else names), self.followed):
            whole = form(some)
            found |= {n: whole.pop(n) for n in some if n not in self._shards}
            found |= self._shards.summed(whole)
        return found

    def add_up(self, clipped: ClippedSum) -> ClippedSum:
        """See `Placement`. The shards of a sum are added up already; what is whole is not."""
        offsets, at = {}, 0
        for name, value in clipped.values.items():
            offsets[name] = at + self._shards.first_coordinate(name)
            at += self.followed[name].numel() if name in self._shards else value.numel()
        self.offsets = offsets
        self._ranks.add_up_(v for n, v in clipped.values.items() if n not in self._shards)
        return clipped

    def common(self, fingerprint: int) -> int:
        """See `Placement`."""
        return one_fingerprint(self._ranks, fingerprint)

    def hand_over(self, name: str, p: Tensor, value: Tensor) -> None:
        """See `Placement`."""
        if name in self._shards:
            self._shards.hand_over(name, p, value)
        else:
            p.grad = value.to(p.dtype)


def placement_of(
    model: nn.Module, parameters: dict[str, Tensor], ranks: Ranks, given: nn.Module
) -> Placement:
    """Return where the parameters of `model` are.

    Args:
        model: as `unwrapped` returned it.
        parameters: its trainable parameters, by name.
        ranks: the processes that train it.
        given: what it was in.

    Raises:
        ConfigurationError: they are spread over processes in a way that is not covered.
    """
    spread: list[tuple[str, Any]] = [(n, p) for n, p in model.named_parameters() if is_sharded(p)]
    by_fsdp = any(hasattr(module, "_get_fsdp_state") for module in model.modules())
    from dptorch.distributed.parallel_layers import layers_of

    layers = [] if by_fsdp else list(layers_of(model))
    if any(map(is_zero, parameters.values())):
        return Sharded(ranks, ZeroParameters(given, parameters, ranks))
    if not spread:
        return Replicated(ranks, parameters)
    name, p = spread[0]
    parts = p.device_mesh.size()
    if parts != ranks.size and (by_fsdp or ranks.size % parts):
        raise ConfigurationError(
            f"the parameter {name!r} is spread over {parts} processes, but the engine's "
            f"ranks are {ranks.size}. Shard over all of them, or give the engine "
            "ranks=dptorch.distributed.Ranks.of(mesh.get_group())."
        )
    if not by_fsdp:
        from dptorch.distributed.tensor_parallel import TensorParallel

        return TensorParallel(model, parameters, layers, ranks)
    return Sharded(ranks, ShardedParameters(model, parameters, ranks))
