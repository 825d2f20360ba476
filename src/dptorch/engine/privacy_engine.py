"""PrivacyEngine: binds a plan to a model, an optimizer and a loader, and keeps the ordinary loop."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NoReturn

from torch import nn
from torch.optim import Optimizer
from typing_extensions import Unpack

from dptorch.clipping import groups_of
from dptorch.distributed import Ranks
from dptorch.distributed.placement import placement_of
from dptorch.distributed.wrappers import silence_around, unwrapped
from dptorch.distributed.zero3 import whole_shape
from dptorch.engine import checkpoint
from dptorch.engine.diagnostics import StepDiagnostics
from dptorch.engine.loading import agree_on_data, loader_of
from dptorch.engine.logical_batch import LogicalBatch
from dptorch.engine.optimizer_binding import OptimizerBinding, check_parameters
from dptorch.engine.private_step import NOT_SHARED, PrivateStep
from dptorch.engine.run_state import RunState
from dptorch.engine.settings import checked_budget
from dptorch.engine.starting import plan_under, settled_plan, start_together, trainable
from dptorch.errors import ConfigurationError, PrivacyError, one_of, warn
from dptorch.plan import PlanSettings, PrivacyPlan, PrivacySpent
from dptorch.sampling import PhysicalBatch, PrivateLoader
from dptorch.statement import Statement
from dptorch.tape.gradients.clipping_modes import NON_PRIVATE, get_mode
from dptorch.tape.gradients.device_cost import cost_of, free_bytes
from dptorch.tape.gradients.explain import Explanation
from dptorch.tape.gradients.tape import TapeConfig, TapeListener
from dptorch.tape.recording.batch_dims import BatchDims
from dptorch.tape.recording.model_hooks import ModelHooks
from dptorch.validation.mixing import first_batch_checks

if TYPE_CHECKING:
    from dptorch.ledger import DatasetLedger

__all__ = ["PrivacyEngine"]


class PrivacyEngine:
    """Makes an ordinary training loop differentially private.

    Build it, `attach` an optimizer, take batches from `loader`, and train as always::

        for x, y in loader:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    Args:
        model: any module; unmodified. Parameters that should not be trained are frozen before.
        settings: what the plan is made from, such as batch_size, sample_size, epochs and
            target_epsilon: see `dptorch.plan.PlanSettings`.
        plan: a plan made before, instead of settings.
        clipping_mode: how per-example norms are computed, a name in
            `dptorch.tape.gradients.clipping_modes.MODES`: "auto" takes what is fastest at each layer.
            Every mode gives the same gradients, but "non-private", which neither clips nor adds noise.
        memory_budget: bytes of gradients that may be kept between backward and clipping; what needs
            more is computed in a second backward. By default half of what is free.
        on_budget_exhausted: what a step past the plan does: "raise" `BudgetExhausted`, or "stop":
            warn once and leave the model as it is.
        batch_dims: which inputs are batched and where, see
            `dptorch.tape.recording.batch_dims.BatchDims`.
        self_check: look at the first batch for modules that mix examples.
        ledger: where every step is written down before its noise is added, beside the other runs
            on the data set: ``dptorch.ledger.open_ledger("ledger.db").dataset("patients")``.
        secure_rng: make the noise from the cryptographic keystream on every device. On the CPU it
            always is; a GPU's own generator is faster, but no cipher.
        seed: for tests: randomness from a number, which is not private.
        ranks: the processes that train the model together: by default all of torch.distributed's
            default group, else this one. See docs/scale.md.

    Guarantees:
        Each `optimizer.step()` applies ``sum_b clip(gradient_b) + N(0, (noise_multiplier *
        max_grad_norm)^2)``, divided by the public expected batch size under a mean loss, and
        nothing else. It is counted before it is applied, and none is applied past the plan. No
        parameter's ``.grad`` ever holds a gradient without noise. The statement lists assumptions.
        Held by `test_one_record_moves_the_sum_by_no_more_than_declared`,
        `test_the_noise_is_as_large_as_the_plan_says`,
        `test_no_gradient_without_noise_is_ever_in_grad` and `test_the_budget_is_never_passed`.

    Raises:
        ConfigurationError: for arguments that cannot be honoured, a model without trainable
            parameters, or a model that has an engine.

    Example:
        >>> import torch, dptorch
        >>> model = torch.nn.Linear(4, 2)
        >>> engine = dptorch.PrivacyEngine(
        ...     model, batch_size=16, sample_size=64, steps=3, noise_multiplier=1.0, seed=0,
        ...     target_delta=1e-3)
        >>> optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=0.1))
        >>> data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randint(0, 2, (64,)))
        >>> for x, y in engine.loader(data):
        ...     loss = torch.nn.functional.cross_entropy(model(x), y)
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> engine.steps_done, engine.get_privacy_spent().delta
        (3, 0.001)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        plan: PrivacyPlan | None = None,
        clipping_mode: str = "auto",
        memory_budget: float | None = None,
        on_budget_exhausted: str = "raise",
        batch_dims: BatchDims = 0,
        self_check: bool = True,
        ledger: DatasetLedger | None = None,
        secure_rng: bool = False,
        seed: int | None = None,
        ranks: Ranks | None = None,
        **settings: Unpack[PlanSettings],
    ) -> None:
        ranks = self.ranks = ranks or Ranks.of()
        with ranks.together():
            given, model = model, unwrapped(model)
            mode = get_mode(clipping_mode)
            plan = plan_under(mode, settled_plan(plan, settings), ranks)
            parameters = trainable(model)
            self._memory_budget = checked_budget(memory_budget)
            on_exhausted = one_of("on_budget_exhausted", on_budget_exhausted, ("raise", "stop"))
        with ranks.together():  # exchanges messages, so that no rank may have failed before
            placement = placement_of(model, parameters, ranks, given)
        key = start_together(ranks, model, placement, parameters, plan, clipping_mode, seed, ledger)
        groups = groups_of(
            model, parameters, plan.clipping_style, plan.clipping_groups, plan.max_grad_norm
        )
        self.model = model
        self._mode = mode
        self._parameters = parameters
        self._run = RunState(plan, key, ranks, placement.data_ranks)
        self._batch = LogicalBatch(plan, groups, placement)
        self._placement = placement
        self._binding: OptimizerBinding | None = None
        self._step = PrivateStep(
            self._run,
            self._batch,
            model,
            parameters,
            placement,
            private=mode is not NON_PRIVATE,
            on_exhausted=on_exhausted,
            secure_rng=secure_rng,
        )
        if ranks.from_first(ledger is not None):
            self.use_ledger(ledger)
        # The model's hooks keep the engine alive: a forgotten engine trains nothing, rather than
        # training without privacy.
        self_check &= placement.is_whole  # the others would not run it too
        self._hooks = ModelHooks(
            model,
            placement.followed,
            batch_dims=batch_dims,
            on_forward=self._begin_forward,
            around=placement.around_forward,
            checks=first_batch_checks(model, batch_dims, parameters) if self_check else (),
        )
        if self._mode is NON_PRIVATE:
            self._hooks.remove()

    def _begin_forward(self) -> tuple[TapeConfig, TapeListener]:
        """What the tape of a forward pass is made with."""
        silence_around()
        p = next(iter(self._hooks.parameters.values()))
        budget = self._memory_budget
        config = TapeConfig(
            mode=self._mode,
            device_cost=cost_of(p.device, p.dtype, measured=self._run.key.source.is_private),
            memory_budget=free_bytes(p.device) / 2 if budget is None else budget,
            groups=self._batch.groups_in_backward,
            any_rank=self._placement.any_rank,
        )
        return config, self._batch.begin_forward()

    # -- binding -----------------------------------------------------------------------------------

    def attach(self, optimizer: Optimizer) -> Optimizer:
        """Make `optimizer` step on noisy gradients; returns it.

        Raises:
            ConfigurationError: if it does not hold exactly the model's trainable parameters, or is
                attached to an engine.
        """
        if self._binding is not None:
            raise ConfigurationError(
                "this engine already has an optimizer. Give all parameters to one (it may have several "
                "groups), or detach() first."
            )
        check_parameters(self._parameters, optimizer)
        self._binding = OptimizerBinding(
            optimizer,
            take_step=lambda: self._step.take(optimizer),
            add_pending=self._batch.add_pending,
            drop_pending=self._batch.drop_pending,
            owner=self,
        )
        self._batch.attached = True
        return optimizer

    def detach(self) -> None:
        """Take the engine off model and optimizer; both are then as before, trained parameters kept.

        What was not stepped is dropped, and its reservation in the ledger given back. The statement
        can still be read.
        """
        self._batch.reset()
        self.release_budget()
        if self._binding is not None:
            self._binding.restore()
            self._binding = None
        self._hooks.remove()
        self._placement.remove()

    def loader(
        self,
        dataset: Any,
        *,
        user_ids: Any = None,
        max_physical_batch_size: int | None = None,
        **dataloader_kwargs: Any,
    ) -> PrivateLoader:
        """Batches of `dataset`, drawn as the plan says. One iteration is one epoch.

        Args:
            dataset: any map-style dataset.
            user_ids: where the plan's unit is the user: the user ID of each example, as a list or as
                the name of a column. Users are drawn, and bring at most the plan's
                max_examples_per_user examples each.
            max_physical_batch_size: most examples to go through the model at once. A larger batch
                arrives in parts; ``optimizer.step()`` then waits for the last of them.
            dataloader_kwargs: collate_fn, num_workers, pin_memory... as in DataLoader.

        Raises:
            ConfigurationError, DataError: for a dataset or arguments that cannot be sampled.
        """
        agree_on_data(
            self.ranks,
            self._parameters,
            self._run.key,
            dataset,
            user_ids=user_ids,
            steps_done=self.steps_done,
            max_physical_batch_size=max_physical_batch_size,
        )
        with self.ranks.together():
            loader = loader_of(
                self.plan,
                self._run.key,
                dataset,
                user_ids=user_ids,
                ranks=self._placement.data_ranks,
                even=not self._placement.is_whole,
                start_step=lambda: self.steps_done,
                max_physical_batch_size=max_physical_batch_size,
                dataloader_kwargs=dataloader_kwargs,
            )
        self._run.begin_loader(loader, user_ids)
        self.reserve_budget()
        loader.on_batch(self._begin_part)
        loader.on_items(lambda _, b: self._run.note_unknown(*self._hooks.taint(b, loader.alone)))
        loader.on_start(self._begin_epoch)
        loader.on_end(lambda complete: self.end_epoch(complete=complete))
        return loader

    def _begin_epoch(self, step: int) -> None:
        self._batch.reset()
        if self.exhausted:
            warn(
                f"all {self.plan.steps} steps of the plan are done; the loader has no more batches."
            )

    def begin_physical_batch(self, part: PhysicalBatch) -> None:
        """Say which part of a logical batch the next forward passes are on; `loader` does it itself.

        That `part` was drawn as the plan says is the caller's word: its step is accounted with
        amplification by sampling.

        Raises:
            PrivacyError: `part` begins a logical batch, and the last one was never stepped; or there
                are several ranks.
        """
        if self.ranks.size > 1:
            raise PrivacyError(NOT_SHARED)
        self._begin_part(part)

    def _begin_part(self, part: PhysicalBatch) -> None:
        self._batch.begin_physical_batch(part)
        self._hooks.begin_batch(part.examples + part.padding)

    def end_epoch(self, *, complete: bool = True) -> None:
        """Say that the next batches were not drawn as planned; `complete=False` drops the last."""
        self._batch.end_epoch(complete=complete)
        self._hooks.end_batch()

    def drop_batch(self) -> None:
        """Drop all that was not stepped on, what ``virtual_step`` kept included."""
        self._batch.reset()

    def __reduce__(self) -> NoReturn:
        raise PrivacyError(
            "a PrivacyEngine is not copied or pickled: a second would draw the same noise. Copy the "
            "model and make an engine for the copy, or keep the run with save_checkpoint()."
        )

    def public(self) -> AbstractContextManager[None]:
        """Make passes in this context ordinary and unprotected: for public data only. Gradients go to
        ``.grad`` as usual, and the engine's next private step overwrites them."""
        return self._hooks.public()

    # -- the ledger --------------------------------------------------------------------------------

    def use_ledger(self, ledger: DatasetLedger | None) -> None:
        """Write every step down in `ledger` before it is released; as the argument of that name. On
        several ranks the first keeps it, and the others may give None.

        Raises:
            ConfigurationError: steps were taken already, the engine has a ledger, or is not private.
        """
        if self._mode is NON_PRIVATE:
            raise ConfigurationError(
                "clipping_mode='non-private' adds no noise, and no ledger can account for that. Leave "
                "the ledger out."
            )
        self._run.use_ledger(ledger)

    def reserve_budget(self) -> None:
        """Reserve the steps to come in the ledger, as `loader` and the first step do; raises
        BudgetExhausted if the data set's cap does not leave enough."""
        self._run.reserve_budget()

    def release_budget(self) -> None:
        """Give back what is reserved in the ledger for steps to come, for other runs on the data set.
        The next step reserves anew."""
        self._run.release_budget()

    # -- reporting ---------------------------------------------------------------------------------

    @property
    def plan(self) -> PrivacyPlan:
        """What the run committed to; it cannot be changed."""
        return self._run.plan

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
                "there is nothing to explain before a backward: take one step first."
            )
        return self._batch.explanation

    @property
    def diagnostics(self) -> StepDiagnostics | None:
        """Statistics of the last logical batch: NOT PRIVATE."""
        return self._batch.diagnostics

    @property
    def steps_done(self) -> int:
        """Steps taken, empty batches included."""
        return self._run.steps_done

    @property
    def exhausted(self) -> bool:
        """Whether every planned step is done."""
        return self._run.exhausted

    @property
    def sampling_run(self) -> Counter[str]:
        """How many steps each sampling scheme served, a loader of the user's own among them."""
        return self._run.sampling_run

    @property
    def noise_multiplier(self) -> float:
        """Standard deviation of the noise over max_grad_norm."""
        return self.plan.noise_multiplier

    def get_privacy_spent(self) -> PrivacySpent:
        """(ε, δ) spent so far. Amplification by sampling counts only for batches that came from the
        engine's loader. With a ledger, steps that were lost when the run was killed count too."""
        return self._run.get_privacy_spent()

    @property
    def ledger_run(self) -> dict[str, str] | None:
        """The run's id, data set and location in the ledger, and the ledger's head now."""
        return self._run.ledger_run

    def statement(self) -> Statement:
        """The privacy statement of the run so far; ``print`` it."""
        return self._run.statement()

    # -- checkpoints -------------------------------------------------------------------------------

    def save_checkpoint(
        self, path: checkpoint.File, *, extra: Any = None, **others: checkpoint.Stateful
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
            path: the file, or one that is open. It holds the root key: keep it as safe as the data,
                delete it when the run is done (see `dptorch.engine.checkpoint`).
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
        checkpoint.save_run(path, self, self._optimizer, others, extra)

    def load_checkpoint(self, path: checkpoint.File, **others: checkpoint.Stateful) -> Any:
        """Go on with the run that `save_checkpoint` saved; returns its `extra`.

        For a new engine with the same plan, on the same model, with the same optimizer attached and
        the same `others`, before its loader is made.

        Raises:
            DataError: the file is missing, cut short, damaged or no checkpoint.
            ConfigurationError: it belongs to another plan, model or optimizer; the difference is
                named.
            PrivacyError: it has been edited.
        """
        return checkpoint.load_run(path, self, self._optimizer, others)

    def state_dict(self) -> dict[str, Any]:
        """The engine's own part of a checkpoint, with the secret key of the noise."""
        values = {
            **self._run.values(),
            "parameters": self._shapes(),
            "loss_factors": self._batch.loss_factors,
            "clipping_norms": list(self._batch.clipping_norms),
        }
        return checkpoint.seal(values, self._run.key)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the run that `state_dict` came from.

        Raises:
            ConfigurationError: if the state belongs to another plan or to other trainable
                parameters; the differences are named.
            PrivacyError: if it has been edited.
        """
        values, key = checkpoint.unseal(state)
        self._run.refuse_other(values)
        checkpoint.refuse_other_parameters(self._shapes(), values["parameters"])
        self._run.restore(values, key)
        factors = values["loss_factors"]
        self._batch.loss_factors = None if factors is None else tuple(factors)
        self._batch.clipping_norms = list(values["clipping_norms"])

    @property
    def _optimizer(self) -> Optimizer | None:
        return None if self._binding is None else self._binding.optimizer

    def _shapes(self) -> dict[str, list[int]]:
        return {n: list(whole_shape(p)) for n, p in self._parameters.items()}
