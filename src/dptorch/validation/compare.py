"""Compare per-example gradients of the tape with a loop over single examples.

Shape legend: B examples.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dptorch.errors import ConfigurationError, NotCoveredError
from dptorch.tape.gradients.tape import Tape
from dptorch.tape.provenance.calls import canonical_name
from dptorch.tape.provenance.schemas import bind
from dptorch.tape.provenance.tags import Mixed, Reduced, Tag
from dptorch.tape.recording.batch_dims import BatchDims
from dptorch.tape.recording.functional import record
from dptorch.tape.recording.recording import Recording, active_modes
from dptorch.validation.batch import Cutter
from dptorch.validation.reruns import preserving_state

__all__ = [
    "Comparison",
    "LossFn",
    "Recorded",
    "compare",
    "frozen",
    "leakage",
    "loss_value",
    "run_tape",
    "tolerance_for",
    "uncovered",
]

LossFn = Callable[[Any, Any], Tensor]

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
# A gradient smaller than this fraction of the example's whole gradient is compared with that
# fraction: one that is zero but for rounding has no relative error.
_FLOOR = {torch.float64: 1e-4, torch.float32: 1e-2}
_READS = frozenset(["item", "tolist", "numpy", "__float__", "__int__", "__array__"])


def tolerance_for(dtype: torch.dtype) -> float:
    """Largest relative error that rounding explains."""
    return _TOLERANCE.get(dtype, 5e-2)


def loss_value(model: nn.Module, batch: Any, loss_fn: LossFn) -> Tensor:
    """``loss_fn(model, batch)``, checked.

    Raises:
        ConfigurationError: if it is not a tensor.
    """
    loss = loss_fn(model, batch)
    if not isinstance(loss, Tensor):
        raise ConfigurationError(
            f"loss_fn returned a {type(loss).__name__}. Expected a tensor: the scalar that "
            "backward() is called on, or one value for each example."
        )
    return loss


class _Reads(TorchFunctionMode):
    """Notes where floating-point values of the batch are read into Python."""

    def __init__(self) -> None:
        super().__init__()
        self.recording: Recording | None = None
        self.places: Counter[tuple[str, str]] = Counter()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = canonical_name(func)
        if name in _READS and self.recording is not None and args:
            t = args[0]
            if isinstance(t, Tensor) and t.is_floating_point() and self._of_the_batch(t):
                self.places[name, self.recording.module_path()] += 1
        return func(*args, **(kwargs or {}))

    def _of_the_batch(self, t: Tensor) -> bool:
        assert self.recording is not None
        return isinstance(self.recording.state(t), (Tag, Reduced, Mixed))


@dataclass
class Recorded:
    """A tape after its backward, and what was noticed on the way.

    Attributes:
        tape: the tape.
        gradients: {name: [B, *shape]}.
        loss: sum of the loss.
        reduction: "sum", "mean", "none", or "" where the recording could not tell.
        slow: how often each op without a rule was used, by (op, parameter names).
        reads: where values of the batch were read into Python: (function, module) and how often.
    """

    tape: Tape
    gradients: dict[str, Tensor]
    loss: float
    reduction: str
    slow: Counter[tuple[str, str]]
    reads: Counter[tuple[str, str]]


def run_tape(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFn,
    batch_dims: BatchDims,
    parameters: Mapping[str, Tensor],
) -> Recorded:
    """Record one forward and backward.

    Raises:
        ExamplesMixError, NotCoveredError: as `dptorch.record` does.
        ConfigurationError: if the loss depends on no trainable parameter.
    """
    reads = _Reads()
    with (
        preserving_state(model),
        reads,
        record(model, batch_dims=batch_dims, parameters=parameters) as tape,
    ):
        recording = next(m for m in reversed(active_modes()) if isinstance(m, Recording))
        reads.recording = recording
        loss = loss_value(model, batch, loss_fn)
        state = recording.state(loss)
        reads.recording = None
        total = loss.sum() if loss.dim() else loss
        if not total.requires_grad:
            raise ConfigurationError(
                "the loss does not depend on any trainable parameter: it does not require grad."
            )
        total.backward()
    reduction = ""
    if isinstance(state, Tag):
        reduction = "none"
    elif isinstance(state, Reduced):
        # Multiplied by the number of examples, a mean is a sum.
        weight = state.factors[0] / (tape.batch_size if state.kind == "mean" else 1)
        reduction = "sum" if math.isclose(weight, 1.0) else "mean"
    return Recorded(
        tape,
        tape.per_example_gradients(),
        total.item(),
        reduction,
        recording.generic_ops,
        reads.places,
    )


@dataclass
class Comparison:
    """Errors by parameter, each the largest over the examples.

    Attributes:
        error: {name: relative error of gradients, norms and clipped sum}.
        norm: relative error of the norms of whole gradients.
        reached: names of the parameters that any example reaches.
        reduction: what the loss does, judged by its values where the recording could not tell.
    """

    error: dict[str, float] = field(default_factory=dict)
    norm: float = math.nan
    reached: set[str] = field(default_factory=set)
    reduction: str = ""


def compare(
    model: nn.Module,
    cutter: Cutter,
    examples: int,
    loss_fn: LossFn,
    recorded: Recorded,
    parameters: Mapping[str, Tensor],
    dtype: torch.dtype,
    cast: torch.dtype | None = None,
) -> Comparison:
    """Run the examples one by one and compare with the tape.

    Holds every example's gradient twice: from the tape and from the loop.

    Args:
        cutter: of the batch whose first `examples` the tape saw.
        dtype: the lowest precision among the parameters.
        cast: what floating-point inputs are cast to.
    """
    result = Comparison()
    names, tensors = list(parameters), list(parameters.values())
    singles: list[list[Tensor | None]] = []
    losses = []
    for i in range(examples):
        with preserving_state(model), _ClassWeights():
            loss = loss_value(model, cutter.select([i], cast), loss_fn).sum()
            losses.append(loss.item())
            row = torch.autograd.grad(loss, tensors, allow_unused=True)
            singles.append([g if g is None else _dense(g) for g in row])
    result.reduction = recorded.reduction or _reduction(recorded.loss, losses)
    scale = examples if result.reduction == "mean" else 1
    floor = _FLOOR.get(dtype, 1e-1)
    exact = {
        n: torch.stack([torch.zeros_like(p) if (g := row[j]) is None else g for row in singles])
        for j, (n, p) in enumerate(zip(names, tensors, strict=True))
        if any(row[j] is not None for row in singles)
    }
    result.reached = {n for n, g in exact.items() if bool(g.any())}
    for n, p in parameters.items():
        if n not in exact:
            exact[n] = torch.zeros_like(p).expand(examples, *p.shape)
    exact_norms = {n: _norms(g) for n, g in exact.items()}
    whole = torch.stack(list(exact_norms.values())).square().sum(0).sqrt()
    least = floor * whole
    tape_norms = {n: s.double().sqrt() * scale for n, s in recorded.tape.squared_norms().items()}
    weights = torch.linspace(1.0, 0.25, examples, device=tensors[0].device, dtype=torch.float64)
    sums = recorded.tape.clipped_sum(weights)
    for n in names:
        found, truth = recorded.gradients[n].double() * scale, exact[n].double()
        size = torch.maximum(exact_norms[n], least).clamp(min=1e-300)
        errors = [(_norms(found - truth) / size)]
        if n in tape_norms:
            errors.append((tape_norms[n] - exact_norms[n]).abs() / size)
        weighted = torch.tensordot(weights.to(truth), truth, 1)
        gap = (sums[n].double() * scale - weighted).norm()
        errors.append((gap / torch.maximum(weighted.norm(), least.max()).clamp(min=1e-300))[None])
        result.error[n] = _worst(torch.cat(errors))
    found_norms = recorded.tape.norms().double() * scale
    result.norm = _worst((found_norms - whole).abs() / whole.clamp(min=1e-300))
    return result


class _ClassWeights(TorchFunctionMode):
    """Makes a mean loss with class weights what it is on the tape: a weight is as much as it says.
    Torch divides by the weights of the batch, which cancel out of the loss of one example."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = bind(func, args, kwargs or {}) if func in (F.cross_entropy, F.nll_loss) else {}
        target = given.get("target")
        if given.get("weight") is None or given.get("reduction", "mean") != "mean":
            return func(*args, **kwargs or {})
        if not isinstance(target, Tensor) or target.is_floating_point():
            return func(*args, **kwargs or {})
        names = ("weight", "ignore_index", "label_smoothing")
        others = {name: given[name] for name in names if name in given}
        total = func(given["input"], target, **others, reduction="sum")
        return total / (target != given.get("ignore_index", -100)).sum().clamp(min=1)


def leakage(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """Largest relative change of the gradient of an example other than the first."""
    change = torch.stack([_norms(after[n] - g) for n, g in before.items()]).square().sum(0).sqrt()
    whole = torch.stack([_norms(g) for g in before.values()]).square().sum(0).sqrt()
    return _worst((change / whole.clamp(min=1e-300))[1:])


def _dense(g: Tensor) -> Tensor:
    """The gradient as the tape has it: ``nn.Embedding(sparse=True)`` makes a sparse one."""
    return g.to_dense() if g.is_sparse else g


def _norms(g: Tensor) -> Tensor:
    return torch.linalg.vector_norm(
        g.double().flatten(1) if g.dim() > 1 else g.double()[:, None], dim=1
    )


def _worst(errors: Tensor) -> float:
    """The largest; a value that is not finite is as wrong as can be."""
    return errors.nan_to_num(math.inf, math.inf).max().item() if errors.numel() else 0.0


def _reduction(loss: float, singles: list[float]) -> str:
    total = math.fsum(singles)
    return "mean" if abs(loss - total / len(singles)) < abs(loss - total) else "sum"


def uncovered(error: NotCoveredError, parameters: Mapping[str, Tensor]) -> list[str]:
    """Names of the parameters that an error is about."""
    return [n for n in parameters if f"parameter '{n}'" in str(error)]


@contextmanager
def frozen(parameters: list[Tensor]) -> Iterator[None]:
    """These do not require grad inside."""
    try:
        for p in parameters:
            p.requires_grad_(False)
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)
