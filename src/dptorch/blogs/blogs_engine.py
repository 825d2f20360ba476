"""BloGSPrivacyEngine: ForgetNet's engine, with its shuffle or with a mechanism that has a guarantee."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dptorch.blogs.index_statement import BloGSSpent, BloGSStatement
from dptorch.blogs.noisy_steps import NoisySteps
from dptorch.blogs.shuffled_steps import ShuffledSteps
from dptorch.engine.optimizer_binding import check_parameters
from dptorch.errors import one_of
from dptorch.sampling import PrivateLoader
from dptorch.statement import Statement

__all__ = ["MECHANISMS", "BloGSPrivacyEngine", "make_steps"]

MECHANISMS = ("shuffle", "gaussian")


class BloGSPrivacyEngine:
    """Trains with block-wise gradient shuffling (DP-BloGS), or with noise under the same call.

    ``mechanism="shuffle"`` is ForgetNet's method: every tensor of the batch gradient is clipped and
    its blocks are permuted, once per optimizer step, however many backwards were accumulated. It
    gives **no** privacy guarantee (`dptorch.blogs.index_statement` says why); what it reports is the
    published formula's number, the *BloGS index*.

    ``mechanism="gaussian"`` is differentially private: see `dptorch.blogs.noisy_steps`.

    Args:
        optimizer: over the model's trainable parameters; its `step` shuffles, too.
        model: any module. Freeze what should not be trained before.
        target_epsilon: index, or ε, at which the run stops.
        delta: δ of the index, or of the guarantee.
        clip_value: largest norm of each tensor of the batch gradient; for "gaussian", of each
            layer's gradient of each example, or {layer: norm}.
        steps: optimizer steps planned.
        batch_size: records in a step; for "gaussian", the expected number.
        dataset_size: number of records; for "gaussian" and for ``index="0.1.21"``.
        mechanism: "shuffle" or "gaussian".
        options: for "shuffle" index, allocation, on_unattainable, see `ShuffledSteps`; for
            "gaussian" allocation, weights, shuffle_blocks, see `NoisySteps`.
        on_budget_exhausted: what a step past the target does: "stop" warns once and leaves the
            model as it is, "raise" raises `BudgetExhausted`.
        seed: for tests: randomness from a number.

    Raises:
        ConfigurationError: for settings that cannot be met; the message says what can.

    Example:
        >>> import torch, warnings
        >>> warnings.simplefilter("ignore")
        >>> model = torch.nn.Linear(20, 10)
        >>> engine = BloGSPrivacyEngine(
        ...     optimizer=torch.optim.SGD(model.parameters(), lr=0.1), model=model,
        ...     target_epsilon=8.0, delta=1e-5, clip_value=1.0, steps=10, batch_size=4)
        >>> for _ in range(10):
        ...     engine.zero_grad()
        ...     model(torch.randn(4, 20)).square().mean().backward()
        ...     epsilon, delta = engine.step()
        >>> epsilon <= 8.0, engine.get_privacy_spent().formal_epsilon
        (True, inf)
        >>> engine.statement().guarantee
        'none (heuristic)'
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        target_epsilon: float,
        delta: float,
        clip_value: float | Mapping[str, float],
        steps: int,
        batch_size: int,
        dataset_size: int | None = None,
        *,
        mechanism: str = "shuffle",
        on_budget_exhausted: str = "stop",
        seed: int | None = None,
        **options: Any,
    ) -> None:
        self.mechanism = one_of("mechanism", mechanism, MECHANISMS)
        self.model = model
        self.optimizer = optimizer
        check_parameters({n: p for n, p in model.named_parameters() if p.requires_grad}, optimizer)
        self._steps = make_steps(
            model,
            mechanism,
            target_epsilon=target_epsilon,
            delta=delta,
            clip_value=clip_value,
            steps=steps,
            batch_size=batch_size,
            dataset_size=dataset_size,
            on_budget_exhausted=on_budget_exhausted,
            seed=seed,
            **options,
        )
        try:
            self._steps.attach(optimizer)
        except BaseException:
            self._steps.detach()
            raise

    def step(self) -> BloGSSpent:
        """Clip, shuffle and step; returns what is spent, which unpacks as (epsilon, delta).

        A step without any gradient is none; a step past the target is not taken.
        """
        self.optimizer.step()
        return self.get_privacy_spent()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the accumulated gradients."""
        self.optimizer.zero_grad(set_to_none)

    def get_privacy_spent(self) -> BloGSSpent:
        """What is spent so far: formats as a float, unpacks as (epsilon, delta)."""
        return self._steps.spent()

    def loader(self, dataset: Any, **kwargs: Any) -> PrivateLoader:
        """Poisson batches of `dataset`, for ``mechanism="gaussian"``; see `PrivacyEngine.loader`.

        Raises:
            ConfigurationError: for the shuffle, which any DataLoader serves.
        """
        return self._steps.loader(dataset, **kwargs)

    @property
    def steps_done(self) -> int:
        """Steps taken."""
        return self._steps.steps_done

    @property
    def exhausted(self) -> bool:
        """Whether the run is at its target: another step would not be taken."""
        return self._steps.exhausted

    def statement(self) -> BloGSStatement | Statement:
        """What the run guarantees, and what it does not; ``print`` it."""
        return self._steps.statement()

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on with the run. Contains the secret key."""
        return self._steps.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the run that `state_dict` came from.

        Raises:
            ConfigurationError: if that run was another.
        """
        self._steps.load_state_dict(state)

    def detach(self) -> None:
        """Take the engine off model and optimizer; both are then as before."""
        self._steps.detach()


def make_steps(model: nn.Module, mechanism: str, **settings: Any) -> ShuffledSteps | NoisySteps:
    """The steps of a run under the named mechanism.

    Raises:
        ConfigurationError: an unknown name or setting; the nearest is named.
    """
    made = {"shuffle": ShuffledSteps, "gaussian": NoisySteps}
    kind = made[one_of("mechanism", mechanism, MECHANISMS)]
    known = [n for n in inspect.signature(kind).parameters if n != "model"]
    for name in settings:
        one_of(f"argument for mechanism={mechanism!r}", name, known)
    return kind(model, **settings)
