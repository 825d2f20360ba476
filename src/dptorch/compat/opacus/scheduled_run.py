"""The private training of one model: an engine, or several in turn under a schedule."""

from __future__ import annotations

import secrets
import weakref
from collections.abc import Sequence
from dataclasses import replace

from torch import nn
from torch.optim import Optimizer

from dptorch.accounting import Event
from dptorch.compat.opacus.clipping import check_count_noise
from dptorch.engine.privacy_engine import PrivacyEngine
from dptorch.errors import ConfigurationError, warn
from dptorch.plan import PrivacyPlan
from dptorch.sampling import PrivateLoader
from dptorch.sampling.schemes import OWN_LOADER
from dptorch.tape.recording.batch_dims import BatchDims

__all__ = ["ScheduledRun", "run_of"]

_RUNS: weakref.WeakKeyDictionary[nn.Module, ScheduledRun] = weakref.WeakKeyDictionary()

# What of a plan a schedule changes, directly or not.
_SCHEDULED = ("noise_multiplier", "target_epsilon", "max_grad_norm", "clipping_groups", "steps")


class ScheduledRun:
    """A model, its optimizer, and the engines that train it.

    A plan never changes. A schedule of noise or of clipping norms is therefore a sequence of plans,
    each with an engine of its own, and costs what all their events composed cost.

    Args:
        model, optimizer: as for `dptorch.PrivacyEngine`.
        plan: the first plan.
        clipping_mode, batch_dims, seed: as for `dptorch.PrivacyEngine`.

    Attributes:
        identity: tells this run from others, also once it goes on from a checkpoint.
        past: what was released before, for a run that goes on from a checkpoint.
        engines: all so far; the last is the one at work.
        loader: what `DPDataLoader` iterates now.
        ended: whether the model was taken off it, by `end` or by a later run of the same model.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        plan: PrivacyPlan,
        *,
        clipping_mode: str = "auto",
        batch_dims: BatchDims = 0,
        seed: int | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.identity = secrets.token_hex(8)
        self.past: list[Event] = []
        self.engines: list[PrivacyEngine] = []
        self.loader: PrivateLoader | None = None
        self.ended = False
        self._clipping_mode = clipping_mode
        self._batch_dims = batch_dims
        self._seed = seed
        # A model may be made private again, as in every round of federated learning.
        before = _RUNS.get(model)
        if before is not None:
            before.end()
        self._begin(plan)
        _RUNS[model] = self

    def end(self) -> None:
        """Take the engine off the model. What was spent stays counted."""
        if not self.ended:
            self.ended = True
            self.engine.detach()

    def _begin(self, plan: PrivacyPlan) -> None:
        check_count_noise(plan)
        phase = len(self.engines)
        engine = PrivacyEngine(
            self.model,
            plan=plan,
            clipping_mode=self._clipping_mode,
            batch_dims=self._batch_dims,
            self_check=phase == 0,
            # Streams are counted from the engine's first step: each phase needs a key of its own.
            seed=None if self._seed is None else self._seed + phase,
        )
        try:
            engine.attach(self.optimizer)
        except BaseException:
            engine.detach()
            raise
        self.engines.append(engine)

    @property
    def engine(self) -> PrivacyEngine:
        """The engine at work."""
        return self.engines[-1]

    @property
    def plan(self) -> PrivacyPlan:
        """The plan at work."""
        return self.engine.plan

    @property
    def steps_done(self) -> int:
        """Steps of all engines."""
        return sum(event.steps for event in self.past) + sum(e.steps_done for e in self.engines)

    def history(self) -> list[Event]:
        """All that was released, for an accountant."""
        return [*self.history_before(), *_events_of([self.engine])]

    def history_before(self) -> list[Event]:
        """What was released before the engine at work."""
        return [*self.past, *_events_of(self.engines[:-1])]

    def take_up(self, plan: PrivacyPlan) -> None:
        """Go on under the plan of a checkpoint, which a schedule had come to.

        Raises:
            ConfigurationError: it differs from this run's first plan in more than a schedule changes.
        """
        mine = self.plan
        scheduled = {name: getattr(mine, name) for name in _SCHEDULED}
        if replace(plan, **scheduled) != mine or self.steps_done:
            raise ConfigurationError(
                "the checkpoint belongs to another plan (this run's, the checkpoint's): "
                + "; ".join(mine.differences(plan))
            )
        self.engine.detach()
        self.engines.clear()
        self._begin(plan)

    def change(
        self, *, noise_multiplier: float | None = None, max_grad_norm: float | None = None
    ) -> None:
        """Go on with other noise or another clipping norm, which must be public constants.

        Raises:
            ConfigurationError: a value out of range, or in the middle of a logical batch.
        """
        plan = self.plan
        new = plan
        if noise_multiplier is not None and noise_multiplier != plan.noise_multiplier:
            if plan.target_epsilon is not None:
                warn(
                    f"the noise was chosen for epsilon={plan.target_epsilon:g} at the end of the "
                    "run, without a schedule: with one the run ends at another epsilon. "
                    "get_epsilon() counts the noise of every step."
                )
            new = replace(new, noise_multiplier=float(noise_multiplier), target_epsilon=None)
        if max_grad_norm is not None and max_grad_norm != plan.max_grad_norm:
            ratio = float(max_grad_norm) / plan.max_grad_norm
            groups = tuple(
                replace(g, max_grad_norm=g.max_grad_norm and g.max_grad_norm * ratio)
                for g in plan.clipping_groups
            )
            new = replace(new, max_grad_norm=float(max_grad_norm), clipping_groups=groups)
        if new == plan:
            return
        at = None if self.loader is None else self.loader.current
        if at is not None and not at.is_last:
            raise ConfigurationError(
                "noise and clipping norm cannot change within a logical batch, of which only a part "
                "has been through the model. Step the scheduler once an epoch, or outside "
                "BatchMemoryManager."
            )
        engine = self.engine
        if engine.exhausted:
            return  # nothing will be released under the new plan
        if plan.adaptive_clipping is not None and max_grad_norm is None:
            new = replace(new, max_grad_norm=engine.max_grad_norm)
        engine.detach()
        if not engine.steps_done:
            self.engines.pop()
        self._begin(replace(new, steps=plan.steps - engine.steps_done))


def _events_of(engines: Sequence[PrivacyEngine]) -> list[Event]:
    found: list[Event] = []
    for e in engines:
        own = e.sampling_run[OWN_LOADER]
        found += e.plan.history(e.steps_done, own_loader_steps=own)
    return [event for event in found if event.steps]


def run_of(model: nn.Module) -> ScheduledRun | None:
    """Return the run that `model` is in, if any."""
    run = _RUNS.get(model)
    return None if run is None or run.ended else run
