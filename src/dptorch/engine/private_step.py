"""The private step: count it, clip, add noise, and hand the noisy gradient to the optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dptorch.clipping import COUNTS
from dptorch.clipping.sums import ClippedSum
from dptorch.distributed.placement import Placement
from dptorch.engine import checkpoint
from dptorch.engine.logical_batch import LogicalBatch
from dptorch.engine.optimizer_binding import check_parameters, write_gradients
from dptorch.engine.run_state import RunState
from dptorch.errors import BudgetExhausted, PrivacyError, warn
from dptorch.noise import get_mechanism
from dptorch.noise.fingerprint import fingerprint
from dptorch.noise.noisy_gradient import NoisyGradient
from dptorch.sampling.parts import PhysicalBatch

__all__ = ["NOT_SHARED", "PrivateStep"]

NOT_SHARED = (
    "a batch did not come from engine.loader(), and it is not known whether another rank has the same "
    "examples, as samplers give them that fill up the last batch: they would count twice. The step was "
    "neither taken nor counted. Take batches from engine.loader(dataset), which gives each rank its "
    "share."
)

NOT_APART = (
    "a batch did not come from engine.loader() in a loop that goes on (next(iter(loader)) ends one at "
    "once, and no batch may be skipped), and noise that is correlated over steps hides a record "
    "only if it does not take part again too soon: the engine's sampler keeps participations apart, "
    "and no other is known to. The step was neither taken nor counted. Take batches from "
    "engine.loader(dataset), or use mechanism='gaussian', which accounts for any loader."
)


class PrivateStep:
    """Takes the steps of a run.

    Args:
        run: counts them.
        batch: adds up the clipped gradients of each.
        model: what is trained.
        parameters: its trainable parameters, by name.
        placement: where they are.
        private: False takes ordinary steps, for comparison.
        on_exhausted: what a step past the plan does, "raise" or "stop".
        secure_rng: see `dptorch.PrivacyEngine`.
    """

    def __init__(
        self,
        run: RunState,
        batch: LogicalBatch,
        model: nn.Module,
        parameters: dict[str, Tensor],
        placement: Placement,
        *,
        private: bool,
        on_exhausted: str,
        secure_rng: bool,
    ) -> None:
        self._run = run
        self._batch = batch
        self._model = model
        self._parameters = parameters
        self._placement = placement
        self._private = private
        self._on_exhausted = on_exhausted
        self._secure_rng = secure_rng
        plan = run.plan
        if plan.coefficients:
            run.noise = get_mechanism(plan.mechanism)(
                plan.noise_multiplier, plan.coefficients, plan.steps, secure_rng=secure_rng
            )
        self._ranks = run.ranks
        self._warned_exhausted = False
        self._warned_own_loader = False
        self._kept: dict[str, Tensor] = {}  # without privacy: gradients of the parts so far
        self._examples = 0

    def take(self, optimizer: Optimizer) -> bool:
        """Take the step that is due: count it, and fill ``.grad`` with the noisy gradient.

        Args:
            optimizer: the one that will step on the noisy gradient.

        Returns:
            False where there is nothing to step on: the logical batch is not complete, or the plan is
            done.
        """
        if self._run.exhausted:
            return self._refuse_step()
        part = self._batch.part
        complete = part is None or part.is_last
        if not self._private:
            return self._take_ordinary(part)
        if not complete:
            self._run.refuse_known_draws()
            self._batch.add_pending("step")
            return False
        sampled = part is not None and part.logical_step == self._run.steps_done
        clipped = self._sum_over_ranks(optimizer, sampled)
        # A seed is for repeating a run, in other physical batches and on other ranks too, which differ
        # by rounding.
        key, next_step = self._run.key, self._run.steps_done
        context = 0
        if key.source.is_private:
            context = self._placement.common(fingerprint(clipped.values, key, next_step))
        # Counted before it is visible: whatever happens from here on, the step has been spent.
        step = self._run.count_step(sampled=sampled)
        if not sampled:
            self._warn_of_own_loader()
        noisy = self._add_noise(clipped, step, context)
        write_gradients(self._parameters, noisy, self._placement.hand_over)
        return True

    def _take_ordinary(self, part: PhysicalBatch | None) -> bool:
        """Without privacy too a step waits for the last part, and is on all of them."""
        complete = part is None or part.is_last
        if part is not None:
            with torch.no_grad():
                self._add_part(part)
        self._run.steps_done += complete
        return complete

    def _add_part(self, part: PhysicalBatch) -> None:
        """Keep a part's gradients; with the last of them put what all come to in ``.grad``."""
        if part.count == 1 and part.examples:
            return
        mean = self._run.plan.loss_reduction == "mean"
        if part.index == 0:
            self._kept, self._examples = {}, 0
        self._examples += part.examples
        for name, p in self._parameters.items():
            if p.grad is not None and part.examples:
                value = p.grad * part.examples if mean else p.grad
                self._kept[name] = self._kept[name] + value if name in self._kept else value
            p.grad = None
            if part.is_last and name in self._kept:
                p.grad = self._kept[name] / self._examples if mean else self._kept[name]
        if part.is_last:
            self._kept = {}

    def _sum_over_ranks(self, optimizer: Optimizer, sampled: bool) -> ClippedSum:
        """The clipped sum of the logical batch, whichever ranks its examples are on."""
        with self._ranks.together(step=self._run.steps_done, steps_of_plan=self._run.plan.steps):
            if not sampled and self._ranks.size > 1:
                raise PrivacyError(NOT_SHARED)
            if not sampled and self._run.plan.coefficients:
                raise PrivacyError(NOT_APART)
            if sampled:
                self._run.refuse_known_draws()
            self._batch.add_pending("step")
            clipped = self._pop_clipped_sum(optimizer)
        return self._placement.add_up(clipped)

    def _pop_clipped_sum(self, optimizer: Optimizer) -> ClippedSum:
        """The sum of the logical batch, once nothing speaks against a step on it."""
        self._refuse_changed_parameters(optimizer)
        clipped = self._batch.pop_sum()
        if self._batch.diagnostics is not None and self._batch.diagnostics.dropped:
            checkpoint.refuse_not_finite(self._parameters)
        return clipped

    def _add_noise(self, clipped: ClippedSum, step: int, context: int) -> NoisyGradient:
        """The noisy gradient of a step. Adaptive clipping norms follow its noisy counts."""
        plan, key = self._run.plan, self._run.key
        divisor = plan.expected_batch_size if plan.loss_reduction == "mean" else 1.0
        noise: Any = self._run.noise
        if noise is None:
            kind = get_mechanism(plan.mechanism)
            noise = kind(plan.noise_multiplier, secure_rng=self._secure_rng)
        noisy: NoisyGradient = noise.privatize(
            clipped, key, step, context=context, offsets=self._placement.offsets, divisor=divisor
        )
        if plan.adaptive_clipping is not None:
            self._batch.update_norms(noisy.values[COUNTS] * divisor)
        return noisy

    def _refuse_changed_parameters(self, optimizer: Optimizer) -> None:
        """What is trained must still be what the engine follows and the optimizer holds."""
        now = trained_by(self._model)
        if now != {id(p) for p in self._parameters.values()}:
            raise PrivacyError(
                "the model's trainable parameters have changed since the engine was made (frozen, "
                "unfrozen, replaced or added). Freeze and unfreeze before making it: detach() this "
                "engine, and make another for the steps that remain; their epsilons add up."
            )
        check_parameters(self._parameters, optimizer)

    def _warn_of_own_loader(self) -> None:
        if not self._warned_own_loader:
            self._warned_own_loader = True
            warn(
                "a batch did not come from engine.loader() in a loop that goes on (next(iter(loader)) "
                "ends one at once), so it is not known to be drawn as the "
                f"plan says ({self._run.plan.sampling}): epsilon is stated without amplification by "
                "sampling, and is much larger. Take batches from engine.loader(dataset)."
            )

    def _refuse_step(self) -> bool:
        self._batch.reset()
        message = (
            f"all {self._run.plan.steps} steps of the plan are done "
            f"(epsilon={self._run.get_privacy_spent().epsilon:.4g}): another step would exceed the "
            "budget and was not taken. Plan more steps, or stop training here."
        )
        if self._on_exhausted == "raise":
            raise BudgetExhausted(message)
        if not self._warned_exhausted:
            self._warned_exhausted = True
            warn(message)
        return False


def trained_by(model: nn.Module) -> set[int]:
    """The ids of ``model.parameters()`` that require grad, without the names, which take longest."""
    own = type(model)
    if any(
        getattr(own, name) is not getattr(nn.Module, name)
        for name in ("parameters", "named_parameters", "named_modules")
    ):
        return {id(p) for p in model.parameters() if p.requires_grad}
    found: set[int] = set()
    modules, seen = [model], {model}
    for module in modules:
        found.update(
            id(p) for p in module._parameters.values() if p is not None and p.requires_grad
        )
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                modules.append(child)
    return found
