"""State of a private run: what was planned, what was done, and what that cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dptorch import accounting
from dptorch.distributed import Ranks
from dptorch.engine.places import Places
from dptorch.engine.secret_draws import SecretDraws
from dptorch.engine.shared_ledger import SharedLedger
from dptorch.errors import ConfigurationError, warn
from dptorch.plan import PrivacyPlan, PrivacySpent
from dptorch.randomness import RootKey
from dptorch.sampling import PrivateLoader
from dptorch.sampling.schemes import OWN_LOADER
from dptorch.statement import Statement, make_statement

if TYPE_CHECKING:
    from dptorch.ledger import DatasetLedger, RunLedger
    from dptorch.noise.released import CorrelatedNoise

__all__ = ["RunState"]


class RunState:
    """State of a private run: plan, root key, steps taken, ledger.

    Args:
        plan: what the run commits to.
        key: root of sampling and noise.
        ranks: the processes that take its steps together.
        data_ranks: those of them that have examples of their own; by default all.

    Attributes:
        steps_done: steps taken, empty batches included.
        sampling_run: how many steps were on batches drawn by which scheme; batches that did not
            come from the engine's loader have a name of their own.
        loaders: how many loaders draw from the key.
        noise: what keeps something from step to step; set by who takes the steps, if it is planned.
    """

    def __init__(
        self, plan: PrivacyPlan, key: RootKey, ranks: Ranks, data_ranks: Ranks | None = None
    ) -> None:
        self.plan = plan
        self.key = key
        self.ranks = ranks
        self.steps_done = 0
        self.sampling_run: Counter[str] = Counter()
        self.loaders = 0
        self.noise: CorrelatedNoise | None = None
        self._places = Places(plan, ranks)
        self._draws = SecretDraws(data_ranks or ranks)
        self._resumed = 0
        self._ledger: DatasetLedger | None = None
        self._run_ledger: SharedLedger | None = None
        self._unknown: set[str] = set()  # in what the loader hands out

    @property
    def exhausted(self) -> bool:
        """Whether every planned step is done."""
        return self.steps_done >= self.plan.steps

    def count_step(self, *, sampled: bool) -> int:
        """Count the step that is due, before anything of it can be seen; returns its number.

        Args:
            sampled: whether its batch was drawn as the plan says.

        Raises:
            BudgetExhausted, LedgerError: the ledger did not take the step. Nothing is counted then.
        """
        step = self.steps_done
        if self._run_ledger is not None:
            (released,) = self.plan.history(1, own_loader_steps=0 if sampled else 1)
            self._run_ledger.count(step, released)
        self.steps_done += 1
        self.sampling_run[self.plan.sampling if sampled else OWN_LOADER] += 1
        return step

    def begin_loader(self, loader: PrivateLoader, user_ids: Any) -> None:
        """Count a loader that draws from the key.

        Raises:
            PrivacyError: records have their turns for the whole run, and the data set is another one.
        """
        self._places.watch(loader, user_ids)
        loader.on_start(lambda step: self._draws.begin_batch(self.key, step))
        loader.on_batch(lambda part: self._draws.begin_batch(self.key, part.logical_step))
        self.loaders += 1

    def note_unknown(self, items: Any, unknown: frozenset[str]) -> Any:
        """Note what of a batch of the loader cannot be followed; returns the batch."""
        self._unknown |= unknown
        return items

    def refuse_known_draws(self) -> None:
        """See `SecretDraws.refuse_known`."""
        self._draws.refuse_known()

    # -- the ledger --------------------------------------------------------------------------------

    def use_ledger(self, ledger: DatasetLedger | None) -> None:
        """See `PrivacyEngine.use_ledger`. Rank 0's counts; the others may have none."""
        if self._run_ledger is not None or self.loaders or self.steps_done:
            raise ConfigurationError(
                "give the engine its one ledger before its loader and its first step: what was "
                "released before would be missing in it."
            )
        if ledger is not None:
            from dptorch.ledger.datasets import of_one_data_set

            of_one_data_set(ledger)
        self._ledger = ledger
        self._run_ledger = SharedLedger(self.ranks, lambda: self._make_run(self.key))

    def _make_run(self, key: RootKey, **going_on: Any) -> RunLedger:
        assert self._ledger is not None
        return self._ledger.run(self.plan, key.source.value, **going_on)

    def reserve_budget(self) -> None:
        """See `PrivacyEngine.reserve_budget`."""
        if self._run_ledger is not None and not self.exhausted:
            self._run_ledger.open()

    def release_budget(self) -> None:
        """See `PrivacyEngine.release_budget`."""
        if self._run_ledger is not None:
            self._run_ledger.close()

    @property
    def ledger_run(self) -> dict[str, str] | None:
        """See `PrivacyEngine.ledger_run`."""
        if self._run_ledger is None:
            return None
        if self._ledger is None or not self.ranks.is_first:
            return self._run_ledger.name
        ledger = self._ledger.ledger
        return {**self._run_ledger.name, "location": ledger.location, "head": ledger.head()}

    # -- reporting ---------------------------------------------------------------------------------

    def get_privacy_spent(self) -> PrivacySpent:
        """See `PrivacyEngine.get_privacy_spent`."""
        own = self.sampling_run[OWN_LOADER]
        if self._run_ledger is None or not self._run_ledger.repeated_steps:
            epsilon = self.plan.epsilon(self.steps_done, own_loader_steps=own)
        else:
            epsilon = accounting.get_accountant(self.plan.accountant).epsilon(
                self._run_ledger.attempts.events(),
                self.plan.target_delta,
                adjacency=self.plan.adjacency,
            )
        return PrivacySpent(epsilon, self.plan.target_delta)

    def statement(self) -> Statement:
        """See `PrivacyEngine.statement`."""
        ledger = self._run_ledger
        made = make_statement(
            self.plan,
            self.steps_done,
            dict(self.sampling_run),
            self.key.source,
            self._resumed,
            ledger=ledger if ledger is not None and ledger.begun else None,
        )
        return replace(made, ranks=self.ranks.size, not_followed=tuple(sorted(self._unknown)))

    # -- a checkpoint's part -----------------------------------------------------------------------

    def values(self) -> dict[str, Any]:
        """Return the state without the key, as plain values for `restore`."""
        return {
            "plan": self.plan.to_json(),
            "steps_done": self.steps_done,
            **self._places.values(),
            **self._draws.values(),
            "noise": None if self.noise is None else self.noise.state(self.steps_done),
            "resumed": self._resumed,
            "not_followed": sorted(self._unknown),
            "sampling_run": dict(self.sampling_run),
            "run": None if self._run_ledger is None else self._run_ledger.run,
            "run_begun": self._run_ledger is not None and self._run_ledger.begun,
            "ledger_head": None if self._run_ledger is None else self._run_ledger.head,
        }

    def refuse_other(self, values: Mapping[str, Any]) -> None:
        """Check that `values` are of a run of the same plan, and that this one has not begun.

        Raises:
            ConfigurationError: otherwise; differences of the plans are named.
        """
        theirs = PrivacyPlan.from_json(values["plan"])
        if theirs != self.plan:
            raise ConfigurationError(
                "the checkpoint belongs to another plan (this engine's, the checkpoint's): "
                + "; ".join(self.plan.differences(theirs))
            )
        if self.loaders or self.steps_done:
            raise ConfigurationError(
                "load the checkpoint into a new engine, before making its loader: this one has "
                f"done {self.steps_done} steps with a key of its own."
            )

    def restore(self, values: Mapping[str, Any], key: RootKey) -> None:
        """Go on with the run that `values` and `key` came from."""
        if self.noise is not None:
            self.noise.restore(values.get("noise"), values["steps_done"])
        self._go_on_in_ledger(values, key)
        self.steps_done = values["steps_done"]
        self._resumed = values["resumed"] + 1
        self._unknown = set(values.get("not_followed", ()))
        self.sampling_run = Counter(values["sampling_run"])
        self._places.restore(values)
        self._draws.restore(values)
        self.key = key

    def _go_on_in_ledger(self, values: Mapping[str, Any], key: RootKey) -> None:
        run = values["run"]
        if self._run_ledger is None:
            if run is not None:
                warn(
                    f"this run was kept in a ledger (as {run}), and goes on without it: steps that "
                    "were lost since the checkpoint are not counted. Pass ledger=."
                )
            return
        ledger = self._run_ledger = SharedLedger(
            self.ranks,
            lambda: self._make_run(
                key,
                run=run,
                begun=values["run_begun"],
                head=values.get("ledger_head"),
                steps_done=values["steps_done"],
                own_loader_steps=values["sampling_run"].get(OWN_LOADER, 0),
            ),
        )
        if ledger.repeated_steps and self.ranks.is_first:
            warn(
                f"{ledger.repeated_steps} steps were released after this checkpoint was written, and "
                "lost. They count: at the end of its plan the run will have spent "
                f"epsilon={ledger.epsilon_at_end():.4g} instead of {self.plan.epsilon():.4g}."
            )
