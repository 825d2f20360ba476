"""`PrivacyEngine` of Opacus 1.x: makes model, optimizer and loader private."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from dptorch.accounting import Event
from dptorch.compat.arguments import OPEN_END, known_arguments
from dptorch.compat.opacus.accountants import IAccountant, create_accountant
from dptorch.compat.opacus.clipping import clipping_arguments
from dptorch.compat.opacus.data_loader import DPDataLoader, order_of, private_loader
from dptorch.compat.opacus.grad_sample import GradSampleModule
from dptorch.compat.opacus.grad_sample.utils import MODES, get_gsm_class
from dptorch.compat.opacus.optimizers import as_dp_optimizer
from dptorch.compat.opacus.scheduled_run import ScheduledRun
from dptorch.compat.opacus.utils.uniform_sampler import draw_seed
from dptorch.compat.opacus.validators import ModuleValidator
from dptorch.engine import checkpoint
from dptorch.engine.optimizer_binding import check_parameters
from dptorch.errors import ConfigurationError, warn
from dptorch.plan import PrivacyPlan, make_plan
from dptorch.sampling import dataset_size
from dptorch.statement import Statement

__all__ = ["PrivacyEngine"]

# All of them give the same gradients here; what they cost is the engine's choice.
_MODES = {"hooks": "auto", "ew": "auto", "functorch": "auto", "ghost": "ghost"}
_NO_MODES = {
    "no_op": "gradients that the user computes cannot be vouched for",
    "ghost_fsdp": "for divided models there is dptorch.PrivacyEngine (docs/scale.md)",
    "ghost_tp": "for divided models there is dptorch.PrivacyEngine (docs/scale.md)",
}


class PrivacyEngine:
    """Makes models, optimizers and loaders private, and adds up what they spend.

    Args:
        accountant: "prv" (dptorch's "pld": composed numerically, a certified upper bound), "rdp", or
            "gdp" (no bound, and every answer warns).
        secure_mode: accepted: noise always comes from a cryptographic generator.

    Attributes:
        runs: one for each ``make_private``.

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randint(0, 2, (64,)))
        >>> model = nn.Linear(4, 2)
        >>> privacy_engine = PrivacyEngine()
        >>> model, optimizer, loader = privacy_engine.make_private(
        ...     module=model,
        ...     optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        ...     data_loader=DataLoader(data, batch_size=16),
        ...     noise_multiplier=1.0,
        ...     max_grad_norm=1.0,
        ... )
        >>> for x, y in loader:
        ...     optimizer.zero_grad()
        ...     nn.functional.cross_entropy(model(x), y).backward()
        ...     optimizer.step()
        >>> round(privacy_engine.get_epsilon(1e-5), 1)
        4.2
    """

    @known_arguments
    def __init__(self, *, accountant: str = "prv", secure_mode: bool = False) -> None:
        self.runs: list[ScheduledRun] = []
        self._accountant = create_accountant(accountant)
        self.secure_mode = secure_mode

    @property
    def accountant(self) -> IAccountant:
        """Who is asked by `get_epsilon`. One that is assigned counts what was counted before too.

        Raises:
            ConfigurationError: on assignment, for anything but an accountant of this library.
        """
        return self._accountant

    @accountant.setter
    def accountant(self, other: IAccountant) -> None:
        if not isinstance(other, IAccountant):
            raise ConfigurationError(
                f"accountant={type(other).__name__} must be made by create_accountant, here or by "
                "register_accountant from a class of yours."
            )
        if other is not self._accountant:
            other.take_over(self._accountant)
            self._accountant = other

    # -- making things private ---------------------------------------------------------------------

    @known_arguments
    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: Optimizer,
        data_loader: DataLoader[Any] | DPDataLoader,
        noise_multiplier: float,
        max_grad_norm: float | Sequence[float],
        criterion: nn.Module | None = None,
        batch_first: bool = True,
        loss_reduction: str = "mean",
        poisson_sampling: bool = True,
        clipping: str = "flat",
        noise_generator: torch.Generator | None = None,
        grad_sample_mode: str = "hooks",
        wrap_model: bool = True,
        rand_on_empty: bool = False,
        target_unclipped_quantile: float | None = None,
        clipbound_learning_rate: float | None = None,
        max_clipbound: float | None = None,
        min_clipbound: float | None = None,
        unclipped_num_std: float | None = None,
    ) -> tuple[Any, ...]:
        """Model, optimizer and loader for a loop that is as it was.

        Args:
            module: any model that `ModuleValidator` finds valid. One that was made private before is
                taken off its earlier run, whose steps stay counted.
            optimizer: over exactly its trainable parameters; the object itself becomes private.
            data_loader: its dataset, and its length: the sampling rate is ``1 / len(data_loader)``.
            noise_multiplier: standard deviation of the noise over max_grad_norm.
            max_grad_norm: bound on one example's gradient; for "per_layer" one for each trainable
                parameter, in order.
            criterion: returned as it is, in the "ghost" mode.
            batch_first: whether examples are dimension 0 of the inputs, or 1.
            loss_reduction: how the loss joins the examples, "mean" or "sum".
            poisson_sampling: False keeps the order of `data_loader`, shuffled or not; the steps are
                then accounted without amplification by sampling.
            clipping: "flat", "per_layer", or "adaptive".
            noise_generator: gives the seed of the run: for tests, not private. It moves on, so that a
                second run has other noise.
            grad_sample_mode: "hooks", "ew", "functorch" or "ghost": the same gradients.
            wrap_model: whether to return the model as a `GradSampleModule`.
            rand_on_empty: accepted: an empty batch is one row of zeros without weight.
            target_unclipped_quantile, clipbound_learning_rate, max_clipbound, min_clipbound, \
unclipped_num_std: of "adaptive" clipping, see `dptorch.clipping.AdaptiveClipping`.

        Returns:
            (model, optimizer, loader); in the "ghost" mode (model, optimizer, criterion, loader).

        Raises:
            UnsupportedModuleError: a module mixes examples.
            ConfigurationError: an argument that cannot be honoured.
        """
        return self._make_private(
            module,
            optimizer,
            data_loader,
            criterion,
            length={"noise_multiplier": noise_multiplier, "steps": OPEN_END},
            max_grad_norm=max_grad_norm,
            batch_first=batch_first,
            loss_reduction=loss_reduction,
            poisson_sampling=poisson_sampling,
            clipping=clipping,
            noise_generator=noise_generator,
            grad_sample_mode=grad_sample_mode,
            wrap_model=wrap_model,
            adaptive={
                "quantile": target_unclipped_quantile,
                "learning_rate": clipbound_learning_rate,
                "max_norm": max_clipbound,
                "min_norm": min_clipbound,
                "count_stddev": unclipped_num_std,
            },
        )

    @known_arguments
    def make_private_with_epsilon(
        self,
        *,
        module: nn.Module,
        optimizer: Optimizer,
        data_loader: DataLoader[Any] | DPDataLoader,
        target_epsilon: float,
        target_delta: float,
        epochs: int,
        max_grad_norm: float | Sequence[float],
        criterion: nn.Module | None = None,
        batch_first: bool = True,
        loss_reduction: str = "mean",
        poisson_sampling: bool = True,
        clipping: str = "flat",
        noise_generator: torch.Generator | None = None,
        grad_sample_mode: str = "hooks",
        wrap_model: bool = True,
        target_unclipped_quantile: float | None = None,
        clipbound_learning_rate: float | None = None,
        max_clipbound: float | None = None,
        min_clipbound: float | None = None,
        unclipped_num_std: float | None = None,
        epsilon_tolerance: float = 0.01,
        eps_error: float | None = None,
        delta_error: float | None = None,
        alphas: Any = None,
    ) -> tuple[Any, ...]:
        """As `make_private`, with the noise that keeps `epochs` epochs within `target_epsilon`.

        The target is that of this run: what was spent before in this engine comes on top. After the
        last of the epochs the loader has no more batches, and a further step raises
        `BudgetExhausted`.

        Args:
            target_epsilon, target_delta: the guarantee at the end.
            epochs: passes over the loader.
            epsilon_tolerance, eps_error, delta_error, alphas: accepted: the search is finer than
                any, and the accountants have errors and orders of their own.
            others: see `make_private`.
        """
        if self.accountant.all_events():
            warn(
                f"this engine has spent privacy before: epsilon={target_epsilon:g} is what the new run "
                "will spend by itself, and get_epsilon() tells what all have spent together. Use a "
                "new PrivacyEngine for other data."
            )
        return self._make_private(
            module,
            optimizer,
            data_loader,
            criterion,
            length={
                "target_epsilon": target_epsilon,
                "target_delta": target_delta,
                "steps": epochs * private_loader(data_loader).steps_per_epoch,
            },
            max_grad_norm=max_grad_norm,
            batch_first=batch_first,
            loss_reduction=loss_reduction,
            poisson_sampling=poisson_sampling,
            clipping=clipping,
            noise_generator=noise_generator,
            grad_sample_mode=grad_sample_mode,
            wrap_model=wrap_model,
            adaptive={
                "quantile": target_unclipped_quantile,
                "learning_rate": clipbound_learning_rate,
                "max_norm": max_clipbound,
                "min_norm": min_clipbound,
                "count_stddev": unclipped_num_std,
            },
        )

    def _make_private(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        data_loader: DataLoader[Any] | DPDataLoader,
        criterion: nn.Module | None,
        *,
        length: Mapping[str, Any],
        max_grad_norm: float | Sequence[float],
        batch_first: bool,
        loss_reduction: str,
        poisson_sampling: bool,
        clipping: str,
        noise_generator: torch.Generator | None,
        grad_sample_mode: str,
        wrap_model: bool,
        adaptive: Mapping[str, float | None],
    ) -> tuple[Any, ...]:
        get_gsm_class(grad_sample_mode)
        model = module._module if isinstance(module, GradSampleModule) else module
        ModuleValidator.validate(model, strict=True)
        _refuse_other_parameters(model, optimizer)
        loader = private_loader(data_loader, poisson=poisson_sampling)
        seed = None
        if noise_generator is not None:
            if self.secure_mode:
                raise ConfigurationError(
                    "noise_generator and secure_mode=True: noise whose seed is known protects nobody. "
                    "Leave one out."
                )
            seed = draw_seed(noise_generator)
            warn(
                "noise_generator: batches and noise follow from its state, so whoever knows it can "
                "take the noise off. This run is for tests, and not private."
            )
        plan = make_plan(
            sample_rate=loader.sample_rate,
            sample_size=dataset_size(loader.dataset),
            sampling="poisson" if poisson_sampling else order_of(data_loader),
            accountant=self.accountant.name,
            loss_reduction=loss_reduction,
            **clipping_arguments(model, clipping, max_grad_norm, adaptive),
            **length,
        )
        run = ScheduledRun(
            model,
            optimizer,
            plan,
            clipping_mode=MODES[grad_sample_mode],
            batch_dims=0 if batch_first else 1,
            seed=seed,
        )
        self.runs.append(run)
        self.accountant.runs.append(run)
        if plan.sampling != "poisson":
            warn(
                f"poisson_sampling=False: batches of a {plan.sampling} loader are not amplified by "
                "sampling, so epsilon counts every epoch as a release of every example, and is "
                "larger than the accountant of Poisson batches would say. Use poisson_sampling=True."
            )
        private = GradSampleModule(model) if wrap_model else model
        dp_optimizer = as_dp_optimizer(optimizer, run)
        if grad_sample_mode == "ghost":
            criterion = nn.CrossEntropyLoss() if criterion is None else criterion
            return private, dp_optimizer, criterion, loader.of_run(run)
        return private, dp_optimizer, loader.of_run(run)

    # -- what it costs -----------------------------------------------------------------------------

    def get_epsilon(self, delta: float) -> float:
        """ε spent so far by all that was made private here; 0 before the first step."""
        return self.accountant.get_epsilon(delta)

    def statements(self) -> list[Statement]:
        """The privacy statement of every engine behind this one; ``print`` them.

        There is one for each ``make_private``, and under a schedule one for each of its values. What
        all of them cost together is `get_epsilon`.
        """
        return [engine.statement() for run in self.runs for engine in run.engines]

    # -- compatibility -----------------------------------------------------------------------------

    @known_arguments
    def is_compatible(
        self,
        *,
        module: nn.Module,
        optimizer: Optimizer | None = None,
        data_loader: DataLoader[Any] | DPDataLoader | None = None,
    ) -> bool:
        """Whether `validate` raises nothing."""
        try:
            self.validate(module=module, optimizer=optimizer, data_loader=data_loader)
        except ConfigurationError:
            return False
        return True

    @known_arguments
    def validate(
        self,
        *,
        module: nn.Module,
        optimizer: Optimizer | None = None,
        data_loader: DataLoader[Any] | DPDataLoader | None = None,
    ) -> None:
        """Raise what ``make_private`` would about the model and the loader.

        Raises:
            UnsupportedModuleError, ConfigurationError: naming what is not compatible.
        """
        ModuleValidator.validate(module, strict=True)
        if data_loader is not None:
            private_loader(data_loader)

    @classmethod
    def get_compatible_module(cls, module: nn.Module) -> nn.Module:
        """A copy of `module` with what mixes examples replaced; see `ModuleValidator.fix`."""
        return ModuleValidator.fix_and_validate(module)

    # -- checkpoints -------------------------------------------------------------------------------

    @known_arguments
    def save_checkpoint(
        self,
        *,
        path: checkpoint.File,
        module: nn.Module,
        optimizer: Optimizer | None = None,
        noise_scheduler: Any = None,
        grad_clip_scheduler: Any = None,
        checkpoint_dict: Mapping[str, Any] | None = None,
    ) -> None:
        """Write all that the run of `module` needs to go on: `dptorch.PrivacyEngine.save_checkpoint`.

        What the other runs of this engine have released is in the file, too, so that ``get_epsilon``
        goes on with all of it.

        The optimizer that the run was made with is saved with it, given here or not. The file holds
        the secret key of the noise: keep it as safe as the data.

        Args:
            path: the file, or one that is open for writing bytes.
            module: what ``make_private`` returned.
            optimizer: accepted.
            noise_scheduler, grad_clip_scheduler: saved, if given.
            checkpoint_dict: plain values of your own, which ``load_checkpoint`` returns.
        """
        run = self._run_of(module)
        extra = {
            "past": [event.to_dict() for event in run.history_before()],
            "by_hand": [event.to_dict() for event in self.accountant.events],
            "identity": run.identity,
            "others": {
                identity: [event.to_dict() for event in events]
                for identity, events in self.accountant.history_by_run().items()
                if identity != run.identity
            },
            "own": dict(checkpoint_dict or {}),
        }
        run.engine.save_checkpoint(
            path, extra=extra, **_schedulers(noise_scheduler, grad_clip_scheduler)
        )

    @known_arguments
    def load_checkpoint(
        self,
        *,
        path: checkpoint.File,
        module: nn.Module,
        optimizer: Optimizer | None = None,
        noise_scheduler: Any = None,
        grad_clip_scheduler: Any = None,
    ) -> dict[str, Any]:
        """Go on with the run that was saved, after the same ``make_private``, before the first batch.

        Returns:
            The `checkpoint_dict` of ``save_checkpoint``.

        Raises:
            DataError, ConfigurationError, PrivacyError: as `dptorch.PrivacyEngine.load_checkpoint`.
        """
        run = self._run_of(module)
        saved = checkpoint.read(path)
        extra = saved.get("extra")
        if not isinstance(extra, Mapping) or not {"past", "by_hand", "own"} <= set(extra):
            raise ConfigurationError(
                f"{path} was not written by save_checkpoint of dptorch.compat.opacus. Load it with "
                "dptorch.PrivacyEngine.load_checkpoint."
            )
        if extra["past"]:  # a schedule has left the first plan behind
            run.take_up(PrivacyPlan.from_json(saved["engine"]["plan"]))
        run.engine.load_checkpoint(path, **_schedulers(noise_scheduler, grad_clip_scheduler))
        run.past = [Event.from_dict(values) for values in extra["past"]]
        run.identity = extra.get("identity", run.identity)
        self.accountant.events = [Event.from_dict(values) for values in extra["by_hand"]]
        self.accountant.elsewhere |= {
            identity: [Event.from_dict(values) for values in events]
            for identity, events in extra.get("others", {}).items()
        }
        return dict(extra["own"])

    def _run_of(self, module: nn.Module) -> ScheduledRun:
        model = module._module if isinstance(module, GradSampleModule) else module
        for run in reversed(self.runs):
            if run.model is model:
                return run
        raise ConfigurationError(
            "this engine has not made that module private: pass the one that make_private returned, "
            "or call make_private first."
        )


def _refuse_other_parameters(model: nn.Module, optimizer: Optimizer) -> None:
    """Say in Opacus's words, and then in ours, that model and optimizer do not fit."""
    try:
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        check_parameters(trainable, optimizer)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"Module parameters are different than optimizer Parameters: {error}"
        ) from None


def _schedulers(noise: Any, clip: Any) -> dict[str, Any]:
    both = {"noise_scheduler": noise, "grad_clip_scheduler": clip}
    return {name: scheduler for name, scheduler in both.items() if scheduler is not None}
