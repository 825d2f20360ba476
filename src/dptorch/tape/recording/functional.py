"""`record`: per-example gradients of any model, without an engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from dptorch.tape.gradients.clipping_modes import get_mode
from dptorch.tape.gradients.parameter_guard import ParameterGuard
from dptorch.tape.gradients.tape import Tape, TapeConfig
from dptorch.tape.recording.batch_dims import BatchDims, tag_inputs
from dptorch.tape.recording.compiled import uncompiled
from dptorch.tape.recording.patches import patched
from dptorch.tape.recording.recording import Recording

__all__ = ["record"]


@contextmanager
def record(
    model: nn.Module,
    *,
    batch_dims: BatchDims = 0,
    parameters: Mapping[str, Tensor] | None = None,
    mode: str = "auto",
) -> Iterator[Tape]:
    """Record a forward pass, so that its backward yields per-example gradients.

    Run the model and the loss inside, ``backward()`` inside or after. No parameter's ``.grad`` is
    written. The tensor arguments of ``model(...)`` hold the batch; several calls of the model in
    one recording must be on the same examples.

    Args:
        model: any module; it is not changed.
        batch_dims: the batch dimension of the inputs: one number for all, or {argument name:
            dimension, None for an input shared by all examples, or `dptorch.tape.Ragged` for one
            that holds the rows of all examples one after another}.
        parameters: what to follow, by name; by default every parameter that requires grad.
        mode: how norms and sums are computed, a name in
            `dptorch.tape.gradients.clipping_modes.MODES`. All give the same numbers; a
            backward is made once, whatever the mode.

    Yields:
        the `Tape`.

    Raises:
        NotCoveredError: where a trainable parameter is used in a way that cannot be followed.
        ExamplesMixError: where one example's gradient would depend on another.

    Guarantees:
        Every trainable parameter is either followed exactly or an error names it: a use that the
        recording cannot see raises when its gradient arrives.
        Held by `test_parameter_used_outside_the_model` and
        `test_what_a_recording_cannot_see_is_a_fault`.

    Example:
        >>> import torch, dptorch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> with dptorch.record(model) as tape:
        ...     loss = model(torch.randn(5, 2)).square().sum()
        >>> loss.backward()
        >>> {name: tuple(g.shape) for name, g in tape.per_example_gradients().items()}["0.weight"]
        (5, 3, 2)
    """
    if parameters is None:
        parameters = dict(model.named_parameters())
    followed = {n: p for n, p in parameters.items() if p.requires_grad}
    guard = ParameterGuard(followed, strict=False)
    recording = Recording(model, followed, TapeConfig(mode=get_mode(mode)), guard=guard)
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: tag_inputs(
            recording, recording.tag_batch, module, args, kwargs, batch_dims
        ),
        with_kwargs=True,
    )
    try:
        with uncompiled(), patched(), recording:
            yield recording.tape
    finally:
        hook.remove()
