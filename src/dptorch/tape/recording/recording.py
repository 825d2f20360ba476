"""Record a model: see every torch function, detach and tap every trainable parameter.

While a `Recording` is active a `TorchFunctionMode` sees every torch function. An op that takes a
trainable parameter is run with the parameter detached and its output is tapped (`rules`); any other
op runs as it is, and the place of the examples in its result is worked out (`propagation`).
Autograd therefore carries gradients through activations natively and never builds a batch-summed
weight gradient.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dptorch.errors import NotCoveredError
from dptorch.tape.gradients import Dense
from dptorch.tape.gradients.parameter_guard import ParameterGuard
from dptorch.tape.gradients.scatter import looked_up
from dptorch.tape.gradients.tape import Tape, TapeConfig, TapeListener
from dptorch.tape.propagation import FAMILIES, infer
from dptorch.tape.provenance.calls import INFO, Call, Info, each_tensor, info, words
from dptorch.tape.provenance.ordering import KEEP_ORDER, USE_ORDER, order_of
from dptorch.tape.provenance.tags import (
    PARAM_ONLY,
    Lost,
    Mixed,
    Order,
    ParamOnly,
    Reduced,
    State,
    Tag,
    complete,
    param_only_state,
)
from dptorch.tape.recording import backward, backward_code  # noqa: F401 (fill SPECIAL)
from dptorch.tape.recording.after_batch import after_the_batch, leaves
from dptorch.tape.recording.assignment import assign, assign_parameter, fill
from dptorch.tape.recording.batches import Batch
from dptorch.tape.recording.composites import is_composite, without_checks
from dptorch.tape.recording.escapes import judge_results, judge_slices, note_error
from dptorch.tape.recording.finite_checks import CHECKS, note_check
from dptorch.tape.recording.handlers import SPECIAL, reorder
from dptorch.tape.recording.in_front import refuse_leaf, refuse_not_followed
from dptorch.tape.recording.parameter_graph import parameters_behind
from dptorch.tape.recording.position_means import MEANS, judge_sum, note_mean
from dptorch.tape.recording.read_numbers import read_numbers
from dptorch.tape.recording.taps import lift, reduce_to, tap, tap_inside
from dptorch.tape.recording.tensor_states import TensorStates
from dptorch.tape.recording.unknown_rows import rows_of_unknown
from dptorch.tape.recording.unseen import watch
from dptorch.tape.recording.value_sizes import SIZES_MADE, follow_sizes, plain_sizes, read_size
from dptorch.tape.rules import HALF, LOSSES, RULES, generic, mean_in_float32
from dptorch.tape.rules.recorder import Gradients, Inside, WrittenOut

__all__ = ["Recording", "active_modes", "innermost"]

# Ops whose further operands lend no more than their shape or type.
_LIKE_OTHER = words("""expand_as view_as reshape_as type_as to""")


class Recording(TorchFunctionMode):
    """One recorded forward pass; enter it to record.

    Args:
        model: names modules and parameters in messages.
        parameters: the trainable parameters to follow, by name. Ones that do not require grad are
            constants and cost nothing.
        config, guard, listener: of the tape.
        batch: the rows that the forward pass is made on; by default those of its first input.
        strict: whether a trainable parameter that is not followed is refused. Otherwise it is a
            constant: what runs before or beside the model, on data that the loader handed out.
        is_probe: whether a model that is trained runs once more, so that its reads are refused though
            no parameter is followed.

    Attributes:
        tape: filled when gradients arrive.
        states: what is known of each tensor.
        generic_ops: how often each op went through the generic rule, by (op, parameter names).
        sites: how often an op met a parameter.
        escaped: how often trusted code read values of the batch into Python, by op and module.
        handle_of_taps: differentiating an output with respect to it reaches every tap.
        joined: tapes of other models whose outputs entered the same loss.
        retained: activations that keep their gradient, until the model returns.
        error: the first that the forward pass met.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, Tensor] | None = None,
        config: TapeConfig | None = None,
        *,
        guard: ParameterGuard | None = None,
        listener: TapeListener | None = None,
        batch: Batch | None = None,
        strict: bool = True,
        is_probe: bool = False,
    ) -> None:
        super().__init__()
        if parameters is None:
            parameters = dict(model.named_parameters())
        followed = {n: p for n, p in parameters.items() if p.requires_grad}
        self.tape = Tape(followed, config, guard=guard, listener=listener)
        self.states = states = TensorStates(
            model, Batch() if batch is None else batch, strict=strict
        )
        self.state = states.state
        self.mark = states.mark
        self.mark_written = states.mark_written
        self.note_trained = states.note_trained
        self.note_own_leaf = states.note_own_leaf
        self.module_path = states.module_path
        self.statistic = states.statistic
        self.strict = strict
        self.is_probe = is_probe
        self.generic_ops: Counter[tuple[str, str]] = Counter()
        self.sites = 0
        self.escaped: Counter[str] = Counter()
        self.joined: list[Tape] = []
        self.retained: list[Tensor] = []
        self.error: Exception | None = None
        self._unwatch: list[Callable[[], None]] = []
        self._followed = self.tape.names
        self.handle_of_taps = torch.zeros(0, requires_grad=True)

    def __enter__(self) -> Recording:
        self.states.depth += 1
        self._unwatch.append(watch(innermost))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *args: Any) -> None:
        self.states.depth -= 1
        self._unwatch.pop()()
        super().__exit__(*args)  # type: ignore[no-untyped-call]

    @property
    def batch_size(self) -> int:
        """Number of examples B; 0 until a batch was tagged."""
        return self.states.batch.size

    @property
    def refuses_reads(self) -> bool:
        """Whether reads of statistics are refused: in a training forward, in code of its backward."""
        watched = bool(self._followed) or self.is_probe
        return self.states.depth > 0 and self.strict and watched

    def tag_batch(self, t: Tensor, dim: int = 0) -> Tensor:
        """As `TensorStates.tag_batch`; the tape is told the number of examples."""
        used = self.states.tag_batch(t, dim)
        self.tape.note_batch(self.batch_size)
        return used

    def spend_batch(self) -> None:
        """Note that a backward goes through the forward pass."""
        self.states.batch.spent = True

    def untransposed(self, p: Tensor) -> tuple[Tensor, bool]:
        """(the parameter that `p` is the transpose of, True), or (p, False)."""
        state = self.state(p)
        if isinstance(state, ParamOnly) and state.transposed is not None:
            return state.transposed, True
        return p, False

    def describe(self, p: Tensor) -> str:
        """A parameter's name, for messages."""
        name = self.tape.names.get(id(p))
        return (
            f"parameter '{name}'" if name else f"a tensor computed from parameters {tuple(p.shape)}"
        )

    # -- what rules call ---------------------------------------------------------------------------

    def tap(
        self, call: Call, out: Any, tags: list[Tag], saved: Sequence[Tensor], gradients: Gradients
    ) -> Any:
        """Record a site with one output."""
        return self.tap_many([out], tags, saved, gradients)[0]

    def tap_many(
        self,
        outputs: Sequence[Tensor],
        tags: Sequence[Tag],
        saved: Sequence[Tensor],
        gradients: Gradients,
    ) -> tuple[Tensor, ...]:
        """Record a site: `gradients` gets the outputs' gradients and `saved`, in the backward."""
        tape = self.tape
        for t in (*outputs, *saved):
            tape.note_size(t.nbytes)

        def on_gradient(grads: Sequence[Tensor | None], kept: Sequence[Tensor]) -> None:
            for parameter, form in gradients(grads, kept):
                tape.add(parameter, form)

        tapped = tap(outputs, saved, self.handle_of_taps, on_gradient)
        for t, tag in zip(tapped, tags, strict=True):
            self.mark(t, tag)
        return tapped

    def tap_inside(
        self, op: WrittenOut, inputs: Sequence[Tensor], gradients: Inside
    ) -> tuple[Tensor, ...]:
        """Run an op with gradients inside it, whose outputs the rule marks."""
        tape = self.tape

        def on_gradient(inner: Any) -> None:
            for parameter, form in gradients(inner):
                tape.add(parameter, form)

        outputs = tap_inside(op, inputs, self.handle_of_taps, on_gradient)
        for t in (*inputs, *outputs):
            tape.note_size(t.nbytes)
        return outputs

    def lift(self, p: Tensor, shape: Sequence[int], tag: Tag) -> Tensor:
        """Replace a parameter by a copy of `shape`, whose batch dimension is given by `tag`."""
        state = self.state(p)
        source = p
        if isinstance(state, ParamOnly) and state.source is not None:
            source = state.source  # expanded to the batch by the model: take it before that
            state = self.state(source)
        n, tape = self.states.batch.size, self.tape
        found = state.looked_up if isinstance(state, ParamOnly) else None
        of, form = (source, Dense) if found is None else looked_up(*found, n)
        if of is not p:
            tape.note_use(of)

        def on_gradient(g: Tensor) -> None:
            tape.add(of, form(reduce_to(g, source.shape, tag, n)))

        return lift(source, shape, self.handle_of_taps, on_gradient)

    def note_generic(self, call: Call) -> None:
        """Note that an op has no rule of its own."""
        names = ", ".join(self.tape.names.get(id(p), "(derived)") for p in call.parameters)
        self.generic_ops[call.name, names] += 1

    # -- dispatch ----------------------------------------------------------------------------------

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return self.handle(func, args, kwargs or {})

    def handle(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Run one torch function and keep track of it."""
        try:
            known = INFO[func]
        except (KeyError, TypeError):  # met for the first time; unhashable
            known = info(func)
        if known.passive:
            if SIZES_MADE:
                return read_size(self, known.name, func, args, kwargs)
            return func(*args, **kwargs)
        given: Mixed | bool = False
        if SIZES_MADE:
            args, kwargs, given = plain_sizes(self, known.name, args, kwargs)
        try:
            special = SPECIAL.get(known.name)
            if special is not None:
                out = special(self, func, known.name, args, kwargs)
            else:
                if known.name in ("__getitem__", "__setitem__"):
                    judge_slices(self, args[1])
                out = self._dispatch(known, func, args, kwargs, given)
                if not isinstance(out, Tensor):
                    judge_results(self, known.name, args, kwargs, out)
        except Exception as error:
            note_error(self, error, args, kwargs)
            raise
        if SIZES_MADE or known.sizes_by_values:
            follow_sizes(self, known.name, args, kwargs, out, bool(given))
        return out

    def _dispatch(
        self,
        known: Info,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        given: Mixed | bool,
    ) -> Any:
        """Dispatch on what the function is and on what its operands are, numbers included: `given`."""
        name = known.name
        if known.in_place and name in ("zero", "fill") and not self.states.depth:
            out = fill(self, func, args, kwargs)
            if out is not NotImplemented:
                return out
        tagged, parameters, lost, ordering = self._classify(name, args, kwargs)
        if given and isinstance(given, Mixed):
            lost = given
        if torch._C._functorch.peek_interpreter_stack() is not None:
            self.states.refuse_vmap(name, each_tensor(args, kwargs))
        if ordering and lost is None:
            if name in KEEP_ORDER and not tagged and not parameters:
                return reorder(self, func, args, kwargs)
            if name not in USE_ORDER:
                lost = Mixed(f"{self.module_path()}: '{name}' looks at the order of the examples.")
        if read_numbers.latest and (tagged or isinstance(lost, Reduced)):
            lost = read_numbers.among(name, args, kwargs, tagged, self.states) or lost
        if lost is not None:
            return after_the_batch(self, known, func, args, kwargs, tagged, parameters, lost)
        if not tagged:
            return self._without_examples(name, func, args, kwargs, parameters)
        if name not in FAMILIES and name not in RULES and is_composite(func):
            return self._decompose(func, args, kwargs)
        call = Call(
            func,
            name,
            args,
            kwargs,
            tagged,
            list(parameters.values()) if parameters else [],
            self.states.batch.size,
            known.in_place,
        )
        if parameters:
            return self._site(call)
        if name == "__setitem__":
            assign(call, self)
            return None
        if name in LOSSES and torch.is_grad_enabled():
            out = LOSSES[name](call, self)
            if out is not NotImplemented:
                if name in MEANS:
                    note_mean(call, out, self)
                return out
        out = func(*args, **kwargs)
        self._propagate(call, out)
        if name in MEANS:
            note_mean(call, out, self)
        if isinstance(out, Tensor) and out.dtype in HALF:
            return mean_in_float32(call, self, out)
        return out

    def _classify(
        self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[list[tuple[Tensor, Tag]], dict[int, Tensor], Mixed | Reduced | None, bool]:
        """Sort the operands: (with a tag, parameters by id, what lost its examples, any order?)."""
        tagged: list[tuple[Tensor, Tag]] = []
        parameters: dict[int, Tensor] = {}
        lost: Mixed | Reduced | None = None
        ordering = False
        leaf: Tensor | None = None
        tensors = each_tensor(args, kwargs)
        if name in _LIKE_OTHER:
            tensors = tensors[:1]
        out_argument = kwargs.get("out") if kwargs else None
        for t, state in zip(tensors, self.states.known(tensors), strict=True):
            if t is out_argument:
                continue
            if type(state) is Tag:
                tagged.append((t, state))
            elif state is None:
                if t.requires_grad and torch.is_grad_enabled():
                    if self._is_parameter(t, name):
                        parameters[id(t)] = t
                    elif self.strict:
                        leaf = t
            elif isinstance(state, ParamOnly):
                if t.requires_grad and torch.is_grad_enabled():
                    parameters[id(t)] = t
            elif isinstance(state, Order):
                ordering = True
            elif lost is None or isinstance(state, Mixed):
                lost = state  # type: ignore[assignment]
        if leaf is not None and (tagged or lost is not None):
            refuse_leaf(self.states, name, leaf)
        if out_argument is not None and parameters:
            raise NotCoveredError(
                f"{self.module_path()}: '{name}' writes into out= and takes "
                f"{self.describe(next(iter(parameters.values())))}. PyTorch has no gradient for "
                "out=; assign the result instead."
            )
        if tagged and len(tensors) > len(tagged) and not self.states.depth:
            rows, mixed = rows_of_unknown(self.states, name, tensors, tagged)
            tagged, lost = tagged + rows, lost or mixed
        return tagged, parameters, lost, ordering

    def _without_examples(
        self,
        name: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        parameters: dict[int, Tensor],
    ) -> Any:
        """An op on constants and parameters."""
        out = func(*args, **kwargs)
        if parameters:
            self.tape.note_derived(parameters.keys() & self._followed.keys())
            state = param_only_state(name, args, kwargs, out, self._followed)
            for o in leaves(out if name != "__setitem__" else args[0]):
                if o.requires_grad and id(o) not in self._followed:
                    self.mark(o, state)
        return out

    def _is_parameter(self, t: Tensor, name: str) -> bool:
        if id(t) in self._followed:
            return True
        if not self.strict:
            return False
        if isinstance(t, nn.Parameter) and not self.states.drop_own_leaf(t):
            refuse_not_followed(self.states, name, t)
        if t.is_leaf:
            return False  # of an op without examples; else see `refuse_leaf`
        behind = parameters_behind(t, self._followed, self.states)
        if behind is None:
            refuse_not_followed(self.states, name, t)
        if behind:
            self.tape.note_derived(behind)
            self.mark(t, PARAM_ONLY)
        return bool(behind)

    def _site(self, call: Call) -> Any:
        """An op that takes both examples and a parameter."""
        for p in call.parameters:
            self.tape.note_use(self.untransposed(p)[0])
        self.sites += 1
        return self._with_rule(call)

    def _with_rule(self, call: Call) -> Any:
        found = None if any(p.is_complex() for p in call.parameters) else RULES.get(call.name)
        try:
            if not all(complete(tag) for _, tag in call.tagged):
                raise Lost("rows that belong to no example yet meet a parameter")
            if call.name == "__setitem__":
                return assign_parameter(call, self)
            if call.in_place and found is not RULES["add"]:
                return generic(call, self)
            result = found(call, self) if found is not None else NotImplemented
            return generic(call, self) if result is NotImplemented else result
        except Lost as lost:
            names = ", ".join(self.describe(p) for p in call.parameters)
            raise NotCoveredError(
                f"{self.module_path()}: {names} used in '{call.name}', where {lost}."
            ) from None

    def _propagate(self, call: Call, out: Any) -> None:
        if call.name in CHECKS:
            note_check(call.name, call.first, out)
        outputs: Sequence[Any] = (out,)
        if not isinstance(out, Tensor):
            if isinstance(out, (tuple, list)):
                outputs = out
            if not any(isinstance(o, Tensor) for o in outputs):
                if not call.in_place:
                    return
                outputs = each_tensor(call.args, call.kwargs)  # _foreach_add_(list, ...)
        try:
            states: Sequence[State | None] = order_of(call) or infer(call, outputs)
        except Lost as lost:
            mixed = Mixed(f"{self.module_path()}: examples meet in '{call.name}': {lost}.")
            states = [mixed] * len(outputs)
        first = call.args[0] if call.args else None
        written = call.in_place or call.kwargs.get("out") is not None
        for o, state in zip(outputs, states, strict=True):
            if not isinstance(o, Tensor):
                continue
            if type(state) is Reduced:
                state = judge_sum(self, call, state, o)
            if written or o is first:
                before = self.state(o)
                if before != state and not (before is None and state is None):
                    self.mark_written(o, before, state)
            elif state is not None:
                self.mark(o, state)

    def _decompose(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Run a Python-level torch function so that the ops inside it are seen."""
        if self in active_modes():
            return without_checks(func)(*args, **kwargs)
        with self:
            return without_checks(func)(*args, **kwargs)


def active_modes() -> list[Any]:
    """The torch function modes that are on, outermost first."""
    return list(torch.overrides._get_current_function_mode_stack())


def innermost() -> Recording | None:
    """The recording that is active in this thread."""
    return next((m for m in reversed(active_modes()) if isinstance(m, Recording)), None)
