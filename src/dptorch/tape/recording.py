"""Watching a model run: every torch function is seen, every trainable parameter is detached.

While a `Recording` is active a `TorchFunctionMode` sees every torch function. An op that takes a
trainable parameter is run with the parameter detached and its output is tapped (`rules`); any other
op runs as it is, and the place of the examples in its result is worked out (`propagation`).
Autograd therefore carries gradients through activations natively and never builds a batch-summed
weight gradient.
"""

from __future__ import annotations

import sys
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dptorch.errors import ConfigurationError, ExamplesMixError, NotCoveredError
from dptorch.tape.calls import Call, canonical_name, each_tensor
from dptorch.tape.gradients import Dense, PerExampleGradient
from dptorch.tape.propagation import FAMILIES, infer
from dptorch.tape.provenance import (
    PARAM_ONLY,
    Lost,
    Mixed,
    ParamOnly,
    Reduced,
    State,
    Tag,
    read_shadow,
    rows,
    separate,
    shadow,
)
from dptorch.tape.rules import LOSSES, RULES, generic
from dptorch.tape.tape import Tape
from dptorch.tape.taps import lift, tap

__all__ = ["Recording", "active_modes"]

_STATE = "_dptorch_state"

# Functions that make no tensor of the batch, or none that matters.
_PASS = frozenset(
    """size dim ndimension numel nelement stride is_floating_point is_complex element_size item
    tolist numpy data_ptr is_contiguous storage_offset untyped_storage storage is_same_size
    get_device register_hook retain_grad register_post_accumulate_grad_hook requires_grad is_tensor
    is_nonzero result_type can_cast is_storage is_inference is_grad_enabled is_signed has_names
    is_conj is_neg is_pinned is_shared promote_types broadcast_shapes _assert_async is_set_to
    new_tensor new_zeros new_ones new_empty new_full new_empty_strided arange zeros ones empty full
    linspace eye tensor as_tensor scalar_tensor randint randperm rand randn set autograd_backward
    __len__ __bool__ __int__ __float__ __complex__ __index__ __repr__ __format__ __hash__ __str__
    __array__ __array_wrap__ __contains__ __dir__ __reduce_ex__ __setstate__ __set__ __delete__
    __dlpack__ __dlpack_device__""".split()
)
_TENSOR_PROPERTIES = frozenset({".T", ".mT", ".H", ".mH", ".data", ".real", ".imag"})
_OVERRIDE_CHECKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")

Gradients = Callable[
    [Sequence[Tensor | None], Sequence[Tensor]], Iterable[tuple[Tensor, PerExampleGradient]]
]


class Recording(TorchFunctionMode):
    """The state of one recorded forward pass; enter it to record.

    Args:
        model: names modules and parameters in messages.
        parameters: the trainable parameters to follow, by name. Ones that do not require grad are
            constants and cost nothing.

    Attributes:
        tape: filled when gradients arrive.
        generic_ops: how often each op went through the generic rule, by (op, parameter names).
        escaped: how often floating-point values of the batch were read into Python, by op.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.model = model
        if parameters is None:
            parameters = dict(model.named_parameters())
        self.tape = Tape({n: p for n, p in parameters.items() if p.requires_grad})
        self.batch_size = 0
        self.generic_ops: Counter[tuple[str, str]] = Counter()
        self.escaped: Counter[str] = Counter()
        self._followed = self.tape.names
        self._handle = torch.zeros(0, requires_grad=True)
        self._token = object()  # a tensor's state counts in the recording that gave it

    # -- states -----------------------------------------------------------------------------------

    def state(self, t: Tensor) -> State | None:
        """What is known of a tensor, or None for a constant."""
        entry = getattr(t, _STATE, None)
        return entry[1] if entry is not None and entry[0] is self._token else None

    def mark(self, t: Any, state: State) -> None:
        """Say what a tensor is. A mixed tensor raises if a gradient ever passes it."""
        if not isinstance(t, Tensor):
            return
        setattr(t, _STATE, (self._token, state))
        if isinstance(state, Mixed) and t.requires_grad and not t.is_leaf:
            reason = state.reason

            def poison(_: Tensor) -> None:
                raise ExamplesMixError(reason)

            t.register_hook(poison)

    def tag_batch(self, t: Tensor, dim: int = 0) -> Tensor:
        """Declare that the examples of the batch lie along `dim` of `t`; returns the tensor to use.

        Raises:
            ConfigurationError: if the size disagrees with another input's.
        """
        size = t.shape[dim]
        if self.batch_size and size != self.batch_size:
            raise ConfigurationError(
                f"an input of shape {tuple(t.shape)} has {size} examples along dimension {dim}, "
                f"another had {self.batch_size}. Inputs of one forward pass must hold the same "
                "examples; name the batch dimension of each with batch_dims=, None for inputs "
                "that are not batched."
            )
        if size == 0:
            raise ConfigurationError(
                "the batch is empty. An empty Poisson batch is a step of its own: use the engine's "
                "loader, which turns it into a padding example of weight zero."
            )
        self.batch_size = self.tape.batch_size = size
        if getattr(t, _STATE, None) is not None or isinstance(t, nn.Parameter):
            with torch._C.DisableTorchFunction():
                t = t.view_as(t)  # another recording's tensor keeps its own state
        self.mark(t, Tag(dim % t.dim()) if size > 1 else Tag(None, 0))
        return t

    def untransposed(self, p: Tensor) -> tuple[Tensor, bool]:
        """(the parameter that `p` is the transpose of, True), or (p, False)."""
        state = self.state(p)
        if isinstance(state, ParamOnly) and state.transposed is not None:
            return state.transposed, True
        return p, False

    # -- messages ---------------------------------------------------------------------------------

    def describe(self, p: Tensor) -> str:
        """A parameter's name, for messages."""
        name = self.tape.names.get(id(p))
        return f"parameter '{name}'" if name else f"a tensor computed from parameters {tuple(p.shape)}"

    def module_path(self) -> str:
        """The module whose forward is running, found by walking the stack: only errors pay for it."""
        names = {id(m): n for n, m in self.model.named_modules()}
        frame = sys._getframe(1)
        while frame is not None:
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and id(owner) in names:
                name = names[id(owner)]
                kind = type(owner).__name__
                return f"module '{name}' ({kind})" if name else f"the model ({kind})"
            frame = frame.f_back  # type: ignore[assignment]
        return "outside the model"

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

        def on_gradient(grads: Sequence[Tensor | None], kept: Sequence[Tensor]) -> None:
            for parameter, form in gradients(grads, kept):
                tape.add(parameter, form)

        tapped = tap(outputs, saved, self._handle, on_gradient)
        for t, tag in zip(tapped, tags, strict=True):
            self.mark(t, tag)
        return tapped

    def lift(self, p: Tensor, shape: Sequence[int], tag: Tag) -> Tensor:
        """Replace a parameter by a copy of `shape`, whose batch dimension is given by `tag`."""
        state = self.state(p)
        source = p
        if isinstance(state, ParamOnly) and state.source is not None:
            source = state.source  # expanded to the batch by the model: take it before that
        n, tape = self.batch_size, self.tape
        if source is not p:
            self.count_use(source)

        def on_gradient(g: Tensor) -> None:
            tape.add(source, Dense(_reduce_to(g, source.shape, tag, n)))

        return lift(source, shape, self._handle, on_gradient)

    def count_use(self, p: Tensor) -> None:
        """Note that a site uses a parameter."""
        self.tape.uses[id(p)] = self.tape.uses.get(id(p), 0) + 1

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
        name = _name(func)
        if name in _PASS or (name[0] == "." and name not in _TENSOR_PROPERTIES):
            if name in ("item", "tolist", "numpy") and self.batch_size:
                self._note_escape(name, args)
            return func(*args, **kwargs)
        if name == "backward":
            return self.backward(func, args, kwargs)
        tagged: list[tuple[Tensor, Tag]] = []
        parameters: dict[int, Tensor] = {}
        lost: Mixed | Reduced | None = None
        grad_enabled = torch.is_grad_enabled()
        for t in each_tensor(args, kwargs):
            state = self.state(t)
            if state is None:
                if t.requires_grad and grad_enabled and self._is_parameter(t, name):
                    parameters[id(t)] = t
            elif isinstance(state, Tag):
                tagged.append((t, state))
            elif isinstance(state, ParamOnly):
                if t.requires_grad and grad_enabled:
                    parameters[id(t)] = t
            elif lost is None or isinstance(state, Mixed):
                lost = state
        if lost is not None:
            return self._after_the_batch(func, name, args, kwargs, tagged, parameters, lost)
        if not tagged:
            out = func(*args, **kwargs)
            if parameters:
                self._mark_param_only(name, args, kwargs, out)
            return out
        if name not in FAMILIES and name not in RULES and _is_composite(func):
            return self._decompose(func, args, kwargs)
        call = Call(func, name, args, kwargs, tagged, list(parameters.values()), self.batch_size)
        if parameters:
            return self._site(call)
        if name == "__setitem__":
            func(*args, **kwargs)
            self._after_setitem(call)
            return None
        if name in LOSSES and grad_enabled:
            out = LOSSES[name](call, self)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        self._propagate(call, out)
        return out

    def _is_parameter(self, t: Tensor, name: str) -> bool:
        if id(t) in self._followed:
            return True
        if t.is_leaf:
            return False  # requires grad, but is no parameter of this model
        raise NotCoveredError(
            f"{self.module_path()}: '{name}' uses a tensor of shape {tuple(t.shape)} that requires "
            f"grad ({t.grad_fn}) and was not computed in this forward pass from the inputs or the "
            "parameters seen so far. If it is a cached value, compute it in forward; if it is an "
            "input, pass it as an argument of the model; if it is a constant, detach it; if it is a "
            "penalty on the parameters, use the optimizer's weight_decay."
        )

    def _mark_param_only(
        self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any
    ) -> None:
        state = PARAM_ONLY
        x = args[0] if args and isinstance(args[0], Tensor) else None
        if x is not None and isinstance(out, Tensor):
            if name in ("expand", "expand_as", "broadcast_to"):
                state = ParamOnly(source=x)
            elif id(x) in self._followed and x.dim() == 2 and out.dim() == 2:
                swapped = name in (".T", ".mT", "t") or (
                    name in ("transpose", "permute") and out.shape == x.shape[::-1]
                    and out.stride() == x.stride()[::-1]
                )
                if swapped:
                    state = ParamOnly(transposed=x)
        for o in _leaves(out if name != "__setitem__" else args[0]):
            if o.requires_grad and id(o) not in self._followed:
                self.mark(o, state)

    def _site(self, call: Call) -> Any:
        """An op that takes both examples and a parameter."""
        if call.name == "__setitem__":
            return self._setitem_site(call)
        for p in call.parameters:
            self.count_use(self.untransposed(p)[0])
        return self._with_rule(call)

    def _with_rule(self, call: Call) -> Any:
        found = RULES.get(call.name)
        try:
            result = found(call, self) if found is not None else NotImplemented
            return generic(call, self) if result is NotImplemented else result
        except Lost as lost:
            names = ", ".join(self.describe(p) for p in call.parameters)
            raise NotCoveredError(
                f"{self.module_path()}: {names} used in '{call.name}', where {lost}."
            ) from None

    def _setitem_site(self, call: Call) -> None:
        """``x[index] = parameter``."""
        x, index, value = call.args
        tag = call.tag_of(x)
        if tag is None or not call.is_parameter(value):
            raise NotCoveredError(
                f"{self.module_path()}: examples are written into {self.describe(x)} by index "
                "assignment. Build the result with torch.cat or torch.where instead."
            )
        if tag.dim is None:
            target, part = x[index].shape, tag
        else:
            moved = shadow(x.shape, tag.dim, x.device)[index]
            target, part = moved.shape, read_shadow(moved, tag, x.shape[tag.dim], self.batch_size)
        if part.explicit is not None:
            raise NotCoveredError(
                f"{self.module_path()}: {self.describe(value)} is assigned to some examples only."
            )
        call.func(x, index, self.lift(value, target, part))

    def _after_setitem(self, call: Call) -> None:
        """Examples were written into a tensor by index assignment."""
        x, index, value = call.args
        tag = call.tag_of(x)
        value_tag = call.tag_of(value)
        try:
            if tag is not None:
                if value_tag is None or tag == value_tag or tag.dim is None:
                    return
                moved = shadow(x.shape, tag.dim, x.device)[index]
                part = read_shadow(moved, tag, x.shape[tag.dim], self.batch_size)
                expected = value_tag
                if part.dim is not None and value_tag.dim is not None:
                    expected = value_tag.at(value_tag.dim - value.dim() + moved.dim())
                if part != expected:
                    raise Lost("examples are written over other examples")
                return
            if value_tag is None:
                raise Lost("an index that carries examples writes into a constant")
            if value_tag.dim is None:
                if self.batch_size == 1:
                    self.mark(x, value_tag)
                    return
                raise Lost("one example is written into a constant")
            back = value_tag.dim - value.dim()
            for dim in range(x.dim()):
                part = shadow(x.shape, dim, x.device)[index]
                if part.dim() >= -back and part.stride(back) != 0 and part.shape[back] > 1:
                    self.mark(x, value_tag.at(dim))
                    return
            raise Lost("examples are written into a constant")
        except Lost as lost:
            self.mark(x, Mixed(f"{self.module_path()}: index assignment: {lost}."))

    def _propagate(self, call: Call, out: Any) -> None:
        outputs = out if isinstance(out, (tuple, list)) else (out,)
        if not any(isinstance(o, Tensor) for o in outputs):
            return
        try:
            states: Sequence[State | None] = infer(call, outputs)
        except Lost as lost:
            mixed = Mixed(f"{self.module_path()}: examples meet in '{call.name}': {lost}.")
            states = [mixed] * len(outputs)
        for o, state in zip(outputs, states, strict=True):
            if isinstance(state, Reduced) and isinstance(o, Tensor) and not o.requires_grad:
                state = self._statistic(call.name)
            if state is not None:
                self.mark(o, state)

    def _statistic(self, name: str) -> Mixed:
        return Mixed(f"{self.module_path()}: '{name}' takes a statistic over the examples.")

    def backward(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """``loss.backward()``: look at what kind of loss it is first.

        Raises:
            ConfigurationError: if the loss is neither a scalar nor one value for each example.
            ExamplesMixError: if it mixes examples.
        """
        loss = args[0]
        state = self.state(loss)
        if isinstance(state, Mixed):
            raise ExamplesMixError(state.reason)
        if isinstance(state, (Tag, Reduced)):
            weight = state.weight if isinstance(state, Reduced) else 1.0
            self.tape.loss_weight = weight
            self.tape.per_example_loss = isinstance(state, Tag)
            per_example = isinstance(state, Tag) and loss.shape == (self.batch_size,)
            if loss.numel() != 1 and not per_example:
                raise ConfigurationError(
                    f"the loss has shape {tuple(loss.shape)}; expected a scalar, or one value for "
                    f"each of the {self.batch_size} examples. Reduce it over positions first, for "
                    "example loss.flatten(1).mean(1)."
                )
            if loss.numel() != 1 and len(args) < 2 and kwargs.get("gradient") is None:
                kwargs = {**kwargs, "gradient": torch.ones_like(loss)}
        return func(*args, **kwargs)

    def _after_the_batch(
        self,
        func: Callable[..., Any],
        name: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        tagged: list[tuple[Tensor, Tag]],
        parameters: dict[int, Tensor],
        lost: Mixed | Reduced,
    ) -> Any:
        """An op on a value that all examples have gone into: a loss, or a mixture."""
        if isinstance(lost, Mixed) and parameters:
            raise ExamplesMixError(
                f"{lost.reason} The result meets {self.describe(next(iter(parameters.values())))} "
                f"in '{name}', so the gradient of one example depends on the others."
            )
        if parameters:
            raise NotCoveredError(
                f"{self.module_path()}: a term computed from "
                f"{self.describe(next(iter(parameters.values())))} alone joins the loss in "
                f"'{name}'. It has no per-example gradient and would be clipped with the examples' "
                "or not at all. Use the optimizer's weight_decay for an L2 penalty, which costs no "
                "privacy; or add the term to each example's loss before reducing."
            )
        out = func(*args, **kwargs)
        state: State = lost
        if isinstance(lost, Reduced):
            reduced = [
                s for s in map(self.state, each_tensor(args, kwargs)) if isinstance(s, Reduced)
            ]
            state = self._follow_loss(name, args, kwargs, reduced, bool(tagged))
        for o in _leaves(out):
            self.mark(o, state if o.requires_grad or isinstance(lost, Mixed) else self._statistic(name))
        return out

    def _follow_loss(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        reduced: list[Reduced],
        meets_examples: bool,
    ) -> State:
        """Linear functions of a reduced loss keep their meaning; anything else mixes examples."""
        where = f"{self.module_path()}: '{name}'"
        if meets_examples:
            return Mixed(f"{where} joins a value reduced over the examples with single examples.")
        weight = reduced[0].weight
        if len(reduced) > 1:
            if name not in ("add", "sub", "stack", "cat", "sum"):
                return Mixed(f"{where} multiplies losses that are reduced over the examples.")
            if any(r.weight != weight for r in reduced):
                return Mixed(f"{where} adds a sum and a mean over the examples.")
            return Reduced(weight)
        if name in _LINEAR:
            return Reduced(weight)
        if name in ("mul", "div"):
            other = next((a for a in args if not isinstance(a, Tensor)), None)
            if isinstance(other, (int, float)) and not (name == "div" and args[0] is other):
                return Reduced(weight * other if name == "mul" else weight / other)
            if name == "mul" or self._is_loss(args[0]):
                return Reduced(weight)
        return Mixed(f"{where} is not linear, and its argument is reduced over the examples.")

    def _is_loss(self, t: Any) -> bool:
        return isinstance(t, Tensor) and isinstance(self.state(t), Reduced)

    def _decompose(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Run a Python-level torch function so that the ops inside it are seen."""
        if self in active_modes():
            return _open(func)(*args, **kwargs)
        with self:
            return _open(func)(*args, **kwargs)

    def _note_escape(self, name: str, args: tuple[Any, ...]) -> None:
        t = args[0] if args else None
        if isinstance(t, Tensor) and t.is_floating_point():
            state = self.state(t)
            if isinstance(state, (Mixed, Tag)):
                self.escaped[name] += 1


_LINEAR = frozenset(
    """neg pos sum mean view reshape flatten squeeze unsqueeze to float double half bfloat16 clone
    contiguous add sub type type_as cuda cpu nansum stack cat __getitem__ select expand""".split()
)


def active_modes() -> list[Any]:
    """The torch function modes that are on, outermost first."""
    return list(torch.overrides._get_current_function_mode_stack())


def _reduce_to(g: Tensor, shape: torch.Size, tag: Tag, n: int) -> Tensor:
    """The gradient of a lifted copy -> one gradient of the parameter's `shape` for each example."""
    if tag.dim is None:
        return g.sum_to_size(shape)[None]
    own_dim = tag.dim - (g.dim() - len(shape))
    if own_dim >= 0 and shape[own_dim] != 1:  # the parameter itself spans the batch
        reduced = g.sum_to_size([*shape])
        return separate(reduced, tag.at(own_dim), n)
    if tag.explicit is not None:
        each = separate(g, tag, n)
        return torch.stack([e.sum_to_size(shape) for e in each])
    by_example = rows(g, tag, n)  # [B, m, rest without the batch dimension]
    by_example = by_example.sum(1).unsqueeze(tag.dim + 1)
    full = [1] * (g.dim() - len(shape)) + list(shape)
    dims = [i + 1 for i in range(g.dim()) if full[i] == 1 and by_example.shape[i + 1] != 1]
    if dims:
        by_example = by_example.sum(dims, keepdim=True)
    return by_example.reshape(n, *shape)


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from _leaves(v)


_names: dict[Any, str] = {}


def _name(func: Callable[..., Any]) -> str:
    try:
        return _names[func]
    except KeyError:
        return _names.setdefault(func, canonical_name(func))
    except TypeError:  # unhashable
        return canonical_name(func)


def _is_composite(func: Callable[..., Any]) -> bool:
    code = getattr(func, "__code__", None)
    return code is not None and any(c in code.co_names for c in _OVERRIDE_CHECKS)


_opened: dict[Any, Callable[..., Any]] = {}


def _open(func: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a Python-level torch function that does not hand itself back to the mode."""
    if func not in _opened:
        scope = dict(func.__globals__)  # type: ignore[attr-defined]
        scope.update({check: lambda *a, **k: False for check in _OVERRIDE_CHECKS})
        copy = types.FunctionType(
            func.__code__,  # type: ignore[attr-defined]
            scope,
            func.__name__,
            func.__defaults__,  # type: ignore[attr-defined]
            func.__closure__,  # type: ignore[attr-defined]
        )
        copy.__kwdefaults__ = func.__kwdefaults__  # type: ignore[attr-defined]
        _opened[func] = copy
    return _opened[func]
