"""What the backwards of one logical batch add up to: clipped sums, and checks that each example is in
them once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dptorch.clipping import coefficients
from dptorch.errors import PrivacyError
from dptorch.plan import PrivacyPlan
from dptorch.release import ClippedSum
from dptorch.sampling import PhysicalBatch
from dptorch.tape import Recording, Tape
from dptorch.tape.tape import PER_EXAMPLE
from dptorch.tape.taps import full_precision

__all__ = ["LogicalBatch", "StepDiagnostics"]


@dataclass(frozen=True)
class StepDiagnostics:
    """Exact functions of private data in the last logical batch: NOT PRIVATE. Do not publish.

    Attributes:
        examples: how many examples were in it.
        mean_norm: mean per-example gradient norm (NaN if there was none).
        clipped_fraction: fraction whose contribution was scaled down.
        dropped: how many were dropped because their gradient was not finite.
    """

    examples: int
    mean_norm: float
    clipped_fraction: float
    dropped: int


class _Batch(NamedTuple):
    """A tape that gradients have reached, and the physical batch its forward pass was made on (None
    without the engine's loader)."""

    tape: Tape
    part: PhysicalBatch | None


class LogicalBatch:
    """Collects the per-example gradients of one step, clips them and adds them up.

    A step's gradients pass three stations: the *tapes* that backwards have reached; what is
    *pending* since the last step, clipped, and dropped by ``zero_grad``; and the *sums* that
    ``virtual_step``, or a step on a part of the batch, has put aside. Clipping waits until the step or
    the next forward pass, so that several backwards through one forward pass are clipped together.

    Args:
        plan: says how to clip and how the loss is reduced.

    Attributes:
        part: where the batch that the engine's loader handed out last belongs; None without one.
        diagnostics: of the last complete batch; NOT PRIVATE.
        loss_factors: what the terms of the loss were multiplied by in the run's first backward.

    Guarantees:
        One row of the batches that went in contributes at most ``plan.max_example_norm`` to the sum
        that `take` returns: an example ``plan.max_grad_norm``, as long as it is one row.
    """

    def __init__(self, plan: PrivacyPlan) -> None:
        self.plan = plan
        self.part: PhysicalBatch | None = None
        self.diagnostics: StepDiagnostics | None = None
        self.loss_factors: tuple[float, ...] | None = None
        self._fired: list[_Batch] = []
        self._pending: dict[str, Tensor] | None = None
        self._sums: dict[str, Tensor] | None = None
        self._norms: list[Tensor] = []
        self._seen: set[tuple[int, int]] = set()  # physical batches in _sums
        self._pending_places: set[tuple[int, int]] = set()  # and in _pending

    def watch(self, recording: Recording) -> None:
        """A forward pass begins: wait for gradients to reach its tape."""
        self._collect()
        part = self.part
        recording.tape.on_first_gradient = lambda tape: self._fired.append(_Batch(tape, part))

    def begin(self, part: PhysicalBatch) -> None:
        """The engine's loader hands out a physical batch.

        Raises:
            PrivacyError: if the last logical batch was never stepped.
        """
        if part.index == 0:
            if self._fired or self._pending is not None or self._sums is not None:
                raise PrivacyError(
                    "the loader's last batch was backpropagated but never stepped. Each of its "
                    "batches is a whole logical batch: call optimizer.step() after each, or "
                    "optimizer.zero_grad() to drop it. For larger batches make the plan's batch "
                    "larger and bound memory with max_physical_batch_size. If you did call step(): "
                    "was it on the optimizer given to engine.attach()?"
                )
            self.drop()
        self.part = part

    def end(self, complete: bool) -> None:
        """The loader's iteration is over, or was left early."""
        self.part = None
        if not complete:
            self.drop()

    def _collect(self) -> None:
        """Clip what the backwards since the last call left on the tapes and add it up."""
        fired, self._fired = self._fired, []
        if not fired:
            return
        if len(fired) > 1:
            for batch in fired:
                batch.tape.close()
            raise PrivacyError(
                f"{len(fired)} forward passes of the model went into one backward. If they are on "
                "the same examples, make them in one forward of a wrapping module, so that an "
                "example's gradients are clipped together; if not, call backward() after each."
            )
        tape, part = fired[0]
        with full_precision():
            self._clip(tape, part)

    def _clip(self, tape: Tape, part: PhysicalBatch | None) -> None:
        norms = tape.norms()
        weights = self._weights(tape, part).to(norms)
        norms = norms * weights
        c = coefficients(norms, self.plan.max_example_norm, self.plan.clipping_fn)
        c = c * (weights > 0)
        clipped = tape.clipped_sum(c * weights)
        self._norms.append(torch.stack([norms, c])[:, weights > 0].detach())
        tape.close()
        self._pending = _add(self._pending, clipped)

    def _weights(self, tape: Tape, part: PhysicalBatch | None) -> Tensor:
        """[B]: what turns a tape's gradients into those of each example's own loss; 0 for padding.

        Raises:
            PrivacyError: where the batch is not the one that the loader handed out, or the loss is
                not reduced as the plan says.
        """
        b = tape.batch_size
        scale = self._loss_scale(tape)
        weights = torch.full((b,), scale)
        if part is None:
            return weights
        rows = part.examples + part.padding
        if b != rows:
            raise PrivacyError(
                f"the model was given {b} rows where the loader handed out {rows} examples. Each "
                "row must be one example: augmented views of an example go on an axis of their "
                "own, so that its gradients are clipped together, and examples may not be paired, "
                "selected or mixed after the loader."
            )
        place = (part.logical_step, part.index)
        if place in self._seen or place in self._pending_places:
            raise PrivacyError(
                "two backwards were made through the model on one batch: each example would count "
                "twice. Add the losses and call backward() once, or call optimizer.zero_grad() between "
                "them to drop the first."
            )
        self._pending_places.add(place)
        if part.padding:
            weights[part.examples :] = 0
        return weights

    def _loss_scale(self, tape: Tape) -> float:
        """What makes the tape's gradients those of each example's own loss.

        Raises:
            PrivacyError: for a loss that was not followed, is reduced otherwise than the plan says,
                or is multiplied by a factor that is not the same throughout the run.
        """
        b, mean = tape.batch_size, self.plan.loss_reduction == "mean"
        if tape.loss is None:
            raise PrivacyError(
                "the loss could not be followed from the model's outputs to backward(), so it may "
                "mix examples. Compute it from what the model returns (tensors in tuples, lists, "
                "dicts or dataclasses) with torch functions, and call loss.backward()."
            )
        kind, factors = tape.loss.kind, tape.loss.factors
        scale = float(b) if mean else 1.0
        if kind == PER_EXAMPLE or b == 1:
            return 1.0
        if kind != self.plan.loss_reduction:
            # A sum divided by the number of rows is a mean, and a mean times it a sum.
            factors = tuple(f * b if mean else f / b for f in factors)
            if not all(math.isclose(f, 1.0, rel_tol=1e-6) for f in factors):
                raise PrivacyError(
                    f"the loss is a {kind} over the examples, but the engine was told "
                    f"loss_reduction={self.plan.loss_reduction!r}: gradients would be off by the "
                    f"batch size. Use loss_reduction={kind!r}, without dividing by anything that "
                    "depends on the batch."
                )
        before = self.loss_factors
        if before is None:
            self.loss_factors = factors
        elif len(before) != len(factors) or not all(
            math.isclose(f, g, rel_tol=1e-6) for f, g in zip(factors, before, strict=True)
        ):
            raise PrivacyError(
                f"the terms of the loss are multiplied by {_list(factors)}, before by "
                f"{_list(before)}. A factor that depends on the batch (a number of tokens, a sum of "
                "weights) lets one example rescale all others. Use public constants, and the "
                "learning rate for a schedule."
            )
        return scale

    def hold(self, what: str = "virtual_step") -> None:
        """Clip what has arrived and keep it for this step.

        Raises:
            PrivacyError: if no gradient has arrived.
        """
        self._collect()
        if self._pending is None:
            raise PrivacyError(
                f"optimizer.{what}() without a backward: no gradient has arrived since the last "
                "step. Call loss.backward() on a loss computed from model(...) first; a forward "
                "under torch.no_grad() does not count."
            )
        self._sums = _add(self._sums, self._pending)
        self._pending = None
        self._seen |= self._pending_places
        self._pending_places = set()

    def take(self) -> ClippedSum:
        """The sum of the complete batch; this object is empty afterwards."""
        assert self._sums is not None
        clipped = ClippedSum(self._sums, self.plan.max_grad_norm)
        self._sums = None
        self._summarise()
        return clipped

    def discard(self) -> None:
        """``zero_grad``: drop what was not stepped."""
        self._pending = None
        self._pending_places = set()
        for batch in self._fired:
            batch.tape.close()
        self._fired = []

    def drop(self) -> None:
        """A logical batch that was left half done is drawn again: nothing of it may remain."""
        self.discard()
        self._sums = None
        self._norms = []
        self._seen = set()

    def _summarise(self) -> None:
        norms, c = torch.cat(self._norms, 1) if self._norms else torch.zeros(2, 0)
        finite = norms.isfinite()
        clipped = (c * norms < norms * (1 - 1e-6)) & finite
        n = norms.numel()
        self.diagnostics = StepDiagnostics(
            examples=n,
            mean_norm=norms[finite].mean().item() if bool(finite.any()) else math.nan,
            clipped_fraction=clipped.float().mean().item() if n else math.nan,
            dropped=int((~finite).sum()),
        )
        self._norms = []
        self._seen = set()


def _add(total: dict[str, Tensor] | None, more: dict[str, Tensor]) -> dict[str, Tensor]:
    if total is None:
        return more
    for name, value in more.items():
        total[name].add_(value)
    return total


def _list(factors: tuple[float, ...]) -> str:
    return ", ".join(f"{f:.6g}" for f in factors)
