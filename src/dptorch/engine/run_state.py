"""PrivateRun: what was done under a plan and what it cost; the ledger and the checkpoints of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from dptorch import accounting
from dptorch.clipping import groups_of
from dptorch.engine import checkpoint
from dptorch.engine.logical_batch import LogicalBatch, StepDiagnostics
from dptorch.engine.optimizer_binding import OptimizerBinding
from dptorch.errors import ConfigurationError, PrivacyError, warn
from dptorch.plan import PrivacyPlan, PrivacySpent
from dptorch.randomness import RootKey
from dptorch.sampling.schemes import OWN_LOADER
from dptorch.statement import Statement, make_statement
from dptorch.tape.gradients.clipping_modes import NON_PRIVATE, Mode
from dptorch.tape.gradients.explain import Explanation

if TYPE_CHECKING:
    from dptorch.ledger import DatasetLedger, RunRecord

__all__ = ["PrivateRun"]


class PrivateRun:
    """A run of a plan on a model: its count of steps, its key, its books. How it takes its steps is
    for `dptorch.PrivacyEngine` to say, which is one.

    Args:
        model: what is trained.
        parameters: those of its parameters that are, by name.
        plan: what the run commits to.
        mode: "non-private" takes the noise off, and with it the guarantee.
        key: root of noise and sampling.

    Attributes:
        sampling_run: how many steps were on batches drawn by which scheme; batches that did not
            come from the engine's loader have a name of their own.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, Tensor],
        plan: PrivacyPlan,
        mode: Mode,
        key: RootKey,
    ) -> None:
        if mode is NON_PRIVATE:  # its epsilon is infinite
            plan = replace(plan, noise_multiplier=0.0, target_epsilon=None)
        groups = groups_of(
            model, parameters, plan.clipping_style, plan.clipping_groups, plan.max_grad_norm
        )
        self.model = model
        self.sampling_run: Counter[str] = Counter()
        self._plan = plan
        self._mode = mode
        self._key = key
        self._parameters = parameters
        self._batch = LogicalBatch(plan, groups)
        self._binding: OptimizerBinding | None = None
        self._steps_done = 0
        self._resumed = 0
        self._loaders = 0
        self._ledger: DatasetLedger | None = None
        self._record: RunRecord | None = None

    # -- the ledger --------------------------------------------------------------------------------

    def use_ledger(self, ledger: DatasetLedger) -> None:
        """Write every step down in `ledger` before it is released; as the argument of that name.

        Raises:
            ConfigurationError: steps were taken already, the engine has a ledger, or is not private.
        """
        if self._mode is NON_PRIVATE:
            raise ConfigurationError(
                "clipping_mode='non-private' adds no noise, and no ledger can account for that. Leave "
                "the ledger out."
            )
        if self._ledger is not None or self._loaders or self.steps_done:
            raise ConfigurationError(
                "give the engine its one ledger before its loader and its first step: what was "
                "released before would be missing in it."
            )
        self._ledger = ledger
        self._record = ledger.run(self._plan, self._key.provenance)

    def reserve_budget(self) -> None:
        """Reserve the steps to come in the ledger, as `loader` and the first step do.

        Raises:
            BudgetExhausted: the data set's cap does not leave enough.
        """
        if self._record is not None and not self.exhausted:
            self._record.open()

    def release_budget(self) -> None:
        """Give back what is reserved in the ledger for steps to come, at the end or for a pause.

        Other runs on the data set can then have it. The next step reserves anew.
        """
        if self._record is not None:
            self._record.close()

    # -- reporting ---------------------------------------------------------------------------------

    @property
    def plan(self) -> PrivacyPlan:
        """What the run committed to; it cannot be changed."""
        return self._plan

    @property
    def max_grad_norm(self) -> float:
        """Bound on one example's contribution; it moves under adaptive clipping."""
        return math.hypot(*self._batch.clipping_norms)

    def explain(self) -> Explanation:
        """How norms and clipped sums were computed in the last backward, site by site; ``print`` it.

        Raises:
            PrivacyError: before the first backward.
        """
        if self._batch.explanation is None:
            raise PrivacyError(
                "there is nothing to explain yet: what is done at a site is chosen when its gradient "
                "arrives. Take one step first."
            )
        return self._batch.explanation

    @property
    def diagnostics(self) -> StepDiagnostics | None:
        """Statistics of the last logical batch: NOT PRIVATE."""
        return self._batch.diagnostics

    @property
    def steps_done(self) -> int:
        """Steps taken, empty batches included."""
        return self._steps_done

    @property
    def exhausted(self) -> bool:
        """Whether every planned step is done."""
        return self.steps_done >= self.plan.steps

    @property
    def noise_multiplier(self) -> float:
        """Standard deviation of the noise over max_grad_norm."""
        return self.plan.noise_multiplier

    def get_privacy_spent(self) -> PrivacySpent:
        """(ε, δ) spent so far. Amplification by sampling counts only for batches that came from the
        engine's loader. With a ledger, steps that were lost when the run was killed count too."""
        own = self.sampling_run[OWN_LOADER]
        if self._record is None or not self._record.repeated_steps:
            epsilon = self.plan.epsilon(self.steps_done, own_loader_steps=own)
        else:
            epsilon = accounting.get_accountant(self.plan.accountant).epsilon(
                self._record.attempts.events(),
                self.plan.target_delta,
                adjacency=self.plan.adjacency,
            )
        return PrivacySpent(epsilon, self.plan.target_delta)

    @property
    def ledger_run(self) -> dict[str, str] | None:
        """The run's id, data set and location in the ledger, and the ledger's head now."""
        if self._ledger is None or self._record is None:
            return None
        ledger = self._ledger.ledger
        return {**self._record.name, "location": ledger.location, "head": ledger.head()}

    def statement(self) -> Statement:
        """The privacy statement of the run so far; ``print`` it."""
        record = self._record
        return make_statement(
            self.plan,
            self.steps_done,
            dict(self.sampling_run),
            self._key.provenance,
            self._resumed,
            record=record if record is not None and record.begun else None,
        )

    # -- state -------------------------------------------------------------------------------------

    def save_checkpoint(
        self, path: str | Path, *, extra: Any = None, **others: checkpoint.Stateful
    ) -> None:
        """Write all that the run needs to go on, to one file that is whole or absent.

        That is the model, the attached optimizer, the plan, the counter of steps (with which
        sampling and noise go on), the secret root key, the global random generators, and what else
        is given. Training that goes on from the file is bit for bit the training that was not
        interrupted, on the same software and device; where worker processes of a DataLoader draw
        random augmentations, only if the checkpoint lies between two epochs.

        Call it after ``optimizer.step()``: a logical batch that is half done is not in the file (its
        sum has no noise yet) and is drawn again.

        Args:
            path: the file. It holds the root key: keep it as safe as the data, delete it when the
                run is done (see `dptorch.engine.checkpoint`).
            extra: plain values of your own (numbers, strings, tensors, lists, dicts).
            others: objects with ``state_dict``, by name, such as ``scheduler=scheduler``.

        Raises:
            ConfigurationError: a state holds objects that cannot be loaded without running code.
            DataError: the file cannot be written. What was there before is still there, as after
                every error here.
            PrivacyError: a parameter is not finite.

        Example:
            >>> import tempfile, torch, dptorch
            >>> def build():
            ...     model = torch.nn.Linear(4, 2)
            ...     engine = dptorch.PrivacyEngine(model, sample_rate=1.0, sample_size=64, steps=3,
            ...         noise_multiplier=1.0, target_delta=1e-3)
            ...     return engine, engine.attach(torch.optim.SGD(model.parameters(), lr=0.1))
            >>> folder = tempfile.TemporaryDirectory()
            >>> engine, optimizer = build()
            >>> engine.save_checkpoint(folder.name + "/run.pt", extra={"note": "before the first step"})
            >>> later, optimizer = build()
            >>> later.load_checkpoint(folder.name + "/run.pt")
            {'note': 'before the first step'}
        """
        optimizer = None if self._binding is None else self._binding.optimizer
        checkpoint.save_run(path, self, optimizer, others, extra)

    def load_checkpoint(self, path: str | Path, **others: checkpoint.Stateful) -> Any:
        """Go on with the run that `save_checkpoint` saved; returns its `extra`.

        For a new engine with the same plan, on the same model, with the same optimizer attached and
        the same `others`, before its loader is made.

        Raises:
            DataError: the file is missing, cut short, damaged or no checkpoint.
            ConfigurationError: it belongs to another plan, model or optimizer; the difference is
                named.
            PrivacyError: it has been edited.
        """
        optimizer = None if self._binding is None else self._binding.optimizer
        return checkpoint.load_run(path, self, optimizer, others)

    def state_dict(self) -> dict[str, Any]:
        """The engine's own part of a checkpoint, for `load_state_dict`. Contains the secret key of
        the noise: keep it as safe as the data. `save_checkpoint` writes it with all the rest."""
        values = {
            "plan": self.plan.to_json(),
            "parameters": self._shapes(),
            "steps_done": self.steps_done,
            "resumed": self._resumed,
            "loss_factors": self._batch.loss_factors,
            "clipping_norms": list(self._batch.clipping_norms),
            "sampling_run": dict(self.sampling_run),
            "run": None if self._record is None else self._record.run,
            "run_begun": self._record is not None and self._record.begun,
            "ledger_head": None if self._record is None else self._record.head,
        }
        return checkpoint.seal(values, self._key)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the run that `state_dict` came from.

        Raises:
            ConfigurationError: if the state belongs to another plan or to other trainable
                parameters; the differences are named.
            PrivacyError: if it has been edited.
        """
        state, key = checkpoint.unseal(state)
        self._refuse_other(state)
        self._go_on_in_ledger(state, key)
        self._steps_done = state["steps_done"]
        self._resumed = state["resumed"] + 1
        factors = state["loss_factors"]
        self._batch.loss_factors = None if factors is None else tuple(factors)
        self._batch.clipping_norms = list(state["clipping_norms"])
        self.sampling_run = Counter(state["sampling_run"])
        self._key = key

    def _refuse_other(self, state: Mapping[str, Any]) -> None:
        theirs = PrivacyPlan.from_json(state["plan"])
        if theirs != self.plan:
            raise ConfigurationError(
                "the checkpoint belongs to another plan (this engine's, the checkpoint's): "
                + "; ".join(self.plan.differences(theirs))
            )
        if self._loaders or self.steps_done:
            raise ConfigurationError(
                "load the checkpoint into a new engine, before making its loader: this one has "
                f"done {self.steps_done} steps with a key of its own."
            )
        checkpoint.refuse_other_parameters(self._shapes(), state["parameters"])

    def _shapes(self) -> dict[str, list[int]]:
        return {n: list(p.shape) for n, p in self._parameters.items()}

    def _go_on_in_ledger(self, state: dict[str, Any], key: RootKey) -> None:
        run = state["run"]
        if self._ledger is None:
            if run is not None:
                warn(
                    f"this run was kept in a ledger (as {run}), and goes on without it: steps that "
                    "were lost since the checkpoint are not counted. Pass ledger=."
                )
            return
        record = self._record = self._ledger.run(
            self.plan,
            key.provenance,
            run=run,
            begun=state["run_begun"],
            head=state.get("ledger_head"),
            steps_done=state["steps_done"],
            own_loader_steps=state["sampling_run"].get(OWN_LOADER, 0),
        )
        if record.repeated_steps:
            warn(
                f"{record.repeated_steps} steps were released after this checkpoint was written, and "
                "lost. They count: at the end of its plan the run will have spent "
                f"epsilon={record.epsilon_at_end():.4g} instead of {self.plan.epsilon():.4g}."
            )
