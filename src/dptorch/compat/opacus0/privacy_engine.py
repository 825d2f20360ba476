"""`PrivacyEngine` of Opacus 0.x: made for a model, then attached to an optimizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dptorch import accounting
from dptorch.accounting.accountants.rdp import RDPAccountant
from dptorch.compat.arguments import OPEN_END, known_arguments
from dptorch.compat.opacus.clipping import clipping_arguments
from dptorch.compat.opacus.scheduled_run import ScheduledRun
from dptorch.compat.opacus0.utils.uniform_sampler import UniformWithReplacementSampler
from dptorch.errors import ConfigurationError, warn
from dptorch.plan import make_plan
from dptorch.sampling import PhysicalBatch

__all__ = ["PrivacyEngine"]


class PrivacyEngine:
    """Privacy for a model, an optimizer, and a DataLoader over a `UniformWithReplacementSampler`.

    The sampler is found by its rate, of which the engine's is a whole multiple; that many batches are
    one logical batch, of which all but the last go to ``optimizer.virtual_step()``. Without such a
    sampler every step is accounted as one in which any example may take part.

    Args:
        module: the model.
        batch_size: expected examples of a logical batch.
        sample_size: number of examples.
        alphas: accepted: Rényi orders are dptorch's.
        noise_multiplier: standard deviation of the noise over max_grad_norm; or
        target_epsilon, epochs: the ε after so many passes over the loader.
        target_delta: δ.
        max_grad_norm: bound on one example's gradient; a list of one for each parameter.
        sample_rate: probability that an example is in a logical batch, instead of sizes.
        loss_reduction: how the loss joins the examples, "mean" or "sum".
        batch_first: whether examples are dimension 0 of the inputs, or 1.
        poisson, secure_rng: accepted: how batches were drawn is seen, and noise is cryptographic.

    Raises:
        ConfigurationError: sizes or lengths are missing or contradict each other.

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randint(0, 2, (64,)))
        >>> loader = torch.utils.data.DataLoader(
        ...     data, batch_sampler=UniformWithReplacementSampler(64, 0.125))
        >>> model = nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> engine = PrivacyEngine(
        ...     model, sample_rate=0.25, epochs=1, target_epsilon=3.0, target_delta=1e-3,
        ...     max_grad_norm=1.0)
        >>> engine.attach(optimizer)
        >>> for i, (x, y) in enumerate(loader):
        ...     nn.functional.cross_entropy(model(x), y).backward()
        ...     optimizer.step() if i % 2 else optimizer.virtual_step()
        >>> epsilon, alpha = optimizer.privacy_engine.get_privacy_spent(1e-3)
        >>> round(epsilon, 2), engine.steps
        (3.0, 4)
    """

    @known_arguments
    def __init__(
        self,
        module: nn.Module,
        batch_size: float | None = None,
        sample_size: int | None = None,
        alphas: Sequence[float] | None = None,
        noise_multiplier: float | None = None,
        max_grad_norm: float | Sequence[float] = 1.0,
        *,
        sample_rate: float | None = None,
        target_delta: float = 1e-6,
        target_epsilon: float | None = None,
        epochs: float | None = None,
        loss_reduction: str = "mean",
        batch_first: bool = True,
        poisson: bool = False,
        secure_rng: bool = False,
    ) -> None:
        self.module = module
        self._batch_dims = 0 if batch_first else 1
        self._run: ScheduledRun | None = None
        self._hook: Any = None
        self._part: PhysicalBatch | None = None
        if sample_rate is None and batch_size is not None and sample_size is not None:
            sample_rate = batch_size / sample_size
        if sample_rate is None:
            raise ConfigurationError(
                f"sample_rate={sample_rate!r}, batch_size={batch_size!r}, "
                f"sample_size={sample_size!r}: give sample_rate, or both sizes."
            )
        self._sampler = UniformWithReplacementSampler.for_rate(sample_rate, sample_size)
        steps = OPEN_END
        if target_epsilon is not None:
            if epochs is None:
                raise ConfigurationError(
                    f"target_epsilon={target_epsilon!r} needs epochs, the length of the run."
                )
            noise_multiplier = None
            steps = self._steps(sample_rate, epochs)
        if self._sampler is not None:
            size = self._sampler.num_samples
            batches: dict[str, Any] = {"sample_rate": sample_rate, "sample_size": size}
        else:
            batches = _without_sampler(batch_size, target_epsilon)
        self.sample_rate = sample_rate
        self._plan = make_plan(
            **batches,
            steps=steps,
            target_epsilon=target_epsilon,
            noise_multiplier=noise_multiplier,
            target_delta=target_delta,
            accountant="rdp",
            loss_reduction=loss_reduction,
            **_clipping(module, max_grad_norm),
        )

    def _steps(self, sample_rate: float, epochs: float) -> int:
        """Steps of `epochs` passes, those on the rest of a pass among them."""
        if self._sampler is None:
            return math.ceil(round(epochs / sample_rate, 6))
        parts = self._sampler.parts_of(sample_rate)
        return math.ceil(epochs * math.ceil(len(self._sampler) / parts))

    def attach(self, optimizer: Optimizer) -> None:
        """Make `optimizer` step on noisy gradients, and give it ``virtual_step`` and
        ``privacy_engine``.

        Raises:
            ConfigurationError: this engine was attached before, or the optimizer does not hold exactly
                the model's trainable parameters.
        """
        if self._run is not None:
            raise ConfigurationError(
                "this engine was attached before. Make a new PrivacyEngine. Add its epsilon to this "
                "one's."
            )
        self._run = run = ScheduledRun(
            self.module, optimizer, self._plan, batch_dims=self._batch_dims
        )
        optimizer.privacy_engine = self  # type: ignore[attr-defined]
        if self._sampler is not None:
            self._sampler.serve(self.sample_rate, self._begin_epoch)
            self._hook = run.model.register_forward_pre_hook(self._receive, prepend=True)

    def detach(self) -> None:
        """Take the engine off model and optimizer, which are then as before."""
        if self._run is not None:
            self._run.engine.detach()
        if self._hook is not None:
            self._hook.remove()

    # What the engine's own loader would do: the batches of a DataLoader that the user made are known
    # by the sampler in it.

    def _begin_epoch(self) -> int:
        assert self._run is not None
        self._part = None
        self._run.engine.end_epoch(complete=False)
        return self._run.engine.steps_done

    def _receive(self, *_: Any) -> None:
        assert self._run is not None
        assert self._sampler is not None
        part = self._sampler.current
        if not torch.is_grad_enabled() or part is self._part:
            return
        self._part = part
        if part is None:
            self._run.engine.end_epoch()
        else:
            self._run.engine.begin_physical_batch(part)

    # -- what can be read --------------------------------------------------------------------------

    @property
    def noise_multiplier(self) -> float:
        """Standard deviation of the noise over max_grad_norm."""
        return self._plan.noise_multiplier

    @property
    def max_grad_norm(self) -> float:
        """Bound on one example's contribution."""
        return self._plan.max_grad_norm

    @property
    def target_delta(self) -> float:
        """δ."""
        return self._plan.target_delta

    @property
    def steps(self) -> int:
        """Steps done."""
        return 0 if self._run is None else self._run.steps_done

    def get_privacy_spent(self, target_delta: float | None = None) -> tuple[float, float]:
        """(ε, the Rényi order that gave it) so far; (0, inf) before the first step."""
        delta = self.target_delta if target_delta is None else target_delta
        history = [] if self._run is None else self._run.history()
        adjacency = self._plan.adjacency
        epsilon = accounting.get_accountant("rdp").epsilon(history, delta, adjacency=adjacency)
        return epsilon, RDPAccountant().best_order(history, delta, adjacency=adjacency)

    def to(self, device: Any) -> PrivacyEngine:
        """This object: noise is drawn where the gradients are."""
        return self


def _without_sampler(batch_size: float | None, target_epsilon: float | None) -> dict[str, Any]:
    """Batch arguments of `make_plan` for batches of which nothing is known."""
    if batch_size is None:
        raise ConfigurationError(
            "sample_rate alone does not say how large a batch is, and no "
            "UniformWithReplacementSampler with such a rate was made. Make the DataLoader with one "
            "(batch_sampler=) before the engine, or give batch_size and sample_size."
        )
    if target_epsilon is not None:
        warn(
            "no UniformWithReplacementSampler goes with this engine's rate, and a shuffled loader is "
            "not amplified by sampling: the noise is chosen for steps in each of which any example "
            "may take part, and is much larger. Make the DataLoader with "
            "batch_sampler=UniformWithReplacementSampler(num_samples, sample_rate), before the engine."
        )
    return {"sample_rate": 1.0, "batch_size": batch_size}


def _clipping(model: nn.Module, max_grad_norm: float | Sequence[float]) -> dict[str, Any]:
    style = "flat" if isinstance(max_grad_norm, (int, float)) else "per_layer"
    return clipping_arguments(model, style, max_grad_norm, {})
