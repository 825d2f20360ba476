"""`check`: verify on a model that the tape is exact and that no example touches another."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dptorch.errors import ConfigurationError, ExamplesMixError, NotCoveredError
from dptorch.tape.recording.batch_dims import BatchDims
from dptorch.tape.recording.model_hooks import hooks_of
from dptorch.tape.recording.places import OUTSIDE
from dptorch.validation.batch import Call, Cutter, calls_of
from dptorch.validation.chance import no_chance
from dptorch.validation.check_report import CheckReport, Finding, ParameterRow
from dptorch.validation.compare import (
    Comparison,
    LossFn,
    Recorded,
    compare,
    frozen,
    leakage,
    loss_value,
    run_tape,
    tolerance_for,
    uncovered,
)
from dptorch.validation.mixing import MIXES, WAY_OUT, find_mixing
from dptorch.validation.reruns import preserving_state

__all__ = ["CheckReport", "Finding", "ParameterRow", "check"]

_CALLS = 3  # calls of the model in one loss that are searched for mixing
_LISTED = 8  # names in one finding


def check(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFn,
    *,
    examples: int = 4,
    batch_dims: BatchDims = 0,
    training: bool = True,
    tolerance: float | None = None,
) -> CheckReport:
    """Compare the tape with a loop over single examples, and look for what mixes them.

    Four experiments on the first few examples of `batch`. (1) The model runs with one example
    changed; the first module whose values for another example move mixes them. (2) Per-example
    gradients, their norms and their clipped sum are compared with those of the examples run one by
    one through plain autograd. (3) One example is changed and the gradients of the others must not
    move, whatever the loss does. (4) The recording tells which parameters it cannot follow, which
    ops go the slow way, and where values leave for Python. A difference that could be rounding is
    looked at again in float64, on a copy of the model.

    Dropout is off and random numbers are fixed, so that an example alone meets the same draws as
    within the batch; where that fails, the comparison is made in evaluation mode and says so.

    Args:
        model: any module. Convert BatchNorm first (`dptorch.prepare`), or see it reported.
        batch: what a data loader yields: tensors in tuples, lists or mappings.
        loss_fn: ``loss_fn(model, batch)``: the scalar that training calls ``backward()`` on, or
            one loss for each example.
        examples: how many to compare. Memory: about ``2 * examples`` times the parameters.
        batch_dims: which arguments of the model are batched and where, as for `dptorch.record`.
        training: look at the model as after ``model.train()``, the way it will be trained; False
            leaves each module in its mode.
        tolerance: largest relative error that counts as exact; by default 1e-9 in float64, 1e-4 in
            float32, 5e-2 in half precision.

    Returns:
        a `CheckReport`: ``print`` it; ``report.ok`` says whether a fault was found.

    Guarantees:
        Parameters, ``.grad``, buffers, modes, random states and the batch are as before.
        Held by `test_nothing_is_left_changed`.

    Raises:
        ConfigurationError: for a batch that cannot be cut or has fewer than two different
            examples, a loss that is not finite or does not depend on the model, or a model without
            trainable parameters.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> batch = torch.randn(6, 4), torch.randint(0, 2, (6,))
        >>> loss_fn = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> check(model, batch, loss_fn).ok
        True
        >>> model.insert(1, nn.BatchNorm1d(8))                                   # doctest: +ELLIPSIS
        Sequential(...
        >>> [(f.kind, f.where) for f in check(model, batch, loss_fn).findings if f.fault]
        [('examples mix', "module '1' (BatchNorm1d)")]
    """
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ConfigurationError(
            "the model has no trainable parameter. Unfreeze what should be trained with "
            "requires_grad_(True)."
        )
    if examples < 2:
        raise ConfigurationError(f"examples={examples}: at least two are needed to see them mix.")
    hooks = hooks_of(model)
    with ExitStack() as stack:
        stack.enter_context(hooks.paused() if hooks is not None else nullcontext())
        stack.enter_context(_gradients_kept(model))
        stack.enter_context(preserving_state(model))
        if training:
            model.train()
        job = _Check(model, batch, loss_fn, examples, batch_dims, parameters, tolerance)
        return job.run()


@dataclass
class _Found:
    """One comparison of tape and loop; NaN and None for what could not be done."""

    recorded: Recorded | None = None
    comparison: Comparison | None = None
    leakage: float = math.nan

    def worst(self) -> float:
        errors = [*self.comparison.error.values(), self.comparison.norm] if self.comparison else []
        return max([e for e in [*errors, self.leakage] if not math.isnan(e)], default=0.0)


class _Check:
    """One call of `check`."""

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        loss_fn: LossFn,
        examples: int,
        batch_dims: BatchDims,
        parameters: dict[str, nn.Parameter],
        tolerance: float | None,
    ) -> None:
        self.model, self.loss_fn, self.batch_dims = model, loss_fn, batch_dims
        self.parameters: dict[str, Tensor] = dict(parameters)
        calls = self._calls(batch) if batch_dims != 0 else []
        self.cutter = Cutter(model, batch, batch_dims, calls)
        self.examples = min(examples, self.cutter.size)
        if self.examples < 2:
            raise ConfigurationError(
                "the batch holds one example, but at least two different ones are needed."
            )
        self.index = list(range(self.examples))
        self.dtype = min((p.dtype for p in parameters.values()), key=_precision)
        self.given_tolerance = tolerance
        self.tolerance = tolerance if tolerance is not None else tolerance_for(self.dtype)
        self.excluded: list[str] = []
        self.findings = _Findings()

    def run(self) -> CheckReport:
        self._look_for_mixing()
        mode, label = self._repeatable_mode()
        found = _Found()
        if mode is not None:
            with mode:
                found = self._compare(self.model, None, note=True)
                if self.dtype != torch.float64 and found.worst() > self.tolerance:
                    found = self._in_float64(found)
        self._judge(found)
        return self._report(found, label)

    # -- the experiments ---------------------------------------------------------------------------

    def _calls(self, batch: Any) -> list[Call]:
        with preserving_state(self.model):
            return calls_of(self.model, lambda: loss_value(self.model, batch, self.loss_fn))

    def _look_for_mixing(self) -> None:
        calls = self._calls(self.cutter.select(self.index))
        if not calls:
            raise ConfigurationError(
                "loss_fn did not call the model that it was given. Call model(...) itself: what "
                "its layers or its other methods compute on their own is not followed."
            )
        for args, kwargs in calls[:_CALLS]:
            try:
                where = find_mixing(self.model, args, kwargs, self.batch_dims)
            except (ExamplesMixError, NotCoveredError, ConfigurationError):
                continue  # the tape will say so
            if where is None:
                raise ConfigurationError(
                    "the first two examples of the batch give the model the same inputs, so "
                    "nothing shows whether one touches the other. Pass a batch of different ones."
                )
            if where:
                self.findings.mixing(where, MIXES[0].upper() + MIXES[1:])

    def _repeatable_mode(self) -> tuple[AbstractContextManager[None] | None, str]:
        """The first way to run the model twice with the same result."""
        training = "training" if self.model.training else "as given"
        with no_chance(self.model):
            repeatable = self._repeats()
        if repeatable:
            return no_chance(self.model), f"{training} mode without chance"
        with _evaluating(self.model):
            repeatable = self._repeats()
        if repeatable:
            self.findings.add(
                "random",
                "the model",
                "In training mode the loss is random in a way that could not be held fixed, so "
                "gradients were compared in evaluation mode.",
                fault=False,
            )
            return _evaluating(self.model), "evaluation mode"
        self.findings.add(
            "random",
            "the model or the loss function",
            "The loss differs from run to run, in evaluation mode too, so its gradients could not "
            "be compared with a loop. Draw random numbers with torch functions, or pass them in "
            "the batch.",
            fault=True,
        )
        return None, "not compared"

    def _repeats(self) -> bool:
        values = []
        for seed in (1, 2):
            with torch.no_grad(), preserving_state(self.model):
                torch.manual_seed(seed)
                random.seed(seed)
                np.random.seed(seed)  # noqa: NPY002
                loss = loss_value(self.model, self.cutter.select(self.index), self.loss_fn)
                values.append(loss.double().sum().item())
        if not all(math.isfinite(v) for v in values):
            raise ConfigurationError(
                f"the loss of these examples is {values[0]}, not a finite number."
            )
        return math.isclose(*values, rel_tol=1e-2 * self.tolerance, abs_tol=1e-12)

    def _compare(self, model: nn.Module, cast: torch.dtype | None, *, note: bool) -> _Found:
        everything = dict(model.named_parameters())
        found = _Found()
        with ExitStack() as stack:
            stack.enter_context(frozen([everything[n] for n in self.excluded]))
            while True:
                followed = {n: everything[n] for n in self.parameters if n not in self.excluded}
                if not followed:
                    return found
                try:
                    found.recorded = self._tape(model, self.index, cast, followed)
                    break
                except ExamplesMixError as error:
                    if note:
                        self.findings.mixing(*_place(str(error)))
                    return found
                except NotCoveredError as error:
                    names = uncovered(error, followed)
                    if note:
                        where = _listed(names) if names else "the model"
                        self.findings.add("not covered", where, str(error), fault=True)
                    if not names:
                        return found
                    self.excluded += names
                    stack.enter_context(frozen([everything[n] for n in names]))
            found.comparison = compare(
                model, self.cutter, self.examples, self.loss_fn, found.recorded, followed,
                self.dtype if cast is None else cast, cast,
            )  # fmt: skip
            other = self._tape(model, [1, *self.index[1:]], cast, followed)
            found.leakage = leakage(found.recorded.gradients, other.gradients)
        return found

    def _tape(
        self,
        model: nn.Module,
        index: Sequence[int],
        cast: torch.dtype | None,
        parameters: Mapping[str, Tensor],
    ) -> Recorded:
        batch = self.cutter.select(index, cast)
        return run_tape(model, batch, self.loss_fn, self.batch_dims, parameters)

    def _in_float64(self, found: _Found) -> _Found:
        """Again without rounding; as it was if the model cannot run in float64."""
        try:
            twin = copy.deepcopy(self.model).to(torch.float64)
            again = self._compare(twin, torch.float64, note=False)
        except Exception:
            return found
        if again.comparison is None:
            return found
        self.dtype = torch.float64
        if self.given_tolerance is None:
            self.tolerance = tolerance_for(torch.float64)
        return again

    # -- what it means -----------------------------------------------------------------------------

    def _judge(self, found: _Found) -> None:
        findings, comparison, recorded = self.findings, found.comparison, found.recorded
        if recorded is None or comparison is None:
            return
        if found.leakage > self.tolerance and not findings.mixed:
            findings.mixing(
                "the loss function",
                f"Replacing one example changed the gradient of another by {found.leakage:.1e} of "
                "its size, and no module did it. Compute each example's loss from that example "
                "alone.",
            )
        wrong = [n for n, e in comparison.error.items() if not e <= self.tolerance]
        if wrong and not findings.mixed:
            findings.add(
                "inexact",
                _listed(wrong),
                "The tape's per-example gradients differ from a loop over single examples. This is "
                "an error in the tape, or a model that treats a single example otherwise than a "
                "batch. Freeze these parameters (requires_grad_(False)), and please report it.",
                fault=True,
            )
        self._note_unreached([n for n in comparison.error if n not in comparison.reached], recorded)
        for (op, names), uses in recorded.slow.items():
            size = sum(
                p.numel() * p.element_size()
                for n, p in self.parameters.items()
                if n in names.split(", ")
            )
            findings.add(
                "slow",
                names,
                f"'{op}' has no rule of its own ({uses} use{'s' if uses > 1 else ''}): exact, at "
                f"the cost of one backward of the op, and {_size(size)}, for each example.",
                fault=False,
            )
        for (function, place), times in recorded.reads.items():
            findings.add(
                "escape",
                "the loss function" if place.startswith(OUTSIDE) else place,
                f"'{function}' read values of the batch into Python {times} time"
                f"{'s' if times > 1 else ''}. What becomes of them is not followed: they must not "
                "bring one example to another.",
                fault=False,
            )

    def _note_unreached(self, names: list[str], recorded: Recorded) -> None:
        tape = recorded.tape
        used = [n for n in names if tape.uses_of(n)]
        idle = [n for n in names if n not in used]
        if idle:
            self.findings.add(
                "no gradient",
                _listed(idle),
                "Trainable, but not used for this batch. Noise is added to it in every step all "
                "the same; freeze it if it is not meant to be trained.",
                fault=False,
            )
        if used:
            self.findings.add(
                "no gradient",
                _listed(used),
                "The gradient is zero for all these examples, so its exactness was not put to the "
                "test. A layer further on that starts at zero does this; check a trained model.",
                fault=False,
            )

    def _report(self, found: _Found, label: str) -> CheckReport:
        comparison = found.comparison
        rows = tuple(self._row(n, p, found) for n, p in self.parameters.items())
        return CheckReport(
            model=type(self.model).__name__,
            examples=self.examples,
            dtype=str(self.dtype).removeprefix("torch."),
            mode=label,
            loss_reduction=comparison.reduction if comparison else "",
            tolerance=self.tolerance,
            error=comparison.norm if comparison else math.nan,
            leakage=found.leakage,
            parameters=rows,
            findings=tuple(sorted(self.findings.all, key=lambda f: not f.fault)),
        )

    def _row(self, name: str, p: Tensor, found: _Found) -> ParameterRow:
        recorded, comparison = found.recorded, found.comparison
        error = comparison.error.get(name, math.nan) if comparison else math.nan
        uses = 0
        slow: tuple[str, ...] = ()
        if recorded is not None:
            uses = recorded.tape.uses_of(name)
            slow = tuple(op for op, names in recorded.slow if name in names.split(", "))
        if name in self.excluded:
            status = "not covered"
        elif comparison is None:
            status = "not compared"
        elif not error <= self.tolerance:
            status = "examples mix" if self.findings.mixed else "inexact"
        else:
            status = "exact" if name in comparison.reached else "no gradient"
        return ParameterRow(name, tuple(p.shape), status, error, uses, slow)


@dataclass
class _Findings:
    all: list[Finding] = field(default_factory=list)

    @property
    def mixed(self) -> bool:
        return any(f.kind == "examples mix" for f in self.all)

    def add(self, kind: str, where: str, message: str, *, fault: bool) -> None:
        self.all.append(Finding(kind, where, message, fault))

    def mixing(self, where: str, message: str) -> None:
        """Keep the last word on a place: a recording says what the experiment only sees."""
        self.all = [f for f in self.all if (f.kind, f.where) != ("examples mix", where)]
        if "dptorch.prepare" not in message and where != "the loss function":
            message = f"{message} {WAY_OUT}"
        self.add("examples mix", where, message, fault=True)


def _place(message: str) -> tuple[str, str]:
    """The place that a recording's message begins with, and the rest."""
    where, _, rest = message.partition(": ")
    return ("the loss function" if where.startswith(OUTSIDE) else where), rest


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def _size(n: int) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if n < 1024:
            return f"{n} {unit}"
        n = -(-n // 1024)
    return f"{n} GiB"


def _precision(dtype: torch.dtype) -> float:
    return -torch.finfo(dtype).eps


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _gradients_kept(model: nn.Module) -> Iterator[None]:
    grads = [(p, p.grad) for p in model.parameters()]
    try:
        for p, _ in grads:
            p.grad = None
        yield
    finally:
        for p, g in grads:
            p.grad = g
