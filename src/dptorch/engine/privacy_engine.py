"""PrivacyEngine: binds a plan to a model, an optimizer and a loader, and keeps the ordinary loop."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Unpack

from dptorch.clipping import COUNTS
from dptorch.engine import checkpoint
from dptorch.engine.loading import loader_of
from dptorch.engine.optimizer_binding import OptimizerBinding, check_parameters, write_gradients
from dptorch.engine.run_state import PrivateRun
from dptorch.errors import (
    BudgetExhausted,
    ConfigurationError,
    PrivacyError,
    one_of,
    warn,
)
from dptorch.noise import get_mechanism
from dptorch.noise.fingerprint import fingerprint
from dptorch.plan import PlanSettings, PrivacyPlan, make_plan
from dptorch.randomness import FROM_OS, RootKey
from dptorch.sampling import PhysicalBatch, PrivateLoader
from dptorch.sampling.schemes import OWN_LOADER
from dptorch.tape.gradients.clipping_modes import NON_PRIVATE, get_mode
from dptorch.tape.gradients.device_cost import cost_of, free_bytes
from dptorch.tape.gradients.tape import TapeConfig, TapeListener
from dptorch.tape.recording.batch_dims import BatchDims
from dptorch.tape.recording.model_hooks import ModelHooks, hooks_of
from dptorch.validation.mixing import refuse_mixing

if TYPE_CHECKING:
    from dptorch.ledger import DatasetLedger

__all__ = ["EngineSettings", "PrivacyEngine"]


class EngineSettings(PlanSettings, total=False):
    """The keyword arguments of `PrivacyEngine`, which says what each means."""

    plan: PrivacyPlan | None
    clipping_mode: str
    memory_budget: float | None
    on_budget_exhausted: str
    batch_dims: BatchDims
    self_check: bool
    ledger: DatasetLedger | None
    secure_rng: bool
    seed: int | None


class PrivacyEngine(PrivateRun):
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
            Every mode gives the same gradients, but "non-private", which trains
            without clipping and noise, for comparison.
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

    Guarantees:
        Each `optimizer.step()` applies ``sum_b clip(gradient_b) + N(0, (noise_multiplier *
        max_grad_norm)^2)``, divided by the public expected batch size under a mean loss, and
        nothing else; it is counted before it is applied, and none is applied past the plan. No
        parameter's ``.grad`` ever holds a gradient without noise. The statement lists what this
        assumes of data and loss.

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
        **settings: Unpack[PlanSettings],
    ) -> None:
        for name in settings:
            one_of("argument", name, EngineSettings.__annotations__)
        if plan is None:
            plan = make_plan(**settings)
        elif settings:
            raise ConfigurationError(
                f"plan= and {', '.join(f'{n}=' for n in settings)} are given: the plan says all that "
                "the guarantee depends on. Leave them out, or make the engine without plan=."
            )
        mode = get_mode(clipping_mode)
        self._on_exhausted = one_of("on_budget_exhausted", on_budget_exhausted, ("raise", "stop"))
        if hooks_of(model) is not None:
            raise ConfigurationError(
                "this model already has a privacy engine: its gradients would be clipped and noised "
                "twice. Call detach() on the other engine first."
            )
        parameters: dict[str, Tensor] = {
            n: p for n, p in model.named_parameters() if p.requires_grad
        }
        if not parameters:
            raise ConfigurationError(
                "the model has no trainable parameter. Unfreeze what should be trained with "
                "requires_grad_(True) before making the engine."
            )
        if plan.mechanism == "discrete_gaussian" and mode.passes != 1:
            raise ConfigurationError(
                f"clipping_mode={clipping_mode!r} never holds the gradients of examples, which "
                "mechanism='discrete_gaussian' rounds one by one. Use clipping_mode='auto'."
            )
        self._memory_budget = _checked_budget(memory_budget)
        key = RootKey.from_os() if seed is None else RootKey.from_seed(seed)
        super().__init__(model, parameters, plan, mode, key)
        self._secure_rng = secure_rng
        self._warned_exhausted = False
        self._warned_own_loader = False
        if ledger is not None:
            self.use_ledger(ledger)
        # The model's hooks keep the engine alive: a forgotten engine trains nothing, rather than
        # training without privacy.
        self._hooks = ModelHooks(
            model,
            parameters,
            batch_dims=batch_dims,
            on_forward=self._begin_forward,
            first_inputs=(lambda a, k: refuse_mixing(model, a, k, batch_dims))
            if self_check
            else None,
        )
        if self._mode is NON_PRIVATE:
            self._hooks.remove()
            warn(
                "clipping_mode='non-private': gradients are neither clipped nor noised. This run is "
                "for comparison; its epsilon is infinite."
            )

    def _begin_forward(self) -> tuple[TapeConfig, TapeListener]:
        """What the tape of a forward pass is made with."""
        p = next(iter(self._parameters.values()))
        seeded = self._key.provenance != FROM_OS
        budget = self._memory_budget
        config = TapeConfig(
            mode=self._mode,
            device_cost=cost_of(p.device, p.dtype, measured=not seeded),
            memory_budget=free_bytes(p.device) / 2 if budget is None else budget,
            groups=self._batch.groups_in_backward,
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
                "this engine already has an optimizer. Give all parameters to one optimizer (it may "
                "have several groups), or detach() first."
            )
        check_parameters(self._parameters, optimizer)
        self._binding = OptimizerBinding(
            optimizer,
            prepare=self._prepare_step,
            hold=self._batch.hold,
            discard=self._batch.discard,
            owner=self,
        )
        self._batch.attached = True
        return optimizer

    def detach(self) -> None:
        """Take the engine off model and optimizer; both are then as before, trained parameters kept.

        What was not stepped is dropped; what the ledger had reserved for it is given back. The
        statement can still be read.
        """
        self._batch.drop()
        self.release_budget()
        if self._binding is not None:
            self._binding.restore()
            self._binding = None
        self._hooks.remove()

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
            user_ids: where the plan's unit is the user: whose each example is, as a list or as the
                name of a column. Users are drawn, and bring at most the plan's
                max_examples_per_user examples each.
            max_physical_batch_size: most examples to go through the model at once. A larger batch
                arrives in parts; ``optimizer.step()`` then waits for the last of them.
            dataloader_kwargs: collate_fn, num_workers, pin_memory... as in DataLoader. No world_size
                above 1: an engine steps on what one process has drawn.

        Raises:
            ConfigurationError, DataError: for a dataset or arguments that cannot be sampled.
        """
        loader = loader_of(
            self.plan,
            self._key,
            dataset,
            user_ids=user_ids,
            start_step=lambda: self.steps_done,
            max_physical_batch_size=max_physical_batch_size,
            dataloader_kwargs=dataloader_kwargs,
        )
        self.reserve_budget()
        loader.on_batch(self.receive)
        loader.on_start(self._begin_epoch)
        loader.on_end(lambda complete: self.receive(None, complete=complete))
        self._loaders += 1
        return loader

    def _begin_epoch(self, step: int) -> None:
        self._batch.drop()
        if self.exhausted:
            warn(
                f"all {self.plan.steps} steps of the plan are done; the loader has no more batches."
            )

    def receive(self, part: PhysicalBatch | None, *, complete: bool = True) -> None:
        """Say what the next forward passes are on, for a loader that is not from `loader`.

        That `part` was drawn as the plan says, for the step that is due, is the caller's word: its
        step is accounted with amplification by sampling.

        Args:
            part: which part of which logical batch; None for a batch that was not drawn so.
            complete: with None, False drops what was received and not stepped.

        Raises:
            PrivacyError: `part` begins a logical batch, and the last one was never stepped.
        """
        if part is None:
            self._batch.end(complete)
        else:
            self._batch.begin(part)

    def public(self) -> AbstractContextManager[None]:
        """Forward passes inside this context are ordinary and unprotected: for public data only.

        Gradients then go to ``.grad`` as usual; the engine's next private step overwrites them.
        """
        return self._hooks.paused()

    # -- one step ----------------------------------------------------------------------------------

    def _prepare_step(self) -> bool:
        """Fill ``.grad`` with the noisy gradient of a complete logical batch."""
        if self.exhausted:
            return self._refuse()
        part = self._batch.part
        if self._mode is NON_PRIVATE:
            if part is None or part.is_last:
                self._steps_done += 1
            return part is None or part.is_last
        self._batch.hold("step")
        if part is not None and not part.is_last:
            return False
        self._refuse_changed_parameters()
        clipped = self._batch.take()
        if self._batch.diagnostics is not None and self._batch.diagnostics.dropped:
            checkpoint.refuse_not_finite(self._parameters)
        step = self._steps_done
        sampled = part is not None and part.logical_step == step
        if self._record is not None:
            (released,) = self.plan.history(1, own_loader_steps=0 if sampled else 1)
            self._record.count(step, released)
        # Counted before it is visible: whatever happens from here on, the step has been spent.
        self._steps_done += 1
        self.sampling_run[self.plan.sampling if sampled else OWN_LOADER] += 1
        if not sampled:
            self._warn_of_own_loader()
        mechanism = get_mechanism(self.plan.mechanism)
        noise = mechanism(self.plan.noise_multiplier, secure_rng=self._secure_rng)
        # A seed is for repeating a run, in other physical batches too, which differ by rounding.
        context = 0
        if self._key.provenance == FROM_OS:
            context = fingerprint(clipped.values, self._key, step)
        divisor = self.plan.expected_batch_size if self.plan.loss_reduction == "mean" else 1.0
        noisy = noise.privatize(clipped, self._key, step, context=context, divisor=divisor)
        if self.plan.adaptive_clipping is not None:
            self._batch.follow(noisy.values[COUNTS] * divisor)
        write_gradients(self._parameters, noisy)
        return True

    def _refuse_changed_parameters(self) -> None:
        """What is trained must still be what the engine follows and the optimizer holds."""
        now = {id(p) for p in self.model.parameters() if p.requires_grad}
        if now != {id(p) for p in self._parameters.values()}:
            raise PrivacyError(
                "the model's trainable parameters have changed since the engine was made (frozen, "
                "unfrozen, replaced or added). Freeze and unfreeze before making it: detach() this "
                "engine, and make another for the steps that remain; their epsilons add up."
            )
        assert self._binding is not None
        check_parameters(self._parameters, self._binding.optimizer)

    def _warn_of_own_loader(self) -> None:
        if not self._warned_own_loader:
            self._warned_own_loader = True
            warn(
                "a batch did not come from engine.loader(), so it is not known to be drawn as the "
                f"plan says ({self.plan.sampling}): epsilon is stated without amplification by "
                "sampling, and is much larger. Take batches from engine.loader(dataset)."
            )

    def _refuse(self) -> bool:
        self._batch.drop()
        message = (
            f"all {self.plan.steps} steps of the plan are done "
            f"(epsilon={self.get_privacy_spent().epsilon:.4g}): another step would exceed the "
            "budget and was not taken. Plan more steps, or stop training here."
        )
        if self._on_exhausted == "raise":
            raise BudgetExhausted(message)
        if not self._warned_exhausted:
            self._warned_exhausted = True
            warn(message)
        return False


def _checked_budget(memory_budget: float | None) -> float | None:
    if memory_budget is not None and not memory_budget >= 0:
        raise ConfigurationError(
            f"memory_budget={memory_budget!r} must be a number of bytes, 0 or more; or None for half "
            "of what is free."
        )
    return memory_budget
