"""Parameters that `parallelize_module` has divided over ranks (tensor parallelism).

All ranks have the same examples, and each computes some features of every one of them. An example's
gradient is therefore in parts: that of a divided parameter is spread over the ranks, that of any other
is the same on all of them. Its squared norm is the sum of the former over the ranks, and of the latter
on rank 0. A rank clips its part by the norm of the whole, and adds the part of the noise that belongs
there.

Where the mesh is one dimension of a larger one, the model is there several times, each on ranks with
other examples: beside the norms and parts of each, sums are added up over the ranks that have the same
part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch import distributed as dist

from dptorch.clipping.sums import ClippedSum
from dptorch.distributed.parallel_layers import Group, ParallelLayer
from dptorch.distributed.ranks import Ranks
from dptorch.distributed.sharded import Form, Names, is_sharded, like_parameter, one_fingerprint
from dptorch.errors import ConfigurationError, PrivacyError
from dptorch.noise.spans import Columns
from dptorch.tape import Tape

__all__ = ["TensorParallel"]

#: Part of an example's squared norm by which ranks may differ in what they all have, by rounding.
_ROUNDING: Final = 1e-2


class TensorParallel:
    """The trainable parameters of a model on which `parallelize_module` was called; a `Placement`.

    Args:
        model: the root module.
        parameters: its trainable parameters, by name.
        layers: its divided modules, as `layers_of` gives them.
        ranks: the processes of the mesh that it is divided over, or of several such meshes, each with
            other examples.

    Guarantees:
        What is released has the norm that was measured: divided parameters count on each rank, all
        others on rank 0 alone, whose sums all take.
        Held by `test_tensor_parallel_ranks_take_the_step_of_one_process` and
        `test_norms_that_are_not_added_up_or_counted_twice_are_seen`.

    Raises:
        ConfigurationError: they are divided in a way that is not covered.
    """

    is_whole = False
    around_forward: Callable[[], AbstractContextManager[None]] = nullcontext

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, Tensor],
        layers: Iterable[tuple[str, nn.Module]],
        ranks: Ranks,
    ) -> None:
        self._ranks = ranks
        self.offsets: Mapping[str, int | Columns] | None = None
        spread: dict[str, Any] = {n: p for n, p in model.named_parameters() if is_sharded(p)}
        mesh = next(iter(spread.values())).device_mesh
        for name, p in spread.items():
            _check(name, p, mesh)
        self._group = Group(mesh.get_group(), mesh.get_local_rank(), mesh.size())
        #: Those that have the other parts for the same examples.
        self._parts = Ranks(mesh.get_group())
        self.data_ranks = _with_other_examples(ranks, self._parts)
        local = {id(p): _local(p) for p in spread.values()}
        self._local = list(local.values())
        self.followed: dict[str, Tensor] = {n: local.get(id(p), p) for n, p in parameters.items()}
        self._divided: dict[str, Any] = {
            n: p for n, p in parameters.items() if n in spread and not _is_replicated(p)
        }
        self._layers: list[ParallelLayer] = []
        try:
            for name, module in layers:
                self._layers.append(ParallelLayer(name, module, local, self._group))
        except ConfigurationError:
            self.remove()
            raise

    def begin_alike(self) -> None:
        """Give ranks with the same part rank 0's values of it, and those with the same examples the
        same random numbers."""
        with torch.no_grad():
            self.data_ranks.copy_from_first_(p.data for p in self._local)
        _draw_alike(self._parts)

    def remove(self) -> None:
        """Leave the model as it was."""
        for layer in self._layers:
            layer.remove()
        self._layers.clear()

    def any_rank(self, wanted: bool) -> bool:
        """See `Placement`."""
        return self._ranks.any_rank(wanted)

    def norms(self, tape: Tape, names: Iterable[str] | None) -> Tensor:
        """See `Placement`.

        Raises:
            PrivacyError: gradients that should be the same on all ranks are not.
        """
        squared = tape.squared_norms(names)
        double = any(s.dtype == torch.float64 for s in squared.values())
        here = next(iter(squared.values())).device if squared else torch.device("cpu")
        mine = torch.zeros(
            2, tape.batch_size, dtype=torch.float64 if double else torch.float32, device=here
        )
        for name, s in squared.items():
            mine[int(name not in self._divided)] += s.reshape(-1).to(mine)
        of_ranks = self._parts.gather_rows(mine).to(here)
        divided, same = of_ranks[:, 0].sum(0), of_ranks[:, 1]
        total = divided + same[0]
        if bool(((same - same[0]).abs() > _ROUNDING * total).any()):
            raise PrivacyError(
                "an example's gradient of the parameters that every rank has is not the same on all "
                "ranks. Such a parameter is used on activations that are divided (a bias or a norm "
                "between ColwiseParallel and RowwiseParallel), or ranks draw other dropout masks. "
                "Divide it too, move it to where activations are replicated, or seed all ranks alike. "
                "Nothing was released."
            )
        return total.sqrt()

    def formed(self, names: Names, form: Form) -> dict[str, Tensor]:
        """See `Placement`."""
        return form(names)

    def add_up(self, clipped: ClippedSum) -> ClippedSum:
        """See `Placement`. What all ranks with the same examples have is that of the first of them."""
        offsets: dict[str, int | Columns] = {}
        at = 0
        for name, value in clipped.values.items():
            divided = self._divided.get(name)
            offsets[name] = at if divided is None else self._place(divided, at)
            at += value.numel() if divided is None else divided.numel()
        self.offsets = offsets
        self.data_ranks.add_up_(clipped.values.values())
        self._parts.copy_from_first_(v for n, v in clipped.values.items() if n not in self._divided)
        return clipped

    def _place(self, p: Any, at: int) -> int | Columns:
        """Where this rank's part of a parameter is, which begins at `at`."""
        (layout,) = p.placements
        first, row = self._group.first(p.shape[layout.dim]), p.numel() // p.shape[0]
        if layout.dim == 0:
            return at + first * row
        return Columns(at + first, row)

    def common(self, fingerprint: int) -> int:
        """See `Placement`.

        Raises:
            PrivacyError: ranks with the same part have other sums.
        """
        self.data_ranks.refuse_different_sums(fingerprint)
        return one_fingerprint(self._ranks, fingerprint)

    def hand_over(self, name: str, p: Tensor, value: Tensor) -> None:
        """See `Placement`."""
        p.grad = like_parameter(p, value) if is_sharded(p) else value.to(p.dtype)


def _with_other_examples(ranks: Ranks, parts: Ranks) -> Ranks:
    """Return the ranks that have the part of this one for other examples.

    Raises:
        ConfigurationError: ranks are arranged in another way than those of a mesh of two dimensions.
    """
    if parts.size == ranks.size:
        return Ranks.alone()
    meshes = sorted(set(ranks.gather(parts.members)))
    same_part = [sorted(members) for members in zip(*meshes, strict=False)]
    if [tuple(each) for each in zip(*same_part, strict=True)] != meshes:
        raise ConfigurationError(
            f"the model is divided over the processes {meshes}, which are not the rows of a mesh of "
            "two dimensions. Divide it over one dimension: init_device_mesh(device, (copies, parts), "
            'mesh_dim_names=("data", "features"))["features"].'
        )
    return Ranks(dist.new_group(same_part[parts.rank], use_local_synchronization=True))


def _draw_alike(ranks: Ranks) -> None:
    """Give all ranks the global random generators of rank 0, so that activations that are replicated
    get the same dropout on each."""
    mine = [torch.get_rng_state()]
    on_device = torch.cuda.is_available() and torch.cuda.is_initialized()
    if on_device:
        mine.append(torch.cuda.get_rng_state())
    first, *others = ranks.from_first(mine)
    torch.set_rng_state(first)
    if on_device and others:
        torch.cuda.set_rng_state(others[0])


def _local(p: Any) -> nn.Parameter:
    """What this rank has of a DTensor, as a parameter in the same memory. What ordinary passes on
    public data leave in its ``.grad`` goes to the DTensor's."""
    local = nn.Parameter(p.to_local().detach(), requires_grad=p.requires_grad)

    def move(mine: Tensor) -> None:
        if mine.grad is not None:
            found = like_parameter(p, mine.grad)
            p.grad = found if p.grad is None else p.grad + found
            mine.grad = None

    if local.requires_grad:
        local.register_post_accumulate_grad_hook(move)
    return local


def _is_replicated(p: Any) -> bool:
    return bool(p.placements[0].is_replicate())


def _check(name: str, p: Any, mesh: Any) -> None:
    """Raise ConfigurationError unless a DTensor is divided as is covered."""
    if p.device_mesh != mesh or mesh.ndim != 1:
        raise ConfigurationError(
            f"the parameter {name!r} is spread as {p.placements} over a mesh of {p.device_mesh.ndim} "
            "dimensions. Tensor parallelism is covered over one mesh of one dimension: not together "
            "with fully_shard, nor with pipeline or context parallelism."
        )
    (layout,) = p.placements
    if layout.is_replicate():
        return
    if not layout.is_shard() or layout.dim not in (0, 1):
        raise ConfigurationError(
            f"the parameter {name!r} is spread as {layout}, which is not covered. Use ColwiseParallel "
            "and RowwiseParallel."
        )
    rows, size = p.shape[layout.dim], mesh.size()
    if -(-rows // size) * (size - 1) >= rows:
        raise ConfigurationError(
            f"the parameter {name!r} has {rows} coordinates along dimension {layout.dim}, which leave "
            f"the last of {size} ranks without any. Leave its module out of the plan of "
            "parallelize_module."
        )
