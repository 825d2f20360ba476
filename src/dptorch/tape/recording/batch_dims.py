"""Which inputs of a model are batched, and along which dimension; or whose each of their rows is."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map

from dptorch.errors import ConfigurationError
from dptorch.tape.provenance.layouts import remember
from dptorch.tape.provenance.tags import Order, Tag, regular_or_explicit
from dptorch.tape.recording.tensor_states import refuse_other_rows
from dptorch.tape.rules.recorder import Recorder

__all__ = [
    "BatchDims",
    "Ragged",
    "argument_names",
    "is_ragged",
    "map_batched",
    "packed_owners",
    "tag_inputs",
]


@dataclass(frozen=True)
class Ragged:
    """Rows of several examples one after another, as many of each as it has.

    Args:
        by: the argument of forward that says whose each row is; or a function from all arguments,
            {name: value}, to the owner of each row, int64 [rows].
        how: what that argument holds. "owners": the number of its example for each row, as the
            ``batch`` vector of a block-diagonal graph. "lengths": how many rows each example has.
            "offsets": where the rows of each example begin, as for `torch.nn.EmbeddingBag`.
        dim: the dimension that the rows lie along.
        examples: the argument that holds the number of examples, for owners whose last examples may
            have no rows; by default the largest owner says it.

    The argument named by `by` is given to the model with the batch and depends on all its examples.
    Lengths and offsets have one entry for each example and carry them; owners carry those they name.

    Example:
        >>> bags = {"ids": Ragged("offsets", "offsets"), "weights": Ragged("offsets", "offsets")}
        >>> flat = {"targets": Ragged("target_lengths", "lengths")}
        >>> graph = {
        ...     "x": Ragged("batch"),
        ...     "batch": Ragged("batch"),
        ...     "edge_index": Ragged(lambda a: a["batch"][a["edge_index"][0]], dim=1),
        ... }
    """

    by: str | Callable[[Mapping[str, Any]], Tensor]
    how: str = "owners"
    dim: int = 0
    examples: str | None = None

    def __post_init__(self) -> None:
        if self.how not in ("owners", "lengths", "offsets"):
            raise ConfigurationError(
                f"Ragged(how={self.how!r}): expected 'owners', 'lengths' or 'offsets'."
            )

    def owners(self, name: str, t: Tensor, arguments: Mapping[str, Any]) -> tuple[Tensor, int]:
        """The owner of each row of the argument called `name`, and the number of examples.

        Raises:
            ConfigurationError: if what says it is missing or does not fit.
        """
        said = self._said(name, arguments)
        rows = t.shape[self.dim]
        if self.how == "owners":
            count = int(said.max()) + 1 if said.numel() else 0
            owner = said
            if self.examples is not None:
                count = int(arguments.get(self.examples, -1))
        else:
            count = said.shape[0]
            ends = torch.cat([said[1:], said.new_tensor([rows])])
            lengths = said if self.how == "lengths" else ends - said
            if bool((lengths < 0).any()):
                raise ConfigurationError(f"the {self.how} of '{name}' do not grow.")
            owner = torch.arange(count, device=said.device).repeat_interleave(lengths)
        if owner.shape != (rows,) or (
            rows and not 0 <= int(owner.min()) <= int(owner.max()) < count
        ):
            raise ConfigurationError(
                f"'{name}' has {rows} rows along dimension {self.dim}, but its {self.how} speak of "
                f"{owner.numel()} rows of {count} examples. Each row needs the number of its example, "
                f"from 0 to {max(count - 1, 0)}."
            )
        return owner, count

    def _said(self, name: str, arguments: Mapping[str, Any]) -> Tensor:
        if callable(self.by):
            said = self.by(arguments)
        elif self.by in arguments:
            said = arguments[self.by]
        else:
            raise ConfigurationError(
                f"batch_dims says that '{self.by}' tells whose the rows of '{name}' are, but the "
                f"model was called with {', '.join(arguments)}. Pass it to the model."
            )
        said = torch.as_tensor(said)
        if said.dim() != 1 or said.is_floating_point():
            raise ConfigurationError(
                f"what tells whose the rows of '{name}' are has shape {tuple(said.shape)} and dtype "
                f"{said.dtype}; expected whole numbers in one dimension."
            )
        return said


BatchDims = int | Mapping[str, int | Ragged | None]
"""Where a model's inputs hold the examples: one dimension for all of them, or one for each named
argument of forward. There None says that an argument is shared by all examples, and `Ragged` that its
rows are of examples of different sizes, one after another. Arguments that are not named hold them in
dimension 0. A `PackedSequence` says itself whose its rows are."""


def map_batched(
    function: Callable[[Tensor, int], Any],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    batch_dims: BatchDims = 0,
    ragged: Callable[[str, Tensor, Ragged], Any] | None = None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Apply ``function(tensor, batch dimension)`` to every batched tensor among a call's arguments.

    Without more said every tensor argument holds the examples in dimension 0. A scalar, or a tensor
    of size 1 there beside larger ones, is taken as shared by all examples. Any other tensor that is
    not batched must be named in `batch_dims` as None; names that are not mentioned have dimension 0.
    ``ragged(name, tensor, how)`` gets the tensors whose examples have rows of different number; by
    default they stay as they are, as packed sequences do.
    """

    def dim_of(name: str) -> int | Ragged | None:
        return batch_dims if isinstance(batch_dims, int) else batch_dims.get(name, 0)

    # One dimension for all needs no names.
    names = [""] * len(args) if isinstance(batch_dims, int) else argument_names(module, len(args))
    largest = 0
    for name, value in [*zip(names, args, strict=True), *kwargs.items()]:
        dim = dim_of(name)
        if isinstance(dim, int):
            sizes = [t.shape[dim] for t in _leaves(value) if isinstance(t, Tensor) and t.dim()]
            largest = max([largest, *sizes])

    def apply(name: str, value: Any) -> Any:
        dim = dim_of(name)
        if dim is None:
            return value

        def on_leaf(t: Any) -> Any:
            if isinstance(t, PackedSequence):
                return t
            if isinstance(dim, Ragged):
                return ragged(name, t, dim) if ragged and isinstance(t, Tensor) else t
            shared = not isinstance(t, Tensor) or not t.dim() or (t.shape[dim] == 1 < largest)
            return t if shared else function(t, dim)

        return on_leaf(value) if isinstance(value, Tensor) else _map(on_leaf, value)

    new_args = tuple(apply(n, a) for n, a in zip(names, args, strict=True))
    return new_args, {n: apply(n, a) for n, a in kwargs.items()}


def tag_inputs(
    recording: Recorder,
    tag_batch: Callable[[Tensor, int], Tensor],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    batch_dims: BatchDims = 0,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Tag the inputs of a model in a recording; returns the arguments to use.

    Raises:
        ConfigurationError: if inputs disagree on the number of examples.
    """
    arguments: dict[str, Any] = {}
    if not isinstance(batch_dims, int):
        arguments = {**dict(zip(argument_names(module, len(args)), args, strict=True)), **kwargs}
    _refuse_unequal(module, args, kwargs, batch_dims)

    def tag_owners(t: Tensor, dim: int, owner: Tensor, count: int) -> Tensor:
        tag_batch(owner.new_empty(count), 0)  # the number of examples, which all inputs share
        tag = regular_or_explicit(owner, dim % t.dim(), count) if count > 1 else Tag(None, 0)
        refuse_other_rows(recording.state, t, tag, dim)
        recording.mark(t, tag)
        if tag.explicit is not None:
            remember(tag.explicit, count)
        return t

    def on_ragged(name: str, t: Tensor, how: Ragged) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            owner, count = how.owners(name, t, arguments)
        return tag_owners(t, how.dim, owner, count)

    for packed in _leaves((args, dict(kwargs))):
        if isinstance(packed, PackedSequence):
            owner, count = packed_owners(packed)
            tag_owners(packed.data, 0, owner, count)
            for order in (packed.sorted_indices, packed.unsorted_indices):
                recording.mark(order, Order())
    return map_batched(tag_batch, module, args, kwargs, batch_dims, on_ragged)


def is_ragged(args: tuple[Any, ...], kwargs: Mapping[str, Any], batch_dims: BatchDims) -> bool:
    """Whether an input holds examples of different sizes one after another, which cannot be cut."""
    if not isinstance(batch_dims, int) and any(isinstance(d, Ragged) for d in batch_dims.values()):
        return True
    return any(isinstance(t, PackedSequence) for t in _leaves((args, dict(kwargs))))


def packed_owners(packed: PackedSequence) -> tuple[Tensor, int]:
    """Whose each row of a packed sequence is: position by position, the longest sequence first."""
    sizes = packed.batch_sizes.tolist()
    count = sizes[0]
    first = packed.sorted_indices
    order = torch.arange(count) if first is None else first.cpu()
    return torch.cat([order[:k] for k in sizes]), count


def _refuse_unequal(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], batch_dims: BatchDims
) -> None:
    same = isinstance(batch_dims, int)  # a signature is not looked at unless it is needed
    names = list(map(str, range(len(args)))) if same else argument_names(module, len(args))
    sizes: dict[str, int] = {}
    for name, value in [*zip(names, args, strict=True), *kwargs.items()]:
        dim = batch_dims if isinstance(batch_dims, int) else batch_dims.get(name, 0)
        if isinstance(value, Tensor) and isinstance(dim, int) and value.dim() > max(dim, 0):
            sizes[name] = value.shape[dim]
    different = {s for s in sizes.values() if s != 1}
    if len(different) < 2:
        return
    if same:
        real = dict(zip(names, argument_names(module, len(args)), strict=True))
        sizes = {real.get(n, n): size for n, size in sizes.items()}
    found = ", ".join(f"'{n}' has {s}" for n, s in sizes.items())
    most = max(sizes, key=lambda n: sizes[n])
    fewest = min((n for n in sizes if sizes[n] != 1), key=lambda n: sizes[n])
    raise ConfigurationError(
        f"the inputs hold different numbers of examples: {found}. Inputs of one forward pass must "
        "hold the same examples. Name the batch dimension of each with batch_dims=, None for inputs "
        "that are not batched. If an input holds the rows of all examples one after another, say "
        f"whose they are: batch_dims={{'{most}': dptorch.tape.Ragged('{fewest}', 'offsets')}} where "
        f"'{fewest}' says where each example begins, 'lengths' where it says how long each is, "
        "'owners' where it has the example's number for each row."
    )


def _is_packed(value: Any) -> bool:
    return isinstance(value, PackedSequence)


def _leaves(value: Any) -> list[Any]:
    return [value] if isinstance(value, Tensor) else tree_leaves(value, is_leaf=_is_packed)


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    return tree_map(function, value, is_leaf=_is_packed)


def argument_names(module: nn.Module, count: int) -> list[str]:
    """What forward calls its first `count` arguments; their number where it has no name for one."""
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    names: list[str] = []
    for p in parameters:
        if p.kind is p.VAR_POSITIONAL:
            break
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD):
            names.append(p.name)
    return [names[i] if i < len(names) else str(i) for i in range(count)]
