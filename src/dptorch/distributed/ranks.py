"""`Ranks`: the processes that train one model together, and every message between them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Final, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from dptorch.errors import ConfigurationError, PrivacyError
from dptorch.randomness import RootKey

__all__ = ["Ranks", "explained"]

T = TypeVar("T")

#: Bytes of tensors that are copied into one message; a larger tensor is sent from where it lies.
_BUCKET: Final = 2**25
_SEEDLESS: Final = "none: from the operating system"


class Ranks:
    """The processes that train one model together.

    A `PrivacyEngine` takes `Ranks.of()`, unless it is given others: all processes of
    torch.distributed's default group where there is one, or this process alone.

    Args:
        group: the process group; None for this process alone.

    Attributes:
        rank: place of this process among them.
        size: how many they are.

    Guarantees:
        What one of them raises in `together` is raised on all, so that none waits for a message that
        never comes (`test_an_error_on_one_rank_is_an_error_on_all`).

    Example:
        >>> Ranks.alone()
        Ranks(rank=0, size=1)
        >>> Ranks.alone().gather("word")
        ['word']
    """

    def __init__(self, group: dist.ProcessGroup | None, *, by_default: bool = False) -> None:
        self._group = group
        self._by_default = by_default
        self.rank, self.size = 0, 1
        if group is not None:
            self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
            if self.rank < 0:
                raise ConfigurationError(
                    "this process is not in the process group that it was given as ranks. Give the "
                    "group that it trains in, or Ranks.alone()."
                )

    @classmethod
    def of(cls, group: dist.ProcessGroup | None = None) -> Ranks:
        """Return the ranks of `group`; by default those of torch.distributed's default group, or this
        process alone where torch.distributed was not initialised."""
        if group is None and _several():
            group = dist.group.WORLD
        return cls(group, by_default=group is None)

    @classmethod
    def alone(cls) -> Ranks:
        """Return this process alone, for a model that no other process trains."""
        return cls(None)

    @property
    def members(self) -> tuple[int, ...]:
        """Their numbers among all processes, by rank."""
        return tuple(dist.get_process_group_ranks(self._group)) if self._group is not None else (0,)

    @property
    def is_first(self) -> bool:
        """Whether this process keeps ledger, checkpoints and reports."""
        return self.rank == 0

    def __repr__(self) -> str:
        return f"Ranks(rank={self.rank}, size={self.size})"

    # -- messages ----------------------------------------------------------------------------------

    def gather(self, value: T) -> list[T]:
        """Return what each rank gave, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with explained():
            dist.all_gather_object(found, value, group=self._group)
        return found

    def from_first(self, value: T) -> T:
        """Return what rank 0 gave."""
        if self.size == 1:
            return value
        box = [value if self.is_first else None]
        with explained():
            dist.broadcast_object_list(box, group_src=0, group=self._group)
        return box[0]  # type: ignore[return-value]

    @contextmanager
    def together(self, **same: int) -> Iterator[None]:
        """Do something that may fail: if it fails on one rank, all raise.

        Args:
            same: numbers that have to be equal on all ranks, such as the step.

        Raises:
            PrivacyError: another rank failed, and why; or `same` differs. A rank that failed raises
                its own error.
        """
        if self.size == 1:
            if self._by_default and _several():
                raise ConfigurationError(
                    "torch.distributed was initialised after the engine was made, which so trains on "
                    "this process alone, and all others would each train a model of their own. Make "
                    "the engine after init_process_group or Accelerator(); or give it "
                    "ranks=dptorch.distributed.Ranks.alone(), if that is meant."
                )
            yield
            return
        try:
            yield
        except Exception as error:
            self._meet(same, f"{type(error).__name__}: {error}")
            raise
        if failed := self._meet(same, None):
            raise PrivacyError(failed)

    def _meet(self, same: Mapping[str, int], error: str | None) -> str | None:
        """Exchange whether this rank may go on; returns why it may not, if another's state says so."""
        mine = torch.tensor([error is not None, *same.values()], dtype=torch.int64)
        found = self.gather_rows(mine)
        failed = [rank for rank, row in enumerate(found.tolist()) if row[0]]
        if failed:
            messages = self.gather(error)
            self.wait_for_all()
            rank = failed[0]
            return (
                f"rank {rank} of {self.size} stopped, and all ranks with it: {messages[rank]} Nothing "
                "was released."
            )
        for i, name in enumerate(same):
            values = found[:, i + 1].tolist()
            if len(set(values)) > 1:
                self.wait_for_all()
                return (
                    f"the ranks are not at the same place: {name} is {values}, by rank. All have to "
                    "run the same loop, and call optimizer.step() equally often. Nothing was released."
                )
        return None

    def any_rank(self, wanted: bool) -> bool:
        """Return whether some rank gave True."""
        return bool(self.gather_rows(torch.tensor([wanted])).any()) if self.size > 1 else wanted

    def gather_rows(self, numbers: Tensor) -> Tensor:
        """Return numbers of one shape from each rank, [size, *shape], on the CPU."""
        numbers = numbers.to(self._device)
        rows = list(torch.empty(self.size, *numbers.shape, dtype=numbers.dtype).to(self._device))
        with explained():
            dist.all_gather(rows, numbers, group=self._group)
        return torch.stack(rows).cpu()

    def wait_for_all(self) -> None:
        """Return once all ranks are here, or one has ended: in front of an error that all raise, since
        gloo may lose what a rank sent last where its process ends before the others have read it."""
        with suppress(PrivacyError):
            self.gather_rows(torch.zeros(1))

    @property
    def _device(self) -> torch.device:
        """Where messages of the group can lie."""
        if "cpu:" in str(dist.get_backend_config(self._group)):
            return torch.device("cpu")
        return torch.device(torch.accelerator.current_accelerator() or "cuda")

    # -- what they have to agree on ----------------------------------------------------------------

    def agree(self, values: Mapping[str, str]) -> None:
        """Check that all ranks have the same values.

        Args:
            values: what is compared, in words -> this rank's.

        Raises:
            ConfigurationError: on every rank, naming what differs and where.
        """
        everybody = self.gather(dict(values))
        first = everybody[0]
        for rank, theirs in enumerate(everybody):
            for name in dict.fromkeys([*first, *theirs]):
                a, b = first.get(name, "nothing"), theirs.get(name, "nothing")
                if a != b:
                    self.wait_for_all()
                    raise ConfigurationError(
                        f"the ranks of this run differ in {name}: {_short(a, b)} on rank 0, "
                        f"{_short(b, a)} on rank {rank}. All ranks train one model on one data set: "
                        "build both, and the engine, by the same code and values on each. Steps that "
                        "were taken before stay counted."
                    )

    def share_key(self, seed: int | None) -> RootKey:
        """Return the one root key of the run.

        A secret key is rank 0's, and is sent to the others: whoever can read the traffic between the
        ranks sees it, as they see sums without noise.

        Args:
            seed: for tests; None for a secret key.

        Raises:
            ConfigurationError: the ranks were given different seeds.
        """
        self.agree({"seed": _SEEDLESS if seed is None else str(seed)})
        if seed is not None:
            return RootKey.from_seed(seed)
        key = RootKey.from_os()
        if self.size == 1:
            return key
        return RootKey.restore(self.from_first(key.export()))

    def refuse_different_sums(self, fingerprint: int) -> None:
        """Check that what noise is about to be added to is the same on all ranks, by its fingerprint.

        Raises:
            PrivacyError: it is not, so that each rank would add other noise.
        """
        if self.size > 1:
            halves = torch.tensor([fingerprint >> 32, fingerprint & (2**32 - 1)], dtype=torch.int64)
            if self.gather_rows(halves).unique(dim=0).shape[0] > 1:
                self.wait_for_all()
                raise PrivacyError(
                    "the sum over all ranks is not the same on each, so that they would add different "
                    "noise to it, and the models drift apart. Nothing was released. The communication "
                    "library rounds by rank: try another backend."
                )

    # -- tensors -----------------------------------------------------------------------------------

    def add_up_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks, which is the same to the bit on all."""
        if self.size > 1:
            for bucket in _buckets(tensors):
                with _in_one(bucket) as flat, explained():
                    dist.all_reduce(flat, op=dist.ReduceOp.SUM, group=self._group)

    def sum_on(self, rank: int, tensor: Tensor) -> Tensor:
        """Return the sum of the tensors of all ranks, on `rank`; nothing of use on the others. Takes
        the tensor over."""
        if self.size > 1 and tensor.numel():
            with explained():
                dist.reduce(tensor, op=dist.ReduceOp.SUM, group=self._group, group_dst=rank)
        return tensor

    def copy_from_first_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by that of rank 0."""
        if self.size > 1:
            for bucket in _buckets(tensors):
                with _in_one(bucket) as flat, explained():
                    dist.broadcast(flat, group_src=0, group=self._group)


def _several() -> bool:
    """Whether torch.distributed has more processes than this."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def explained() -> Iterator[None]:
    """Say what it means that a message did not arrive."""
    try:
        yield
    except RuntimeError as error:
        raise PrivacyError(
            "another rank of this run has ended, or cannot be reached, so this one stops too. The "
            "step that was under way is not released; it counts if it was written down. Look for "
            "the first error among the ranks, and go on from the last checkpoint. "
            f"({str(error).splitlines()[0]})"
        ) from error


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one type and device, in order, up to `_BUCKET` bytes; a larger one for itself."""
    open_: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        if not tensor.numel():
            continue
        bucket = open_.setdefault((tensor.dtype, tensor.device), [])
        if bucket and sum(t.nbytes for t in bucket) + tensor.nbytes > _BUCKET:
            yield bucket.copy()
            bucket.clear()
        bucket.append(tensor)
    yield from (bucket for bucket in open_.values() if bucket)


@contextmanager
def _in_one(bucket: list[Tensor]) -> Iterator[Tensor]:
    """The tensors of a bucket as one flat tensor; what is written into it is written into them."""
    only = bucket[0]
    if len(bucket) == 1 and only.is_contiguous():
        yield only.view(-1)
        return
    flat = torch.cat([t.reshape(-1) for t in bucket])
    yield flat
    for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
        tensor.copy_(part.view(tensor.shape))


def _short(value: str, other: str) -> str:
    """`value`, from a little before where it differs from `other`."""
    if len(value) <= 80:
        return value
    at = next((i for i, (a, b) in enumerate(zip(value, other, strict=False)) if a != b), 0)
    return f"...{value[max(0, at - 20) : at + 40]}..."
