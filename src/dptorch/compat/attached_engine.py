"""The base of the adapters for fastDP, private-transformers and private_vision: an engine that is
made of a model and two numbers, and attached to an optimizer.

Each adapter translates its arguments. This module makes the plan, hands it to
`dptorch.PrivacyEngine`, and has the methods that all three share.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Unpack

from dptorch import accounting
from dptorch.accounting.accountants.rdp import RDPAccountant
from dptorch.clipping.functions import STABILITY
from dptorch.compat.arguments import OPEN_END
from dptorch.distributed.zero3 import whole_shape
from dptorch.engine.privacy_engine import PrivacyEngine
from dptorch.errors import ConfigurationError, PrivacyError, one_of, warn
from dptorch.plan import PlanSettings, make_plan
from dptorch.sampling import PrivateLoader
from dptorch.sampling.schemes import OWN_LOADER
from dptorch.statement import Statement

__all__ = ["AttachedEngine", "LossVectorEngine", "automatic_clipping"]

Callback = Callable[[Any], Any]
# What each accounting mode asks, by the name of its accountant here. "glw" composes numerically, as
# "pld" does with a certified upper bound. Noise that "gdp" calibrates is too little for its epsilon.
ACCOUNTANTS: Mapping[str, str] = {"rdp": "rdp", "rdp_cks": "rdp", "glw": "pld", "gdp": "pld"}


class AttachedEngine:
    """An engine made of a model, a batch size and a number of records, and attached to an optimizer.

    Args:
        module: any model; what is frozen stays so.
        settings: of `dptorch.plan.PlanSettings`, batch_size and sample_size at least. An epoch has
            ceil(sample_size / batch_size) steps, as many as a DataLoader has batches. With
            target_epsilon the length of the run is its budget: a step past it raises. With
            noise_multiplier, which comes before target_epsilon where both are given, the run has no
            end.
        num_steps: length of the run, instead of epochs.
        default_delta: sample_size -> δ where none is given.
        accounting_mode: of `ACCOUNTANTS`, or "all": the noise is then calibrated by "rdp".
        modes: the accounting modes that the original has.
        named_params: (name, parameter) pairs to train: exactly the trainable ones.
        record_snr: estimate signal and noise in each step, for `get_training_stats`.
        clipping_mode: see `dptorch.PrivacyEngine`.
        seed: for tests: randomness from a number, which is not private.

    Attributes:
        engine: the `dptorch.PrivacyEngine` that does the work, with all that it offers.
        steps: steps taken.

    Raises:
        ConfigurationError: for arguments that cannot be honoured.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        named_params: Sequence[tuple[str, Tensor]] | None,
        record_snr: bool,
        accounting_mode: str,
        modes: Sequence[str],
        default_delta: Callable[[int], float],
        clipping_mode: str,
        num_steps: int | None = None,
        seed: int | None = None,
        **settings: Unpack[PlanSettings],
    ) -> None:
        self.accounting_mode = one_of("accounting_mode", accounting_mode, modes)
        self._modes = [m for m in modes if m != "all"]
        self._check_named(module, named_params)
        self.batch_size = batch_size = _size("batch_size", settings.get("batch_size"))
        size = _size("sample_size", settings.get("sample_size"))
        self.sample_size = settings["sample_size"]
        self.epochs = settings.pop("epochs", None)
        self.target_epsilon = settings.get("target_epsilon")
        if settings.get("noise_multiplier") is not None:
            settings |= {"steps": OPEN_END, "target_epsilon": None}
        elif self.target_epsilon is not None:
            settings["steps"] = _planned_steps(self.epochs, num_steps, batch_size, size)
        else:
            raise ConfigurationError(
                "neither noise_multiplier nor target_epsilon is given: one of them says how much "
                "noise there is."
            )
        if settings.get("target_delta") is None:
            settings["target_delta"] = default_delta(int(size))
        settings["accountant"] = "rdp" if accounting_mode == "all" else ACCOUNTANTS[accounting_mode]
        self.engine = PrivacyEngine(
            module, plan=make_plan(**settings), clipping_mode=clipping_mode, seed=seed
        )
        self.module = module
        self.named_params = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        self.num_params = sum(whole_shape(p).numel() for _, p in self.named_params)
        self.record_snr = record_snr
        self.optimizer: Optimizer | None = None
        self._engine_step: Any = None
        self._own_step: Any = None
        self._locked = False
        self._callback: Callback | None = None
        self._warned_callback = False
        self._hook: Any = None
        self._signal: float | None = None

    @staticmethod
    def _check_named(module: nn.Module, named: Sequence[tuple[str, Tensor]] | None) -> None:
        if named is None:
            return
        trainable = {id(p): n for n, p in module.named_parameters() if p.requires_grad}
        listed = {id(p): n for n, p in named}
        odd = [
            n for key, n in {**trainable, **listed}.items() if (key in trainable) != (key in listed)
        ]
        if odd:
            raise ConfigurationError(
                f"named_params and the model's trainable parameters differ, in '{odd[0]}'"
                + (f" and {len(odd) - 1} more" if len(odd) > 1 else "")
                + ": what is trained without being listed would be trained without privacy. Freeze "
                "the others with requires_grad_(False), and leave named_params out."
            )

    # -- binding -----------------------------------------------------------------------------------

    def attach(self, optimizer: Optimizer) -> None:
        """Make `optimizer` private, and give it `virtual_step`, `get_privacy_spent` and
        `get_training_stats`.

        Raises:
            ConfigurationError: it does not hold exactly the model's trainable parameters.
        """
        self.engine.attach(optimizer)
        self.optimizer = optimizer
        inner = self._engine_step = optimizer.step
        add_pending = optimizer.virtual_step  # type: ignore[attr-defined]

        def step(_: Optimizer, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
            self._refuse_locked()
            self._before_step(**kwargs)
            return inner() if closure is None else inner(closure)

        def virtual_step(**kwargs: Any) -> None:
            self._before_step(**kwargs)
            add_pending()

        # Schedulers look for their mark on the method's function, and bind it anew.
        step.__dict__.update(getattr(inner, "__func__", inner).__dict__)
        self._own_step = types.MethodType(step, optimizer)
        optimizer.step = self._own_step  # type: ignore[method-assign]
        optimizer.virtual_step = virtual_step  # type: ignore[attr-defined]
        optimizer.privacy_engine = self  # type: ignore[attr-defined]
        optimizer.get_privacy_spent = self.get_privacy_spent  # type: ignore[attr-defined]
        optimizer.get_training_stats = self.get_training_stats  # type: ignore[attr-defined]
        self._hook = optimizer.register_step_pre_hook(lambda *_: self._on_noisy_gradient())

    def detach(self) -> None:
        """Take the engine off; model and optimizer are then as before, trained parameters kept."""
        optimizer = self.optimizer
        if optimizer is not None:
            if optimizer.__dict__.get("step") is self._own_step:
                optimizer.step = self._engine_step  # type: ignore[method-assign]
            for name in ("get_privacy_spent", "get_training_stats"):
                optimizer.__dict__.pop(name, None)
            self._hook.remove()
            self.optimizer = None
        self.engine.detach()

    def loader(self, dataset: Any, **kwargs: Any) -> PrivateLoader:
        """Batches of `dataset` that are drawn as epsilon assumes; see `dptorch.PrivacyEngine.loader`.

        With max_physical_batch_size a batch arrives in parts. Call ``optimizer.step`` after each; it
        waits for the last.
        """
        return self.engine.loader(dataset, **kwargs)

    def zero_grad(self, skip_grad: bool = False) -> None:
        """Drop what was not stepped, as ``optimizer.zero_grad()`` does."""
        if self.optimizer is not None and not skip_grad:
            self.optimizer.zero_grad()

    def lock(self) -> None:
        """Refuse steps until `unlock`."""
        self._locked = True

    def unlock(self) -> None:
        """Allow steps again."""
        self._locked = False

    def _refuse_locked(self) -> None:
        if self._locked:
            raise PrivacyError("the engine is locked: call unlock() before the next step.")

    def _before_step(self) -> None:
        """What a step or virtual step does first."""

    def _on_noisy_gradient(self) -> None:
        """``.grad`` has the noisy gradient, and the optimizer is about to step on it."""
        gradients = [p.grad for _, p in self.named_params if p.grad is not None]
        if self.record_snr and gradients:  # LBFGS makes them later, in its closure
            plan = self.engine.plan
            divisor = plan.expected_batch_size if plan.loss_reduction == "mean" else 1.0
            norms = torch.stack([g.detach().float().norm() for g in gradients])
            noisy = divisor * float(norms.norm())
            self._signal = math.sqrt(max(0.0, noisy**2 - self._noise_norm() ** 2))
        if self._callback is not None:
            self._callback(self)

    # -- what the run is and has spent -------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Steps taken, each counted before it is applied."""
        return self.engine.steps_done

    @property
    def sample_rate(self) -> float:
        """Probability with which a step draws each example."""
        return self.engine.plan.sample_rate

    @property
    def noise_multiplier(self) -> float:
        """Standard deviation of the noise over max_grad_norm."""
        return self.engine.noise_multiplier

    @property
    def effective_noise_multiplier(self) -> float:
        """The noise multiplier over the batch size."""
        return self.noise_multiplier / self.batch_size

    @property
    def max_grad_norm(self) -> float:
        """Bound on one example's contribution."""
        return self.engine.max_grad_norm

    @property
    def target_delta(self) -> float:
        """δ of the guarantee."""
        return self.engine.plan.target_delta

    def statement(self) -> Statement:
        """What the run guarantees, and what it does not; ``print`` it."""
        return self.engine.statement()

    def get_privacy_spent(
        self, steps: int | None = None, accounting_mode: str | None = None, lenient: bool = False
    ) -> dict[str, float]:
        """What was spent so far, or what `steps` steps spend.

        Args:
            steps: by default those taken.
            accounting_mode: by default the engine's; "all" asks all that make an upper bound.
            lenient: leave out what an accountant cannot answer, instead of raising.

        Returns:
            "eps_rdp" and "alpha_rdp" of Rényi accounting; "eps_low", "eps_estimate" (to nine digits)
            and "eps_upper" (a certified bound) of numerical composition; "eps_gdp" of the central
            limit, which is no bound, beside "eps_upper", which is.
        """
        mode = one_of(
            "accounting_mode", accounting_mode or self.accounting_mode, [*self._modes, "all"]
        )
        taken = self.engine.sampling_run[OWN_LOADER]
        at = self.steps if steps is None else steps
        history = self.engine.plan.history(at, own_loader_steps=min(at, taken))
        found: dict[str, float] = {}
        for each in [m for m in self._modes if m != "gdp"] if mode == "all" else [mode]:
            try:
                found |= self._epsilons(each, history)
            except PrivacyError:
                if not lenient:
                    raise
        return found

    def _epsilons(self, mode: str, history: Sequence[accounting.Event]) -> dict[str, float]:
        delta, adjacency = self.target_delta, self.engine.plan.adjacency

        def epsilon(accountant: str) -> float:
            return accounting.get_accountant(accountant).epsilon(
                history, delta, adjacency=adjacency
            )

        if mode == "glw":
            exact = epsilon("exact")
            return {"eps_low": exact, "eps_estimate": exact, "eps_upper": epsilon("pld")}
        if mode == "gdp":
            return {"eps_gdp": epsilon("gdp"), "eps_upper": epsilon("pld")}
        alpha = RDPAccountant().best_order(history, delta, adjacency=adjacency)
        return {f"eps_{mode}": epsilon("rdp"), f"alpha_{mode}": alpha}

    def get_training_stats(self) -> dict[str, float | None]:
        """How the last step was clipped, and how signal and noise compare.

        "med_clip", "max_clip" and "min_clip", the examples' clipping coefficients, are exact functions
        of private data: NOT PRIVATE. "signal" is estimated from the noisy gradient and what is known of
        its noise, so it costs nothing; "noise" is the noise's expected norm, as is "noise_limit".
        """
        seen = self.engine.diagnostics
        low, mid, high = (None, None, None) if seen is None else seen.coefficients
        noise = self._noise_norm()
        return {
            "med_clip": mid,
            "max_clip": high,
            "min_clip": low,
            "snr": math.inf if self._signal is None or not noise else self._signal / noise,
            "signal": self._signal,
            "noise": noise,
            "noise_limit": noise,
        }

    def _noise_norm(self) -> float:
        return math.sqrt(self.num_params) * self.noise_multiplier * self.max_grad_norm

    def __repr__(self) -> str:
        shown = (
            "target_epsilon",
            "target_delta",
            "noise_multiplier",
            "effective_noise_multiplier",
            "epochs",
            "max_grad_norm",
            "sample_rate",
            "batch_size",
            "accounting_mode",
        )
        lines = "".join(f"  {name}={getattr(self, name)},\n" for name in shown)
        return f"PrivacyEngine(\n{lines})"


class LossVectorEngine(AttachedEngine):
    """An `AttachedEngine` whose steps are given the loss of each example, [B], and backpropagate it.

    Steps call for no backward of the user's own, so ``zero_grad`` of optimizer, engine or model, which
    drops gradients that were not stepped on, drops what ``virtual_step`` has put aside.
    """

    def attach(self, optimizer: Optimizer) -> None:
        """See `AttachedEngine.attach`."""
        super().attach(optimizer)
        self._engine_zero_grad = optimizer.zero_grad

        def zero_grad(set_to_none: bool = True) -> None:
            self.engine.drop_batch()
            self._engine_zero_grad(set_to_none)

        optimizer.zero_grad = zero_grad  # type: ignore[method-assign]
        self.module.zero_grad = _DroppingZeroGrad(  # type: ignore[method-assign]
            self.module, self.engine
        )

    def detach(self) -> None:
        """See `AttachedEngine.detach`."""
        if self.optimizer is not None:
            self.optimizer.zero_grad = self._engine_zero_grad  # type: ignore[method-assign]
        self.module.__dict__.pop("zero_grad", None)
        super().detach()

    def _before_step(
        self,
        *,
        loss: Tensor | None = None,
        scale: float = 1.0,
        callback: Callback | None = None,
        **unknown: Any,
    ) -> None:
        for name in unknown:
            one_of("argument of step", name, ("loss", "scale", "callback", "closure"))
        if loss is None or loss.dim() != 1:
            shape = None if loss is None else tuple(loss.shape)
            raise ConfigurationError(
                f"optimizer.step(loss=...) and virtual_step(loss=...) take one loss for each example, "
                f"of shape [B], but this has shape {shape}. Compute it with reduction='none', and do "
                "not call backward()."
            )
        if callback is not None and not self._warned_callback:
            self._warned_callback = True
            warn(
                "callback is called with the noisy gradient in .grad, just before the optimizer's "
                "step. Nobody is shown the sum without noise."
            )
        self._callback = callback
        # A loss that was scaled up for half precision is scaled back, gradients and all.
        scaled = loss if scale == 1.0 else loss / scale
        with torch.enable_grad():
            scaled.backward(torch.ones_like(scaled))


class _DroppingZeroGrad:
    """A module's ``zero_grad`` that also drops what an engine has put aside for its step.

    Copies and pickles of the module have the ordinary one.
    """

    def __init__(self, module: nn.Module, engine: PrivacyEngine) -> None:
        self._module = module
        self._engine = engine

    def __call__(self, set_to_none: bool = True) -> None:
        self._engine.drop_batch()
        type(self._module).zero_grad(self._module, set_to_none)

    def __reduce__(self) -> Any:
        return _plain_zero_grad, (self._module,)


def _plain_zero_grad(module: nn.Module) -> Callable[..., None]:
    return types.MethodType(type(module).zero_grad, module)


def automatic_clipping(stability: float | None) -> str:
    """Which clipping function ``C / (n + stability)`` is; None is the default.

    Raises:
        ConfigurationError: for a constant that none has.
    """
    if stability == 0:
        return "normalised"
    if stability not in (None, STABILITY):
        raise ConfigurationError(
            f"numerical_stability_constant={stability!r}: automatic clipping has {STABILITY} here, or "
            "0. Leave it out."
        )
    return "automatic"


def _size(name: str, size: float | None) -> float:
    if size is None or not (math.isfinite(size) and size > 0):
        raise ConfigurationError(f"{name}={size!r} must be a number of examples above 0.")
    return size


def _planned_steps(
    epochs: float | None, num_steps: int | None, batch_size: float, sample_size: float
) -> int:
    if num_steps is not None:
        if epochs is not None:
            raise ConfigurationError(
                f"epochs={epochs!r} and num_steps={num_steps!r}: give one, the length of the run."
            )
        return math.ceil(num_steps)
    if epochs is None or not epochs > 0:
        raise ConfigurationError(
            f"epochs={epochs!r}: target_epsilon needs the length of the run, a number above 0."
        )
    return math.ceil(round(epochs * math.ceil(sample_size / batch_size), 6))
