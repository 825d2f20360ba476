"""What the backwards of one logical batch add up to: clipped sums, and checks that each example is in
them once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dptorch.clipping import COUNTS, ClippingGroup, centred_counts, coefficients, noise_scales
from dptorch.clipping.rounding import rounded_sum
from dptorch.clipping.sums import ClippedSum, RoundedSum
from dptorch.errors import PrivacyError, warn
from dptorch.plan import PrivacyPlan
from dptorch.sampling import PhysicalBatch
from dptorch.tape import Tape
from dptorch.tape.gradients.explain import Explanation
from dptorch.tape.gradients.tape import TapeListener
from dptorch.tape.provenance.tags import PER_EXAMPLE
from dptorch.tape.recording.taps import full_precision

__all__ = ["LogicalBatch", "StepDiagnostics"]

_NOT_ATTACHED = (
    "a backward went through the model, and no optimizer is attached to its engine: its parameters "
    "got no .grad, so a step of any optimizer leaves them as they are. Call "
    "engine.attach(optimizer) before training; passes on public data go inside engine.public()."
)

_NO_OWNERS = (
    "unit='user', and a batch did not come from engine.loader: it is not known whose rows these are, "
    "so that one user's rows could add up to many times max_grad_norm. The step was neither taken nor "
    "counted. Take batches from engine.loader(dataset, user_ids=...)."
)


@dataclass(frozen=True)
class StepDiagnostics:
    """Exact functions of private data in the last logical batch: NOT PRIVATE. Do not publish.

    Attributes:
        examples: how many examples were in it.
        mean_norm: mean per-example gradient norm (NaN if there was none).
        clipped_fraction: fraction whose contribution was scaled down; under a group-wise style the
            fraction of all groups' contributions.
        dropped: how many were dropped, in whole or in some group, because their gradient was not
            finite.
        coefficients: least, median and largest clipping coefficient (NaN if there was no example).
    """

    examples: int
    mean_norm: float
    clipped_fraction: float
    dropped: int
    coefficients: tuple[float, float, float]


@dataclass
class _Batch:
    """A tape that gradients have reached, and what was clipped of it so far.

    `part` is the physical batch its forward pass was made on (None without the engine's loader);
    `weights` [B] turn its gradients into those of each example's own loss; norms, coefficients and
    sums are those of the groups that have been clipped.
    """

    tape: Tape
    part: PhysicalBatch | None
    weights: Tensor | None = None
    norms: dict[int, Tensor] = field(default_factory=dict)
    coefficients: dict[int, Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)


class _Listener:
    """Passes on what the tape of one forward pass reports.

    Args:
        logical: collects the gradients.
        part: the physical batch that the forward pass is made on.
    """

    def __init__(self, logical: LogicalBatch, part: PhysicalBatch | None) -> None:
        self._logical = logical
        self._part = part

    def on_first_gradient(self, tape: Tape) -> None:
        """Note that gradients reach the tape."""
        self._logical._fired.append(_Batch(tape, self._part))

    def on_group(self, tape: Tape, group: int) -> None:
        """Clip a group whose gradients have all arrived."""
        self._logical._clip(self._logical._only_batch(), group)

    def on_norms(self, tape: Tape) -> None:
        """Weigh the gradients of the second pass."""
        self._logical._between_passes()


class LogicalBatch:
    """Collects the per-example gradients of one step, clips them and adds them up.

    A step's gradients pass three stations: the *tapes* that backwards have reached; what is
    *pending* since the last step, clipped, and dropped by ``zero_grad``; and the *sums* that
    ``virtual_step``, or a step on a part of the batch, has put aside. All-layer clipping waits until
    the step or the next forward pass, so that several backwards through one forward pass are clipped
    together. Under a group-wise style a group is clipped in the backward, once it is complete.

    Args:
        plan: says how to clip and how the loss is reduced.
        groups: what is clipped together; all parameters are in one of them.

    Attributes:
        part: where the batch that the engine's loader handed out last belongs; None without one.
        diagnostics: of the last complete batch; NOT PRIVATE.
        loss_factors: what the terms of the loss were multiplied by in the run's first backward.
        explanation: how the last backward was computed.
        clipping_norms: each group's norm; constant unless clipping is adaptive.
        attached: whether there is an optimizer to step on what is collected.

    Guarantees:
        One row of the batches that went in contributes at most ``clipping_norms[i]`` to the part of
        group i in the sum that `take` returns. Where the unit is the user, all rows of a user
        together do, for each time that the loader drew the user
        (`test_a_user_moves_a_sum_by_at_most_the_bound`): batches that are not from the loader are
        refused, since it is not known whose rows they are
        (`test_batches_of_a_loader_of_ones_own_are_refused_for_users`).
    """

    def __init__(self, plan: PrivacyPlan, groups: Sequence[ClippingGroup]) -> None:
        self.plan = plan
        self._discrete = plan.mechanism == "discrete_gaussian"
        self.groups = tuple(groups)
        self.clipping_norms = [group.max_grad_norm for group in groups]
        # Of a user's bound, what each of its rows may use.
        self._row_share = plan.max_example_norm / plan.max_grad_norm
        self.attached = False
        self._warned_not_attached = False
        self.part: PhysicalBatch | None = None
        self.diagnostics: StepDiagnostics | None = None
        self.loss_factors: tuple[float, ...] | None = None
        self.explanation: Explanation | None = None
        self._fired: list[_Batch] = []
        self._pending: dict[str, Tensor] | None = None
        self._sums: dict[str, Tensor] | None = None
        self._measured: list[Tensor] = []  # of _sums: norms and coefficients, [2, groups, B]
        self._pending_measured: list[Tensor] = []
        self._seen: set[tuple[int, int]] = set()  # physical batches in _sums
        self._pending_places: set[tuple[int, int]] = set()  # and in _pending

    @property
    def groups_in_backward(self) -> tuple[tuple[str, ...], ...]:
        """The groups of parameters that are clipped in the backward; none if all are one group."""
        if len(self.groups) == 1:
            return ()
        return tuple(tuple(group.parameters) for group in self.groups)

    def begin_forward(self) -> TapeListener:
        """A forward pass begins; returns what its tape reports to."""
        if self._fired and not self.attached and not self._warned_not_attached:
            self._warned_not_attached = True
            warn(_NOT_ATTACHED)
        self._collect()
        return _Listener(self, self.part)

    def begin(self, part: PhysicalBatch) -> None:
        """The engine's loader hands out a physical batch.

        Raises:
            PrivacyError: if the last logical batch was never stepped.
        """
        if part.index == 0:
            if self._fired or self._pending is not None or self._sums is not None:
                if not self.attached:
                    raise PrivacyError(_NOT_ATTACHED)
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
        if not self._fired:
            return
        batch = self._only_batch()
        self._fired = []
        with full_precision():
            batch.tape.resolve()
            for i in range(len(self.groups)):
                self._clip(batch, i)
        tape = batch.tape
        self.explanation = Explanation(
            tape.config.mode, tape.made_two_passes, tuple(tape.sites), tape.config.device_cost
        )
        tape.close()
        present = self._weights(batch) > 0
        norms, factors = (
            torch.stack([found[i] for i in range(len(self.groups))]).detach()[:, present]
            for found in (batch.norms, batch.coefficients)
        )
        fits = (norms <= norms.new_tensor(self.clipping_norms)[:, None]).to(norms)
        if self.plan.adaptive_clipping is not None:
            batch.sums[COUNTS] = centred_counts(fits)
        self._pending_measured.append(torch.stack([norms, factors]))
        self._pending = _add(self._pending, batch.sums)

    def _only_batch(self) -> _Batch:
        """The batch whose gradients have arrived.

        Raises:
            PrivacyError: if there are several.
        """
        fired = self._fired
        if len(fired) > 1:
            self._fired = []
            for batch in fired:
                batch.tape.close()
            raise PrivacyError(
                f"{len(fired)} forward passes of the model went into one backward. If they are on "
                "the same examples, make them in one forward of a wrapping module, so that an "
                "example's gradients are clipped together; if not, call backward() after each."
            )
        return fired[0]

    def _measure(self, batch: _Batch, i: int) -> Tensor:
        """Norms and coefficients of one group; what to weigh its gradients by, [B]."""
        names = None if len(self.groups) == 1 else self.groups[i].parameters
        norms = batch.tape.norms(names)
        weights = self._weights(batch).to(norms)
        norms = norms * weights
        bound = self.clipping_norms[i] * self._row_share
        c = coefficients(norms, bound, self.plan.clipping_fn) * (weights > 0)
        batch.norms[i], batch.coefficients[i] = norms, c
        return c * weights

    def _clip(self, batch: _Batch, i: int) -> None:
        """Add one group's clipped gradients up, unless it was done in the backward."""
        if i in batch.norms and len(self.groups) > 1:
            return
        names = self.groups[i].parameters
        if i in batch.norms:  # the sums were made by the second of two passes
            c = batch.coefficients[i] * self._weights(batch).to(batch.coefficients[i])
        else:
            c = self._measure(batch, i)
        if self._discrete:
            scales = dict.fromkeys(names, self.plan.max_grad_norm)
            gradients = batch.tape.per_example_gradients()
            batch.sums |= rounded_sum(gradients, c, scales, share=self._row_share)
            return
        batch.sums |= batch.tape.clipped_sum(
            c, None if len(self.groups) == 1 else names, consume=True
        )
        if len(self.groups) > 1:
            batch.tape.free(names)

    def _between_passes(self) -> None:
        """The first of two backward passes is over: hand the tape its coefficients."""
        batch = self._only_batch()
        with full_precision():
            c = self._measure(batch, 0)
        batch.tape.weigh(dict.fromkeys(self.groups[0].parameters, c))

    def _weights(self, batch: _Batch) -> Tensor:
        if batch.weights is None:
            batch.weights = self._check(batch.tape, batch.part)
        return batch.weights

    def _check(self, tape: Tape, part: PhysicalBatch | None) -> Tensor:
        """[B]: what turns a tape's gradients into those of each example's own loss; 0 for padding.

        Raises:
            PrivacyError: where the batch is not the one that the loader handed out, or the loss is
                not reduced as the plan says.
        """
        b = tape.batch_size
        scale = self._loss_scale(tape)
        weights = torch.full((b,), scale)
        if part is None:
            if self.plan.unit == "user":
                raise PrivacyError(_NO_OWNERS)
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
        self._measured += self._pending_measured
        self._pending_measured = []
        self._seen |= self._pending_places
        self._pending_places = set()

    def take(self) -> ClippedSum:
        """The sum of the complete batch; this object is empty afterwards."""
        assert self._sums is not None
        plan, norms = self.plan, self.clipping_norms
        scales = noise_scales(
            self.groups,
            norms,
            plan.adaptive_clipping,
            plan.noise_multiplier,
            plan.expected_batch_size,
        )
        kind = RoundedSum if self._discrete else ClippedSum
        clipped = kind(self._sums, math.hypot(*norms), scales)
        self._sums = None
        self._summarise()
        return clipped

    def follow(self, noisy_counts: Tensor) -> None:
        """Move the clipping norms to where the counts of this step, with their noise, point."""
        assert self.plan.adaptive_clipping is not None
        self.clipping_norms = self.plan.adaptive_clipping.follow(
            self.clipping_norms, noisy_counts, self.plan.expected_batch_size
        )

    def discard(self) -> None:
        """``zero_grad``: drop what was not stepped."""
        self._pending = None
        self._pending_measured = []
        self._pending_places = set()
        for batch in self._fired:
            batch.tape.close()
        self._fired = []

    def drop(self) -> None:
        """A logical batch that was left half done is drawn again: nothing of it may remain."""
        self.discard()
        self._sums = None
        self._measured = []
        self._seen = set()

    def _summarise(self) -> None:
        none = torch.zeros(2, len(self.groups), 0)
        norms, c = torch.cat(self._measured, 2) if self._measured else none
        whole = norms.square().sum(0).sqrt()
        finite = whole.isfinite()
        clipped = (c * norms < norms * (1 - 1e-6)) & norms.isfinite()
        n = whole.numel()
        spread = (c.min(), c.median(), c.max()) if n else (torch.tensor(math.nan),) * 3
        self.diagnostics = StepDiagnostics(
            examples=n,
            mean_norm=whole[finite].mean().item() if bool(finite.any()) else math.nan,
            clipped_fraction=clipped.float().mean().item() if n else math.nan,
            dropped=int((~finite).sum()),
            coefficients=(float(spread[0]), float(spread[1]), float(spread[2])),
        )
        self._measured = []
        self._seen = set()


def _add(total: dict[str, Tensor] | None, more: dict[str, Tensor]) -> dict[str, Tensor]:
    if total is None:
        return more
    for name, value in more.items():
        total[name].add_(value)
    return total


def _list(factors: tuple[float, ...]) -> str:
    return ", ".join(f"{f:.6g}" for f in factors)
