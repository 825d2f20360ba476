"""Parameters that DeepSpeed's ZeRO-3 has partitioned, as the forward passes of an engine use them.

Under ZeRO-3 a parameter is *partitioned*: each rank has a range of its values, and the parameter itself
is empty, of shape [0]. It is *gathered* while a module that owns it runs. A recording needs one object
whose shape stays, and so each trainable parameter has a *stand-in*: a parameter of the whole shape that
is in the module's place for it during the module's forward pass, with the gathered values, and holds
NaN otherwise, so that no value is read by mistake when it was given back. A frozen parameter has
another one each time.

DeepSpeed gathers in front of a forward pass, as always. For the backward it puts functions of its own
around every module, which a recording would have to see through. They are taken off. What autograd
saves of a gathered parameter is noted as a place in the parameter instead, and read again, with a
gather, when the backward asks for it (`restored_on_demand`). All ranks have equally many rows, run the
same graph, and so gather in the same order. In front of each gather, and of each message of sums, they
compare what they are about to read, since a gather that only some take part in would wait for ever,
or mix two parameters of one size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from dptorch.distributed.hidden import hidden
from dptorch.distributed.ranks import Ranks
from dptorch.errors import ConfigurationError, PrivacyError

__all__ = ["StandIns", "is_partitioned", "part_of_rank", "whole_shape"]


def is_partitioned(p: Tensor) -> bool:
    """Whether a parameter is one of ZeRO-3, which may be empty now."""
    return hasattr(p, "ds_tensor")


def whole_shape(p: Tensor) -> torch.Size:
    """Return the shape of a parameter, also of one whose values are elsewhere now."""
    shape: torch.Size = getattr(p, "ds_shape", p.shape)
    return shape


def part_of_rank(p: Any, rank: int) -> tuple[int, int]:
    """[first, end): the coordinates of a partitioned parameter, in its flat form, on a rank."""
    size, numel = p.partition_numel(), p.ds_numel
    return min(rank * size, numel), min((rank + 1) * size, numel)


class _Place(NamedTuple):
    """Where in a parameter what autograd saved lies."""

    parameter: Any
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class StandIns:
    """Puts stand-ins in the place of partitioned parameters while a module runs.

    Args:
        model: the module that ``deepspeed.initialize`` was given.
        parameters: its trainable parameters, by name.
        offload: DeepSpeed's ``parameter_offload``, whose hooks gather.
        ranks: the processes that have the parts.

    Attributes:
        by_name: parameter name -> its stand-in, or the parameter itself if it is whole.

    Guarantees:
        A backward has the values that the forward pass had, whether they were freed between or not
        (`test_ranks_under_zero_take_the_step_of_one_process`). Where ranks would read different
        parameters, all raise (`test_ranks_that_would_wait_for_ever_raise_instead`).

    Raises:
        ConfigurationError: there are stand-ins already.
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, Tensor], offload: Any, ranks: Ranks
    ) -> None:
        self._ranks = ranks
        self._names = ["no parameter", *(name for name, _ in model.named_parameters())]
        self._numbers = {id(p): i for i, p in enumerate(model.parameters(), 1)}
        self.by_name = {n: _stand_in(p) for n, p in parameters.items()}
        self._stand_ins = {id(p): self.by_name[n] for n, p in parameters.items()}
        #: address of a storage -> the gathered parameters in it, with their values, which so stay
        #: there as long as they are listed.
        self._gathered: dict[int, list[tuple[Any, Tensor]]] = {}
        #: of the modules that run, innermost last: what was replaced in each.
        self._running: list[tuple[nn.Module, list[tuple[str, Any, Tensor]]]] = []
        self._latest: tuple[Any, Tensor] | None = None
        if not offload.backward_hooks:
            raise ConfigurationError(
                "this DeepSpeed engine was given to a privacy engine before, which has changed how its "
                "backward reads parameters. Call deepspeed.initialize again for another."
            )
        _use_torchs_linear()
        for handle in [offload.fwd_pre_hook, *offload.forward_hooks]:
            _hide(handle)
        for handle in offload.backward_hooks:
            handle.remove()
        offload.backward_hooks.clear()
        for module in model.modules():
            if any(map(is_partitioned, module.parameters(recurse=False))):
                # After DeepSpeed has gathered, and before it partitions again.
                module.register_forward_pre_hook(self._before)
                module.register_forward_hook(self._after, prepend=True, always_call=True)

    def _before(self, module: nn.Module, _: Any) -> None:
        with torch._C.DisableTorchFunction():
            replaced = []
            for name, p in list(module._parameters.items()):
                if p is None or not is_partitioned(p):
                    continue
                if p.shape != whole_shape(p):
                    raise ConfigurationError(
                        f"DeepSpeed has not gathered the parameter {name!r} of {type(module).__name__} "
                        "for its forward pass. Call the model that deepspeed.initialize returned."
                    )
                values = p.data
                replaced.append((name, p, values))
                self._gathered.setdefault(_address(values), []).append((p, values))
                if (stand_in := self._stand_ins.get(id(p))) is not None:
                    stand_in.data = values
                else:  # What is computed again in a backward keeps it, when `p` is empty already.
                    stand_in = nn.Parameter(values, requires_grad=False)
                module._parameters[name] = stand_in  # type: ignore[assignment]
            self._running.append((module, replaced))

    def _after(self, module: nn.Module, *_: Any) -> None:
        with torch._C.DisableTorchFunction():
            while self._running:  # those inside that ended with an error too
                ended, replaced = self._running.pop()
                for name, p, values in replaced:
                    self._put_back(ended, name, p, values)
                if ended is module:
                    break

    def _put_back(self, module: nn.Module, name: str, p: Any, values: Tensor) -> None:
        module._parameters[name] = p
        listed = self._gathered[_address(values)]
        listed.remove(next(each for each in listed if each[0] is p))
        if not listed:
            del self._gathered[_address(values)]
        if id(p) in self._stand_ins and not any(q is p for q, _ in listed):
            self._stand_ins[id(p)].data = _nothing(p)

    @contextmanager
    def restored_on_demand(self) -> Iterator[None]:
        """In this context autograd keeps no values of gathered parameters: its backward reads them
        from the ranks again."""
        with saved_tensors_hooks(self._noted, self._read):
            yield

    def _noted(self, t: Tensor) -> Tensor | _Place:
        with torch._C.DisableTorchFunction():
            if type(t) not in (Tensor, nn.Parameter) or t.layout is not torch.strided:
                return t
            for p, values in self._gathered.get(_address(t), ()):
                offset = int(t.storage_offset() - values.storage_offset())
                if 0 <= offset < values.numel() and t.dtype == values.dtype:
                    return _Place(p, t.size(), t.stride(), offset)
            return t

    def _read(self, noted: Tensor | _Place) -> Tensor:
        if isinstance(noted, Tensor):
            return noted
        p, size, stride, offset = noted
        with torch._C.DisableTorchFunction(), torch.no_grad():
            if self._latest is None or self._latest[0] is not p:
                self._latest = None
                if p.shape != whole_shape(p):
                    self._meet(self._numbers[id(p)])
                self._latest = p, _values(p)
            values = self._latest[1]
            return values.as_strided(size, stride, values.storage_offset() + offset)

    def read_nothing(self) -> None:
        """Keep no values that a backward has read; the ranks are about to send something else.

        Raises:
            PrivacyError: another rank is about to read a parameter.
        """
        self._latest = None
        self._meet(0)

    def _meet(self, number: int) -> None:
        """Check that all ranks are about to read the parameter of this number; 0 for none."""
        found = self._ranks.gather_rows(torch.tensor([number])).flatten().tolist()
        if len(set(found)) > 1:
            self._ranks.wait_for_all()
            raise PrivacyError(
                "the ranks are at different places of a backward pass, which under ZeRO-3 reads "
                f"parameters from all of them. By rank they need "
                f"{', '.join(self._names[n] for n in found)}. What a model computes may not depend on "
                "the rank or on its examples, such as a layer that is left out for some of them. "
                "Nothing was released. Use ZeRO-2, which has all parameters on each rank."
            )


def _values(p: Any) -> Tensor:
    """All values of a parameter, which is as it was before."""
    if p.shape == whole_shape(p):
        values: Tensor = p.data
        return values
    p.all_gather()
    values = p.data
    p.partition()
    return values


def _address(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _stand_in(p: Tensor) -> Tensor:
    return nn.Parameter(_nothing(p)) if is_partitioned(p) else p


def _nothing(p: Tensor) -> Tensor:
    """NaN in the shape of a parameter, without its memory."""
    return torch.full((), torch.nan, dtype=p.dtype, device=p.device).expand(whole_shape(p))


def _use_torchs_linear() -> None:
    """Undo that DeepSpeed has replaced torch.nn.functional.linear, for the whole process, by a function
    whose backward gathers: what it saves is read on demand here, and torch's own has a rule."""
    from deepspeed.runtime.zero import partition_parameters as theirs

    if nn.functional.linear is theirs.zero3_linear_wrap:
        nn.functional.linear = theirs.InsertPostInitMethodToModuleSubClasses.linear_bk


def _hide(handle: Any) -> None:
    """Keep a hook of DeepSpeed's, which moves memory, out of recordings."""
    hooks = handle.hooks_dict_ref()
    if hooks is not None and handle.id in hooks:
        hooks[handle.id] = hidden(hooks[handle.id])
