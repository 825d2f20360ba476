"""Where an op leaves the examples: by the table, or by the core operators that it is made of.

An op that is not in the table is run a second time, on detached operands, under a dispatch mode. Torch
takes it apart into operators that are; where an operator is not, torch's own decomposition of it is
tried. So what is unknown is one of the core operators or a custom one. Only unknown ops pay for this:
they run twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dptorch.errors import NotCoveredError
from dptorch.tape.propagation.table import FAMILIES, Found, find
from dptorch.tape.provenance.aliases import Aliases
from dptorch.tape.provenance.calls import (
    Call,
    canonical_name,
    each_tensor,
    replace_tensors,
    words,
)
from dptorch.tape.provenance.loss_reduction import follow_loss
from dptorch.tape.provenance.tags import Lost, Mixed, Reduced, State, Tag, complete

__all__ = ["infer"]

# Joins and look-ups, whose operands may each be one whole example; and ops that look at more than
# the values of their operands.
_SEVERAL_EXAMPLES = words(
    """stack cat column_stack hstack vstack pad_sequence batch_norm broadcast_tensors"""
)
# Reads and writes by number, where single examples meet several of which they may be one.
_BY_NUMBER = words(
    """__getitem__ index _unsafe_index index_select gather take_along_dim index_add index_copy
    index_fill index_reduce scatter scatter_add scatter_reduce index_put _index_put_impl
    _unsafe_index_put masked_scatter"""
)

_LOOKUPS = words("embedding embedding_bag")
_UNKNOWN = "the op has no provenance rule; declare it with dptorch.tape.rowwise if it is one"


def infer(call: Call, outputs: Sequence[Any]) -> list[Found]:
    """The tag (or reduction) of each output.

    Raises:
        Lost: if the examples meet, or the op has no rule and cannot be opened.
        NotCoveredError: it rewrites its table of constants by what the examples look up.
    """
    if call.name in _LOOKUPS and call.arg("max_norm") is not None:
        raise NotCoveredError(
            f"'{call.name}' with max_norm rewrites the rows of its table that the batch looks up, so "
            "that the weights show which those are, without noise. Use max_norm=None, and shorten rows "
            "once, before training: with torch.no_grad(): weight.renorm_(2, 0, max_norm)."
        )
    result = _by_table(call, outputs)
    return _opened(call, outputs) if result is None else result


def _by_table(call: Call, outputs: Sequence[Any]) -> list[Found] | None:
    """None where the table does not know the op, or not with these operands."""
    tagged = call.tagged
    several = call.name in _SEVERAL_EXAMPLES or call.name in _BY_NUMBER
    for _, tag in tagged:
        if tag.dim is None and (call.batch_size == 1 or not several):
            if call.name == "batch_norm":
                family = find("batch_norm")
                assert family is not None
                family(call, outputs)
            if any(other is not tag and other != tag for _, other in tagged):
                if _adds_losses(call):
                    return [Reduced("sum")] * len(outputs)
                raise Lost("different examples meet")
            return [tag] * len(outputs)
    found = FAMILIES.get(call.name) or find(call.name)
    result = NotImplemented if found is None else found(call, outputs)
    if type(result) is Tag:
        return [result] * len(outputs)
    if result is NotImplemented:
        return None
    results = result if isinstance(result, list) else [result] * len(outputs)
    if any(isinstance(r, Reduced) for r in results) and not all(complete(t) for _, t in tagged):
        raise Lost("rows that belong to no example are summed with the examples")
    return results


def _adds_losses(call: Call) -> bool:
    """Whether two losses are added, each of one example: ``sum(losses)`` of a list."""
    plain = call.name == "add" and call.arg("alpha", 1) == 1
    return plain and all(t.numel() == 1 and t.requires_grad for t, _ in call.tagged)


def _opened(call: Call, outputs: Sequence[Any]) -> list[Found]:
    """The tags of the outputs of an op that is opened into core operators."""
    if call.in_place:
        raise Lost(_UNKNOWN)
    mode = _Opening(call)
    table = {id(t): t.detach() for t in each_tensor(call.args, call.kwargs)}
    for t, tag in call.tagged:
        mode.mark(table[id(t)], tag)
    args = tuple(replace_tensors(a, table) for a in call.args)
    kwargs = {k: replace_tensors(v, table) for k, v in call.kwargs.items()}
    with torch.no_grad(), _same_random_numbers(call), mode:
        result = call.func(*args, **kwargs)
    results = result if isinstance(result, (tuple, list)) else (result,)
    found: list[Found] = []
    for o, _ in zip(results, outputs, strict=True):
        if not mode.opened and isinstance(o, Tensor) and mode.state(o) is None:
            raise Lost(_UNKNOWN)  # nothing was seen, and it is none of the operands
        state = mode.state(o) if isinstance(o, Tensor) else None
        if isinstance(state, Mixed):
            raise Lost(state.reason)
        assert state is None or isinstance(state, (Tag, Reduced))
        found.append(state)
    return found


@contextmanager
def _same_random_numbers(call: Call) -> Iterator[None]:
    """Running the op again changes no generator."""
    devices = {t.device for t in each_tensor(call.args, call.kwargs) if t.device.type != "cpu"}
    given = [g for g in (*call.args, *call.kwargs.values()) if isinstance(g, torch.Generator)]
    before = [g.get_state() for g in given]
    kind = next(iter(devices)).type if devices else "cuda"
    with torch.random.fork_rng(list(devices), device_type=kind):
        yield
    for g, state in zip(given, before, strict=True):
        g.set_state(state)


class _Opening(TorchDispatchMode):
    """Follows the examples through the core operators of one op.

    Attributes:
        opened: whether any operator was seen.
    """

    def __init__(self, call: Call) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.opened = False
        self._batch_size = call.batch_size
        self._name = call.name
        self._aliases = Aliases()
        # Each tensor is kept, so that its number is not used again.
        self._states: dict[int, tuple[Tensor, State | None, int]] = {}

    def state(self, t: Tensor) -> State | None:
        """What is known of a tensor, or None for a constant."""
        _, state, clock = self._states.get(id(t), (t, None, 0))
        if clock < self._aliases.clock:
            state = self._aliases.now(t, clock, state, self._batch_size)
        return state

    def mark(self, t: Tensor, state: State | None) -> None:
        """Say what a tensor is."""
        self._states[id(t)] = t, state, self._aliases.clock

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        self.opened = True
        known = [(t, self.state(t)) for t in each_tensor(args, kwargs)]
        tagged = [(t, s) for t, s in known if isinstance(s, Tag)]
        after = [s for _, s in known if isinstance(s, (Mixed, Reduced))]
        if not tagged and not after:
            return func(*args, **kwargs)
        name = canonical_name(func)
        if name in ("_local_scalar_dense", "item"):
            raise Lost(f"'{self._name}' decides by the values of the batch what it does")
        written = func._schema.is_mutable
        call = Call(func, name, args, kwargs, tagged, [], self._batch_size, written)
        if not after and find(call.name) is None and not written:
            opened = _decomposition(func)
            if opened is not None:
                with self:
                    return opened(*args, **kwargs)
        out = func(*args, **kwargs)
        outputs = out if isinstance(out, (tuple, list)) else (out,)
        states = self._follow(call, outputs, after)
        for o, state in zip(outputs, states, strict=True):
            if not isinstance(o, Tensor):
                continue
            if written:
                before = self.state(o)
                if before != state:
                    self._aliases.wrote(o, before, state, self._batch_size)
            if written or not any(o is t for t, _ in known):
                self.mark(o, state)
        return out

    def _follow(
        self, call: Call, outputs: Sequence[Any], after: list[Mixed | Reduced]
    ) -> Sequence[State | None]:
        lost = next((s for s in after if isinstance(s, Mixed)), None)
        if lost is None and after:
            state = follow_loss(
                call.name,
                call.args,
                call.kwargs,
                [s for s in after if isinstance(s, Reduced)],
                examples=call.tagged,
                is_loss=lambda t: isinstance(t, Tensor) and isinstance(self.state(t), Reduced),
                where=lambda: f"'{self._name}'",
            )
            return [state] * len(outputs)
        if lost is None:
            try:
                found = _by_table(call, outputs)
                if found is not None:
                    return found
                reason = _UNKNOWN
            except Lost as error:
                reason = str(error)
            inside = "" if call.name == self._name else f"inside it, in '{call.name}', "
            lost = Mixed(f"{inside}{reason}")
        return [lost] * len(outputs)


def _decomposition(func: Any) -> Callable[..., Any] | None:
    """Torch's own way to write an operator with others. The table takes seconds to import."""
    from torch._decomp import decomposition_table

    found: Callable[..., Any] | None = decomposition_table.get(func)
    return found
