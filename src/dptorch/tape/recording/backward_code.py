"""Follow the code that a model runs in its backward: tensor hooks, module hooks, custom Functions.

Such code gets the gradients of all examples at once. While it runs they carry their examples, as
activations do in the forward, and what it returns must still have them apart.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
import torch.utils.hooks
from torch import Tensor

from dptorch.errors import ExamplesMixError, NotCoveredError
from dptorch.tape.provenance.tags import Mixed, ParamOnly, Reduced, State, Tag
from dptorch.tape.recording.handlers import Args, Kwargs, handler
from dptorch.tape.recording.places import reading_modules, user_line
from dptorch.tape.recording.reads import is_trusted
from dptorch.tape.recording.tensor_states import recording_of
from dptorch.tape.rules.recorder import Recorder

__all__ = [
    "BackwardNote",
    "FollowedBackwardHook",
    "GuardedNode",
    "as_tuple",
    "follow_backward",
    "followed_function",
]


def follow_backward(
    recording: Recorder,
    code: Callable[..., Any],
    grads: Sequence[Any],
    states: Sequence[State | None],
    expected: Sequence[State | None],
    what: str,
) -> Any:
    """Run ``code(*grads)`` and return what it returns.

    Args:
        code: of the user.
        grads: the gradients that it gets, or None.
        states: whose they are.
        expected: whose each gradient that it returns must be.
        what: names the code, for the message.

    Raises:
        ExamplesMixError: if one example's gradient is computed from others'.
    """
    own = [g.view_as(g) if isinstance(g, Tensor) else g for g in grads]
    with recording:
        for g, state in zip(own, states, strict=True):
            if isinstance(g, Tensor) and isinstance(state, Tag):
                recording.mark(g, state)
        changed = code(*own)
    wrong = any(
        isinstance(g, Tensor) and isinstance(state, Tag) and recording.state(g) != state
        for g, state in zip(own, states, strict=True)
    )
    results = changed if isinstance(changed, (tuple, list)) else (changed,)
    for g, state in zip(results, expected, strict=False):
        if isinstance(g, Tensor) and isinstance(state, Tag):
            wrong = wrong or recording.state(g) not in (state, None)
    if wrong:
        raise ExamplesMixError(
            f"{what} computes one example's gradient from others. Make it treat the examples "
            "independently, or remove it. Gradients are clipped for each example already."
        )
    return changed


@handler("register_hook")
def register_hook(
    recording: Recorder, func: Callable[..., Any], name: str, args: Args, kwargs: Kwargs
) -> Any:
    """A hook that changes a gradient must keep each example's to itself.

    Raises:
        NotCoveredError: for one on a tensor computed from parameters alone.
    """
    t, hook = args[0], args[1] if len(args) > 1 else kwargs["hook"]
    state = recording.state(t)
    if isinstance(state, ParamOnly):
        raise NotCoveredError(
            f"{recording.module_path()}: a hook on a tensor computed from parameters alone. Its "
            "gradient is that of all examples, before it is clipped. Set the hook on an activation, or "
            "remove it."
        )
    if not isinstance(state, (Tag, Reduced)):
        return func(*args, **kwargs)

    def followed(g: Tensor) -> Any:
        if isinstance(state, Tag):
            what = "a hook on a tensor of the model"
            return follow_backward(recording, hook, [g], [state], [state], what)
        version = g._version
        with recording:
            changed = hook(g)
        if (changed is not None and changed is not g) or g._version != version:
            raise NotCoveredError(
                "a hook on a loss changes its gradient, which multiplies the loss of every example. "
                "Multiply the loss itself by a public constant."
            )
        return None

    return func(t, followed)


@handler(".grad_fn")
def grad_fn(
    recording: Recorder, func: Callable[..., Any], name: str, args: Args, kwargs: Kwargs
) -> Any:
    """The node of autograd's graph, which takes no hooks from code that is not torch's."""
    node = func(*args, **kwargs)
    state = recording.state(args[0])
    if node is None or not recording.strict or not isinstance(state, (Tag, Mixed, Reduced)):
        return node
    # `Module.register_backward_hook` puts its hooks there, after the module's forward.
    of_a_module = next(reading_modules(), "") == "torch.nn.modules.module"
    return node if is_trusted(("torch",)) and not of_a_module else GuardedNode(node)


class GuardedNode:
    """A node of autograd's graph that looks like itself and refuses hooks, which nothing follows."""

    def __init__(self, node: Any) -> None:
        self._node = node

    def __getattr__(self, name: str) -> Any:
        return getattr(self._node, name)

    def __repr__(self) -> str:
        return repr(self._node)

    def __eq__(self, other: object) -> bool:
        return bool(self._node == getattr(other, "_node", other))

    def __hash__(self) -> int:
        return hash(self._node)

    @property
    def next_functions(self) -> tuple[tuple[Any, int], ...]:
        """The nodes that this one passes gradients to."""
        nodes = self._node.next_functions
        return tuple((None if n is None else GuardedNode(n), i) for n, i in nodes)

    def register_hook(self, fn: Any) -> NoReturn:
        """Refuse the hook.

        Raises:
            NotCoveredError: always.
        """
        raise NotCoveredError(
            f"{user_line()}: a hook on a node of autograd's graph gets the gradients of all examples, "
            "and is not followed. Set it on the tensor, h.register_hook(hook), where it is, or on the "
            "module with register_full_backward_hook(hook)."
        )

    register_prehook = register_hook


class FollowedBackwardHook(torch.utils.hooks.BackwardHook):
    """What torch makes of a module's full backward hooks, with the hooks followed.

    Args:
        recording: of the forward pass that sets the hooks up; None outside of recorded models, where
            the module's arguments tell.
        module, user_hooks, user_pre_hooks: as torch gives them.
    """

    def __init__(
        self, recording: Recorder | None, module: Any, user_hooks: Any, user_pre_hooks: Any
    ) -> None:
        self._recording = recording
        self._inputs: list[State | None] = []
        self._outputs: list[State | None] = []
        super().__init__(
            module,
            [self._followed(hook) for hook in user_hooks],
            [self._followed_before(hook) for hook in user_pre_hooks],
        )

    def setup_input_hook(self, args: Any) -> Any:
        """Note whose the inputs of the module are."""
        self._recording = self._recording or recording_of(args)
        found = super().setup_input_hook(args)  # type: ignore[no-untyped-call]
        self._inputs = self._copy_states(args, found)
        return found

    def setup_output_hook(self, args: Any) -> Any:
        """Note whose the outputs of the module are."""
        found = super().setup_output_hook(args)  # type: ignore[no-untyped-call]
        self._outputs = self._copy_states(args, found)
        return found

    def _copy_states(self, before: Any, after: Any) -> list[State | None]:
        """The hooks' own identity Function makes new tensor objects of the same values."""
        recording = self._recording
        states: list[State | None] = []
        if recording is None:
            return states
        for old, new in zip(as_tuple(before), as_tuple(after), strict=True):
            state = recording.state(old) if isinstance(old, Tensor) else None
            if isinstance(new, Tensor) and new is not old and state is not None:
                recording.mark(new, state)
                if type(old) is not type(new):  # the model's own outputs, which are followed on
                    new.__class__ = type(old)
                    new.__dict__.update(old.__dict__)
                    recording.mark(new, state)
            states.append(state)
        return states

    def _followed(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def followed(module: Any, grad_input: Any, grad_output: Any) -> Any:
            if self._recording is None:
                return hook(module, grad_input, grad_output)
            inputs, outputs = as_tuple(grad_input), as_tuple(grad_output)

            def code(*grads: Any) -> Any:
                return hook(module, grads[: len(inputs)], grads[len(inputs) :])

            states = [*_padded(self._inputs, inputs), *_padded(self._outputs, outputs)]
            expected = _padded(self._inputs, inputs)
            what = f"a backward hook on {type(module).__name__}"
            grads = [*inputs, *outputs]
            return follow_backward(self._recording, code, grads, states, expected, what)

        return followed

    def _followed_before(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def followed(module: Any, grad_output: Any) -> Any:
            if self._recording is None:
                return hook(module, grad_output)
            grads = as_tuple(grad_output)
            states = _padded(self._outputs, grads)
            what = f"a backward pre-hook on {type(module).__name__}"

            def code(*own: Any) -> Any:
                return hook(module, own)

            return follow_backward(self._recording, code, grads, states, states, what)

        return followed


def as_tuple(value: Any) -> tuple[Any, ...]:
    """Return a tuple of one value, or of several."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _padded(states: list[State | None], grads: Sequence[Any]) -> list[State | None]:
    """The states, where each gradient has one."""
    return states if len(states) == len(grads) else [None] * len(grads)


@dataclass
class BackwardNote:
    """What the backward of one call of a custom Function is followed by.

    Attributes:
        recording: of the forward pass.
        function: the user's class.
        inputs: the state of each argument.
        outputs: the state of each output.
    """

    recording: Recorder
    function: type
    inputs: list[State | None]
    outputs: list[State | None] = field(default_factory=list)


_followed_functions: dict[type, type] = {}
_notes: list[BackwardNote] = []  # of the calls that run now, innermost last


def followed_function(cls: type, plain_apply: Any) -> Callable[..., Any]:
    """Return ``apply(note, *args)`` of a custom Function whose backward is followed."""
    if cls not in _followed_functions:
        _followed_functions[cls] = _subclass(cls)
    apply = types.MethodType(plain_apply, _followed_functions[cls])

    def noted(note: BackwardNote, *args: Any, **kwargs: Any) -> Any:
        _notes.append(note)
        try:
            return apply(*args, **kwargs)
        finally:
            _notes.pop()

    return noted


def _subclass(cls: Any) -> type:
    def forward(ctx: Any, *args: Any, **kwargs: Any) -> Any:
        ctx._dptorch_note = _notes[-1]
        return cls.forward(ctx, *args, **kwargs)

    def setup_context(ctx: Any, inputs: Any, output: Any) -> Any:
        ctx._dptorch_note = _notes[-1]
        return cls.setup_context(ctx, inputs, output)

    def backward(ctx: Any, *grads: Any) -> Any:
        note: BackwardNote = ctx._dptorch_note
        states = _padded(note.outputs, grads)
        what = f"the backward of {note.function.__name__}"

        def code(*own: Any) -> Any:
            return cls.backward(ctx, *own)

        return follow_backward(note.recording, code, grads, states, note.inputs, what)

    separate = cls.setup_context is not torch.autograd.Function.setup_context
    body: dict[str, Any] = {"backward": staticmethod(backward), "__module__": cls.__module__}
    if separate:
        body["setup_context"] = staticmethod(setup_context)
    else:
        body["forward"] = staticmethod(forward)
    return type(cls.__name__, (cls,), body)
