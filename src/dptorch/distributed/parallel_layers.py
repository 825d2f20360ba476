"""Linear layers and embeddings that `parallelize_module` has divided, run on ordinary tensors.

torch's hooks on such a module turn its input into a DTensor and its output back. A recording follows
ordinary tensors, so these hooks give way to others: for the time of the module's forward pass its
parameters are what this rank has of them, and what ranks exchange is named. An input or output is
either *replicated*, the same on all ranks, or *divided* by its last dimension.

    ColwiseParallel    input replicated, each rank some outputs; gradients of the input are added up
    RowwiseParallel    input divided, each rank some inputs; outputs are added up, then the bias added
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch import distributed as dist

from dptorch.distributed.ranks import explained
from dptorch.errors import ConfigurationError
from dptorch.tape.propagation.table import family
from dptorch.tape.provenance.calls import Call
from dptorch.tape.provenance.tags import Lost, Tag

__all__ = ["ParallelLayer", "layers_of"]

_OF_TORCH: Final = "torch.distributed.tensor"
_KNOWN: Final = (
    "Covered are nn.Linear and nn.Embedding under ColwiseParallel and RowwiseParallel, whose inputs "
    "and outputs are replicated or Shard(-1); not sequence, pipeline or context parallelism."
)


# -- what ranks exchange ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """The ranks that a dimension is divided over, as `torch.chunk` does.

    Attributes:
        group: of processes.
        rank: the number of this one in it.
        size: how many they are.
    """

    group: Any
    rank: int
    size: int

    def sizes(self, whole: int) -> list[int]:
        """How many coordinates of `whole` each rank has."""
        most = -(-whole // self.size)
        return [max(0, min(most, whole - rank * most)) for rank in range(self.size)]

    def first(self, whole: int) -> int:
        """The first coordinate that this rank has."""
        return sum(self.sizes(whole)[: self.rank])

    def added_up(self, x: Tensor) -> Tensor:
        """The sum over the ranks."""
        total = x.clone(memory_format=torch.contiguous_format)
        with explained():
            dist.all_reduce(total, op=dist.ReduceOp.SUM, group=self.group)
        return total

    def mine(self, x: Tensor) -> Tensor:
        """This rank's part of the last dimension."""
        sizes = self.sizes(x.shape[-1])
        return x.narrow(-1, sum(sizes[: self.rank]), sizes[self.rank]).contiguous()

    def joined(self, x: Tensor, whole: int) -> Tensor:
        """The parts of all ranks, side by side."""
        sizes = self.sizes(whole)
        padded = nn.functional.pad(x, (0, sizes[0] - x.shape[-1])).contiguous()
        parts = [torch.empty_like(padded) for _ in sizes]
        with explained():
            dist.all_gather(parts, padded, group=self.group)
        return torch.cat([p.narrow(-1, 0, n) for p, n in zip(parts, sizes, strict=True)], -1)


def _function(
    name: str,
    there: Callable[[Group, Tensor, int], Tensor],
    back: Callable[[Group, Tensor, int], Tensor],
) -> Any:
    """A custom Function of (activation, group, size of the whole last dimension). It moves activations
    between ranks and looks at no example: no recording sees inside."""

    def forward(ctx: Any, x: Tensor, group: Group, whole: int) -> Tensor:
        ctx.group, ctx.whole = group, whole
        with torch._C.DisableTorchFunction():
            return there(group, x, whole)

    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        with torch._C.DisableTorchFunction():
            return back(ctx.group, g, ctx.whole), None, None

    body = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), {**body, "__module__": __name__})


def _same(group: Group, x: Tensor, whole: int) -> Tensor:
    return x.view_as(x)


def _sum(group: Group, x: Tensor, whole: int) -> Tensor:
    return group.added_up(x)


def _part(group: Group, x: Tensor, whole: int) -> Tensor:
    return group.mine(x)


def _whole(group: Group, x: Tensor, whole: int) -> Tensor:
    return group.joined(x, whole)


# No class of a program has a point in its name, so that none is taken for one of these.
_ToDivided: Final = _function("dptorch.ToDivided", _same, _sum)
_Sum: Final = _function("dptorch.Sum", _sum, _same)
_Take: Final = _function("dptorch.Take", _part, _whole)
_Join: Final = _function("dptorch.Join", _whole, _part)


@family(" ".join(f"{each.__name__}.apply" for each in (_ToDivided, _Sum, _Take, _Join)))
def _examples_stay(call: Call, outputs: Sequence[Any]) -> Tag:
    """The examples stay where they are: ranks divide the last dimension."""
    ((x, tag),) = call.tagged
    if tag.dim is not None and tag.dim == x.dim() - 1:
        raise Lost("examples lie along the last dimension, which ranks divide")
    return tag


# -- one module ------------------------------------------------------------------------------------


class ParallelLayer:
    """A divided module, which runs on ordinary tensors until `remove` is called.

    Args:
        name: of the module, for messages.
        module: with the hooks that `parallelize_module` has set.
        local: id of a DTensor -> what this rank has of it.
        group: the ranks that it is divided over.

    Raises:
        ConfigurationError: it is divided in a way that is not covered.
    """

    def __init__(
        self, name: str, module: Any, local: Mapping[int, nn.Parameter], group: Group
    ) -> None:
        self._module, self._local, self._group = module, local, group
        self._before, self._after = _hooks_of(name, module)
        inputs, outputs = _layouts(name, self._before[1], self._after[1])
        self._by_row = _is_by_row(name, module)
        self._is_embedding = isinstance(module, nn.Embedding)
        self._joins_input = self._takes_input = self._joins_output = False
        if self._is_embedding:
            _refuse_other(name, "input_layouts", inputs, ("replicated",))
            _refuse_options(name, module, self._by_row)
        elif self._by_row:
            self._takes_input = inputs == "replicated"
        else:
            self._joins_input = inputs == "divided"
        if self._by_row:
            _refuse_other(name, "output_layouts", outputs, ("replicated",))
        else:
            self._joins_output = outputs == "replicated"
        self._outside: Tensor | None = None  # which ids of a row-wise embedding other ranks have
        self._kept: dict[str, Any] = {}  # parameters that are DTensors, for the time of a forward
        self._padding_idx = getattr(module, "padding_idx", None)
        module._forward_pre_hooks[self._before[0]] = self.before
        module._forward_hooks[self._after[0]] = self.after
        module._forward_hooks_always_called[self._after[0]] = True

    def remove(self) -> None:
        """Give the module its hooks back."""
        self._module._forward_pre_hooks[self._before[0]] = self._before[1]
        self._module._forward_hooks[self._after[0]] = self._after[1]
        self._module._forward_hooks_always_called.pop(self._after[0], None)

    def __deepcopy__(self, memo: Any) -> ParallelLayer:
        return self  # a copy of the module is none of ours: `before` and `after` leave it alone

    def before(self, module: Any, args: tuple[Any, ...]) -> Any:
        """Put this rank's parameters in place, and its part of the input."""
        if module is not self._module:
            return self._before[1](module, args)
        x, *rest = args
        if self._by_row and self._is_embedding:
            x = self._own_ids(x)
        elif self._takes_input:
            x = _Take.apply(x, self._group, module.in_features)
        elif not self._by_row and not self._is_embedding:
            if self._joins_input:
                x = _Join.apply(x, self._group, module.in_features)
            x = _ToDivided.apply(x, self._group, 0)
        self._put_in_place()
        return (x, *rest)

    def after(self, module: Any, args: Any, output: Any) -> Any:
        """Put the DTensors back, and the output together."""
        if module is not self._module:
            return None if output is None else self._after[1](module, args, output)
        self._put_back()
        if output is None:  # the forward pass ended with an error
            return None
        if self._outside is not None:
            output = output.masked_fill(self._outside.unsqueeze(-1), 0.0)
            self._outside = None
        if self._by_row:
            output = _Sum.apply(output, self._group, 0)
            bias = module._parameters.get("bias")
            if bias is None:
                return output
            own: Tensor = self._local[id(bias)]
            return output + (own if own.dtype == output.dtype else own.to(output.dtype))
        if self._joins_output:
            whole = module.embedding_dim if self._is_embedding else module.out_features
            output = _Join.apply(output, self._group, whole)
        return output

    def _own_ids(self, ids: Tensor) -> Tensor:
        """The ids as places in this rank's rows; those that it does not have are 0."""
        whole = self._module.num_embeddings
        first, count = self._group.first(whole), self._group.sizes(whole)[self._group.rank]
        own = ids - first
        self._outside = (own < 0) | (own >= count)
        return own.masked_fill(self._outside, 0)

    def _put_in_place(self) -> None:
        own = self._module._parameters
        if not self._kept:  # else the last forward pass was interrupted
            self._kept = dict(own)
        for name, p in self._kept.items():
            if p is not None:
                own[name] = self._local[id(p)]
        if self._by_row and not self._is_embedding:
            own["bias"] = None  # is added once, to the sum
        if self._by_row and self._padding_idx is not None:
            at = self._padding_idx - self._group.first(self._module.num_embeddings)
            count = self._group.sizes(self._module.num_embeddings)[self._group.rank]
            self._module.padding_idx = at if 0 <= at < count else None

    def _put_back(self) -> None:
        self._module._parameters.update(self._kept)
        self._kept = {}
        if self._by_row and self._is_embedding:
            self._module.padding_idx = self._padding_idx


def layers_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Return the modules that `parallelize_module` has divided, with their names.

    Raises:
        ConfigurationError: there are some that it has divided or hooked in a way that is not covered.
    """
    for name, module in model.named_modules():
        own = [p for p in module._parameters.values() if p is not None]
        spread = any(type(p.data).__name__ == "DTensor" for p in own)
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        if not spread and not any(map(_is_of_torch, hooks)):
            continue
        plain = (nn.Linear.forward, nn.Embedding.forward)
        if not spread or type(module).forward not in plain:
            raise ConfigurationError(
                f"{name or 'the model'} ({type(module).__name__}) is divided, or its inputs or "
                "outputs are, in a way that is not covered, as by SequenceParallel, "
                f"PrepareModuleInput or a plan of one's own. {_KNOWN} PrepareModuleInput is not "
                "needed between them."
            )
        yield name, module


def _is_of_torch(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(_OF_TORCH)


def _hooks_of(name: str, module: nn.Module) -> tuple[tuple[int, Any], tuple[int, Any]]:
    """The number and the hook that turn a divided module's input into a DTensor, and its output back.

    Raises:
        ConfigurationError: there are others or none.
    """
    before = [(i, h) for i, h in module._forward_pre_hooks.items() if _is_of_torch(h)]
    after = [(i, h) for i, h in module._forward_hooks.items() if _is_of_torch(h)]
    if len(before) != 1 or len(after) != 1:
        raise ConfigurationError(
            f"the parameters of {name!r} are DTensors, and not by one ColwiseParallel or "
            f"RowwiseParallel: it has {len(before)} hooks of torch on its input and {len(after)} on "
            f"its output. {_KNOWN}"
        )
    return before[0], after[0]


def _layouts(name: str, before: Any, after: Any) -> tuple[str, str]:
    """How inputs and outputs are given, as "replicated" or "divided".

    Raises:
        ConfigurationError: in another way, or torch keeps it elsewhere.
    """
    try:
        inputs = inspect.getclosurevars(before).nonlocals["input_fn"].args[0]
        outputs, is_local = inspect.getclosurevars(after).nonlocals["output_fn"].args
        (inputs,), (outputs,) = inputs, outputs
    except (KeyError, AttributeError, ValueError, TypeError, IndexError) as error:
        raise ConfigurationError(
            f"parallelize_module of torch {torch.__version__} is not known: it keeps what it did to "
            f"{name!r} in another way. Use torch 2.13, or train replicated."
        ) from error
    if not is_local:
        raise ConfigurationError(
            f"{name!r} gives its output as a DTensor (use_local_output=False), which is not followed. "
            "Leave use_local_output out; code behind it then sees this rank's part, such as its heads."
        )
    return _word(name, "input_layouts", inputs), _word(name, "output_layouts", outputs)


def _word(name: str, what: str, layout: Any) -> str:
    if layout.is_replicate():
        return "replicated"
    if layout.is_shard(-1):
        return "divided"
    raise ConfigurationError(f"{name!r} has {what}={layout}. {_KNOWN}")


def _is_by_row(name: str, module: Any) -> bool:
    """Whether a module has some inputs (RowwiseParallel), or some outputs (ColwiseParallel)."""
    (layout,) = module.weight.placements
    first = 0 if isinstance(module, nn.Linear) else 1
    if layout.is_shard(first):
        return False
    if layout.is_shard(1 - first):
        return True
    raise ConfigurationError(f"the weight of {name!r} is spread as {layout}. {_KNOWN}")


def _refuse_other(name: str, what: str, found: str, expected: tuple[str, ...]) -> None:
    if found not in expected:
        raise ConfigurationError(
            f"{name!r} has {what} that are divided, and only replicated ones are covered there: give "
            f"its style {what}=Replicate()."
        )


def _refuse_options(name: str, module: Any, by_row: bool) -> None:
    for option in ("max_norm", "scale_grad_by_freq", "sparse"):
        if getattr(module, option):
            raise ConfigurationError(
                f"the embedding {name!r} has {option}={getattr(module, option)}, which is not covered "
                "where it is divided. Leave it out."
            )
