"""Accumulate clipped gradients over the backward passes of one logical batch; check that each example
is counted exactly once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor

from dptorch.clipping import COUNTS, ClippingGroup, centred_counts, coefficients, noise_scales
from dptorch.clipping.sums import ClippedSum, RoundedSum
from dptorch.distributed.placement import Placement
from dptorch.engine.batch_checks import (
    check_factors,
    check_rows,
    gradient_scale,
    planned_factors,
)
from dptorch.engine.diagnostics import StepDiagnostics, summarise
from dptorch.errors import PrivacyError, warn
from dptorch.plan import PrivacyPlan
from dptorch.sampling import PhysicalBatch
from dptorch.tape import Tape
from dptorch.tape.gradients.explain import Explanation
from dptorch.tape.gradients.tape import TapeListener
from dptorch.tape.provenance.tags import Reduced
from dptorch.tape.recording.position_means import Mean, changed_mean
from dptorch.tape.recording.taps import full_precision

__all__ = ["LogicalBatch"]

_NOT_ATTACHED = (
    "a backward went through the model, and no optimizer is attached to its engine: its parameters "
    "got no .grad, so a step of any optimizer leaves them as they are. Call "
    "engine.attach(optimizer) before training; passes on public data go inside engine.public()."
)

_TOGETHER = (
    "call backward() once, on the sum of their losses, so that an example's gradients are clipped "
    "together. See docs/migrating.md, 'Several forward passes'."
)
_PADDED = (
    "a mean was taken over {1} values of each example, and over {0} in an earlier batch. If examples "
    "are padded to the longest of their batch, that length, which depends on other examples, scales "
    "every gradient. Pad to a constant length, or divide the sum of each example's own positions by "
    "their number: (losses * mask).sum(1) / mask.sum(1)."
)
_TWICE = (
    "two backwards were made through the model on one batch: each example would count twice. Call "
    f"optimizer.zero_grad() between them to drop the first. If both count, {_TOGETHER}"
)
_NO_OWNERS = (
    "unit='user', and a batch did not come from engine.loader: it is not known whose rows these are, "
    "so that one user's rows could add up to many times max_grad_norm. The step was neither taken nor "
    "counted. Take batches from engine.loader(dataset, user_ids=...)."
)


@dataclass
class Accumulated:
    """What clipped physical batches add up to.

    Attributes:
        sums: by parameter name; None where nothing was added.
        measured: norms and coefficients of each physical batch, [2, groups, B].
        places: (logical step, index) of the physical batches that came from the engine's loader.
        rows: the rows of batches of the user's own, by what stands for the batch.
    """

    sums: dict[str, Tensor] | None = None
    measured: list[Tensor] = field(default_factory=list)
    places: set[tuple[int, int]] = field(default_factory=set)
    rows: dict[object, set[int]] = field(default_factory=dict)

    def merge(self, other: Accumulated) -> None:
        """Add another accumulation, whose tensors may be used up."""
        if self.sums is None:
            self.sums = other.sums
        elif other.sums is not None:
            for name, value in other.sums.items():
                self.sums[name].add_(value)
        self.measured += other.measured
        self.places |= other.places
        for batch, rows in other.rows.items():
            self.rows.setdefault(batch, set()).update(rows)


@dataclass
class _Batch:
    """A tape that gradients have reached, and what was clipped of it so far.

    `part` is the physical batch its forward pass was made on (None without the engine's loader);
    `losses` are those of its backwards;
    `weights` [B] turn its gradients into those of each example's own loss; norms, coefficients and
    sums are those of the groups that have been clipped.
    """

    tape: Tape
    part: PhysicalBatch | None
    losses: list[Reduced | None]
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
        self._losses: list[Reduced | None] = []

    def on_first_gradient(self, tape: Tape) -> None:
        """Note that gradients reach the tape."""
        self._logical._fired.append(_Batch(tape, self._part, self._losses))

    def on_group(self, tape: Tape, group: int) -> None:
        """Clip a group whose gradients have all arrived."""
        self._logical._clip(self._logical._only_batch(), group)

    def on_norms(self, tape: Tape) -> None:
        """Weigh the gradients of the second pass."""
        self._logical._between_passes()

    def on_backward_end(self, tape: Tape, *, retained: bool) -> None:
        """Clip what has arrived, before the memory of the batch can be used again."""
        if not retained:
            self._logical._collect()

    def on_backward_begin(self, tape: Tape) -> float:
        """Note the loss. A mean loss is seeded with B, so that no gradient is divided by it."""
        self._losses.append(tape.loss)
        return self._logical._wanted_seed(tape)


class LogicalBatch:
    """Collects the per-example gradients of one step, clips them and adds them up.

    A step's gradients pass three stations: the *tapes* that backwards have reached; what is *pending*
    since the last step, clipped, and dropped by ``zero_grad``; and what ``virtual_step``, or a step on
    a part of the batch, has *kept* for the step. All-layer clipping waits for
    the end of the backward; where its graph was retained, for the step or the next forward pass, so
    that several backwards through one forward pass are clipped together. Under a group-wise style a
    group is clipped in the backward, once it is complete.

    Args:
        plan: says how to clip and how the loss is reduced.
        groups: what is clipped together; all parameters are in one of them.
        placement: knows which part of a gradient this rank has.

    Attributes:
        part: where the batch that the engine's loader handed out last belongs; None without one.
        diagnostics: of the last complete batch; NOT PRIVATE.
        loss_factors: what the terms of the loss were multiplied by in the run's first backward.
        explanation: how the last backward was computed.
        clipping_norms: each group's norm; constant unless clipping is adaptive.
        attached: whether there is an optimizer to step on what is collected.

    Guarantees:
        One row of the batches that went in contributes at most ``clipping_norms[i]`` to the part of
        group i in the sum that `pop_sum` returns. Where the unit is the user, all rows of a user
        together do, for each time that the loader drew the user
        (`test_a_user_moves_a_sum_by_at_most_the_bound`): batches that are not from the loader are
        refused, since it is not known whose rows they are
        (`test_batches_of_a_loader_of_ones_own_are_refused_for_users`).
    """

    def __init__(
        self, plan: PrivacyPlan, groups: Sequence[ClippingGroup], placement: Placement
    ) -> None:
        self.plan = plan
        self._formed, self._norms = placement.formed, placement.norms
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
        self._means: Sequence[Mean] = ()
        self._warned_means = False
        self._fired: list[_Batch] = []
        self._pending = Accumulated()
        self._kept = Accumulated()
        self._released: int | None = None  # the loader's step that the last sum was of
        self._refused: PrivacyError | None = None  # why what came after it cannot be stepped on

    @property
    def groups_in_backward(self) -> tuple[tuple[str, ...], ...]:
        """The groups of parameters that are clipped in the backward; none if all are one group."""
        several = self.groups if len(self.groups) > 1 else ()
        return tuple(tuple(group.parameters) for group in several)

    def begin_forward(self) -> TapeListener:
        """A forward pass begins; returns what its tape reports to."""
        if (
            (self._fired or self._pending.sums)
            and not self.attached
            and not self._warned_not_attached
        ):
            self._warned_not_attached = True
            warn(_NOT_ATTACHED)
        self._collect()
        return _Listener(self, self.part)

    def begin_physical_batch(self, part: PhysicalBatch) -> None:
        """The engine's loader hands out a physical batch.

        Raises:
            PrivacyError: if the last logical batch was never stepped.
        """
        if part.index == 0:
            left = {step for step, _ in self._pending.places}
            if self._released is not None and left <= {self._released} and not self._fired:
                # A generator's backward went through the model after the step: nothing is owed to it.
                self.drop_pending()
            if self._fired or self._pending.sums or self._kept.sums:
                if not self.attached:
                    raise PrivacyError(_NOT_ATTACHED)
                raise PrivacyError(
                    "the loader's last batch was backpropagated but never stepped. Each of its "
                    "batches is a whole logical batch: call optimizer.step() after each, or "
                    "optimizer.zero_grad() to drop it. For larger batches make the plan's batch "
                    "larger and bound memory with max_physical_batch_size. If you did call step(): "
                    "was it on the optimizer given to engine.attach()?"
                )
            self.reset()
        self.part = part

    def end_epoch(self, *, complete: bool) -> None:
        """The loader's iteration is over, or was left early."""
        self.part = None
        if not complete:
            self.reset()

    def _collect(self) -> None:
        """Clip what the backwards since the last call left on the tapes and add it up."""
        if not self._fired:
            return
        batch = self._joined_batch()
        self._fired = []
        self._weights(batch)
        if self._refused is not None:
            batch.tape.close()
            return
        with full_precision():
            batch.tape.resolve()
            for i in range(len(self.groups)):
                self._clip(batch, i)
        tape = batch.tape
        self.explanation = Explanation(
            tape.config.mode, tape.made_two_passes, tuple(tape.sites), tape.config.device_cost
        )
        self._look_at_means(tape)
        tape.close()
        present = self._weights(batch) > 0
        norms, factors = (
            torch.stack([each[i] for i in range(len(self.groups))]).detach()[:, present]
            for each in (batch.norms, batch.coefficients)
        )
        fits = (norms <= norms.new_tensor(self.clipping_norms)[:, None]).to(norms)
        if self.plan.adaptive_clipping is not None:
            batch.sums[COUNTS] = centred_counts(fits)
        found = Accumulated(batch.sums, [torch.stack([norms, factors])])
        if batch.part is not None:
            found.places = {(batch.part.logical_step, batch.part.index)}
        elif tape.rows is not None:
            found.rows = {tape.rows[0]: set(tape.rows[1])}
        self._pending.merge(found)

    def _look_at_means(self, tape: Tape) -> None:
        """Warn of a mean over positions, whose number may be that of the batch's longest example."""
        if self._means and not self._warned_means:
            changed = changed_mean(self._means, tape.means)
            if changed is not None:
                self._warned_means = True
                warn(_PADDED.format(*changed))
        self._means = self._means or tape.means

    def _only_batch(self) -> _Batch:
        """The batch whose gradients have arrived, in the middle of a backward.

        Raises:
            PrivacyError: if there are several.
        """
        if len(self._fired) > 1:
            self._refuse_fired(
                "group-wise clipping and the second of two passes do their work within the backward, "
                "one forward pass at a time. Use clipping_style='all-layer', or stack the inputs as "
                "[B, 2, ...] in one forward of a wrapping module, see docs/migrating.md, 'Several "
                "forward passes'."
            )
        return self._fired[0]

    def _joined_batch(self) -> _Batch:
        """The batch whose gradients have arrived: all its forward passes as one, clipped together.

        Raises:
            PrivacyError: if the passes may be on different examples.
        """
        first, *others = self._fired
        if others:
            if first.part is None or any(each.part is not first.part for each in others):
                self._refuse_fired(
                    "they may be on different examples, since their rows are not from engine.loader. "
                    "If they are, call backward() after each. If they are on the same examples, take "
                    "these from engine.loader(dataset)."
                )
            if len(self.groups) > 1 or any(each.norms for each in self._fired):
                return self._only_batch()
            for other in others:
                first.tape.absorb(other.tape)
                if other.tape.seed != first.tape.seed:
                    self._refuse_fired("they were made in backwards that were seeded otherwise.")
                if other.losses != first.losses:
                    first.losses += other.losses or [None]
            self._fired = [first]
        return first

    def _refuse_fired(self, why: str) -> NoReturn:
        """Drop what has arrived, and say why it cannot be clipped together."""
        fired, self._fired = self._fired, []
        for batch in fired:
            batch.tape.close()
        raise PrivacyError(
            f"{len(fired)} forward passes of the model went into one backward, and {why}"
        )

    def _measure(self, batch: _Batch, i: int) -> Tensor:
        """Norms and coefficients of one group; what to weigh its gradients by, [B]."""
        names = None if len(self.groups) == 1 else self.groups[i].parameters
        norms = self._norms(batch.tape, names)
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
            from dptorch.clipping.rounding import rounded_sum

            sums = rounded_sum(batch.tape.per_example_gradients(), c, scales, share=self._row_share)
            batch.sums |= self._formed(names, lambda some: {n: sums[n] for n in some or sums})
            return
        asked = None if len(self.groups) == 1 else names
        batch.sums |= self._formed(asked, lambda n: batch.tape.clipped_sum(c, n, consume=True))
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
            try:
                batch.weights = self._check(batch)
            except PrivacyError as error:
                if not self._is_released(batch.part):
                    raise
                # A backward on rows that a step was taken on, such as a generator's through its
                # discriminator, counts only if there is another step.
                self._refused = error
                batch.weights = torch.zeros(batch.tape.batch_size)
        return batch.weights

    def _check(self, batch: _Batch) -> Tensor:
        """[B]: what turns a tape's gradients into those of each example's own loss; 0 for padding.

        Raises:
            PrivacyError: where the batch is not the one that the loader handed out, or the loss is
                not reduced as the plan says, or is multiplied by a factor that changes.
        """
        tape, part = batch.tape, batch.part
        b = tape.batch_size
        check_rows(b, part)
        plan = self.plan
        factors = planned_factors(batch.losses, b, plan.loss_reduction, plan.expected_batch_size)
        if factors and self.loss_factors is not None:
            check_factors(factors, self.loss_factors)
        elif factors:
            self.loss_factors = factors
        weights = torch.full((b,), self._wanted_seed(tape) / tape.seed)
        if part is None:
            if self.plan.unit == "user":
                raise PrivacyError(_NO_OWNERS)
            if tape.seen_before and tape.rows is not None and self._counted(*tape.rows):
                raise PrivacyError(_TWICE)
            return weights
        place = (part.logical_step, part.index)
        if place in self._kept.places or place in self._pending.places:
            raise PrivacyError(_TWICE)
        if part.padding:
            rows = range(b) if tape.rows is None else tape.rows[1]
            weights[torch.tensor(rows) >= part.examples] = 0
        return weights

    def _counted(self, batch: object, rows: Sequence[int]) -> bool:
        """Whether one of these rows of a batch is in the sum of this step already."""
        return any(
            not found.rows.get(batch, set()).isdisjoint(rows)
            for found in (self._kept, self._pending)
        )

    def _wanted_seed(self, tape: Tape) -> float:
        """What makes the gradients of a backward those of each example's own loss."""
        plan = self.plan
        return gradient_scale(
            tape.loss, tape.batch_size, plan.loss_reduction, plan.expected_batch_size
        )

    def add_pending(self, what: str = "virtual_step") -> None:
        """Clip what has arrived and keep it for this step.

        Raises:
            PrivacyError: if no gradient has arrived.
        """
        self._collect()
        if self._refused is not None:
            error, self._refused = self._refused, None
            raise error
        if self._pending.sums is None:
            raise PrivacyError(
                f"optimizer.{what}() without a backward: no gradient has arrived since the last "
                "step. Call loss.backward() on a loss computed from model(...) first; a forward "
                "under torch.no_grad() does not count."
            )
        self._kept.merge(self._pending)
        self._pending = Accumulated()

    def pop_sum(self) -> ClippedSum:
        """Return the sum of the complete batch; this object is empty afterwards."""
        assert self._kept.sums is not None
        plan, norms = self.plan, self.clipping_norms
        scales = noise_scales(
            self.groups,
            norms,
            plan.adaptive_clipping,
            plan.noise_multiplier,
            plan.expected_batch_size,
        )
        kind = RoundedSum if self._discrete else ClippedSum
        clipped = kind(self._kept.sums, math.hypot(*norms), scales)
        self.diagnostics = summarise(self._kept.measured)
        self._kept = Accumulated()
        self._released = None if self.part is None else self.part.logical_step
        return clipped

    def _is_released(self, part: PhysicalBatch | None) -> bool:
        """Whether the last step was taken on this part's logical batch."""
        return part is not None and part.logical_step == self._released

    def update_norms(self, noisy_counts: Tensor) -> None:
        """Move the clipping norms to where the counts of this step, with their noise, point."""
        assert self.plan.adaptive_clipping is not None
        self.clipping_norms = self.plan.adaptive_clipping.follow(
            self.clipping_norms, noisy_counts, self.plan.expected_batch_size
        )

    def drop_pending(self) -> None:
        """Drop what was backpropagated since the last step: ``zero_grad``."""
        self._pending = Accumulated()
        self._refused = None
        for batch in self._fired:
            batch.tape.close()
        self._fired = []

    def reset(self) -> None:
        """Drop the whole logical batch. One that was left half done is drawn again."""
        self.drop_pending()
        self._kept = Accumulated()
