"""What the noise of each step of a run was drawn for: all that correlated noise keeps of the past."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dptorch.errors import ConfigurationError, PrivacyError
from dptorch.noise.gaussian import GaussianNoise
from dptorch.noise.spans import Span

__all__ = ["CorrelatedNoise", "Released"]


class Released:
    """The steps of a run that were released, and the context of each.

    z of a step is a function of (key, step, context, position), so that with the contexts all earlier
    noise can be drawn again, by a process that holds any part of the gradient.

    Args:
        steps: number of steps of the run.

    Attributes:
        contexts: of each step so far; None of one that failed, whose number is spent.
    """

    def __init__(self, steps: int) -> None:
        self.contexts: list[int | None] = []
        self._steps = steps
        self._made_on: set[str] = set()

    def check(self, step: int) -> None:
        """Raise PrivacyError unless `step` is one of the run's, and has not been released."""
        if step >= self._steps:
            raise PrivacyError(f"step {step} is past the {self._steps} that C was made for.")
        if step < len(self.contexts):
            raise PrivacyError(
                f"step {step} was released already; the noise of a run is correlated in the order of "
                "its steps. To repeat steps, go back to a checkpoint in a new engine."
            )

    def check_places(self, spans: Iterable[Span]) -> None:
        """Check that noise is drawn where that of earlier steps was.

        Raises:
            ConfigurationError: it is not. Devices have generators of their own.
        """
        # Which device of a kind does not matter: its generator is a function of the seed alone.
        places = {f"{span.flat.device.type} {span.flat.dtype}" for span in spans}
        if self.contexts and self._made_on != places:
            raise ConfigurationError(
                f"the noise of the first {len(self.contexts)} steps was made on "
                f"{', '.join(sorted(self._made_on))} and cannot be made again on "
                f"{', '.join(sorted(places))}, for later steps to take it back. Go on where the run "
                "was."
            )
        self._made_on = places

    def record(self, step: int, context: int) -> None:
        """Say that `step` has its noise; steps that were left out failed."""
        # A step that failed is counted all the same, and its number never used again.
        self.contexts += [None] * (step - len(self.contexts))
        self.contexts.append(context)

    def context(self, step: int) -> int | None:
        """What z of `step` was drawn for; None if it failed, or before the first."""
        return self.contexts[step] if 0 <= step < len(self.contexts) else None

    def state(self, steps_done: int) -> dict[str, Any]:
        """Plain values for `restore`."""
        # Steps that failed at the end are in `steps_done` already, but nothing was recorded after them.
        missing = [None] * (steps_done - len(self.contexts))
        return {"contexts": [*self.contexts, *missing], "made_on": sorted(self._made_on)}

    def restore(self, state: Mapping[str, Any] | None, steps_done: int) -> None:
        """Go on after `steps_done` steps.

        Raises:
            PrivacyError: the state is missing or is not that of so many steps.
        """
        # With a state of other steps, later ones would take back other noise than the model has.
        contexts = None if state is None else list(state["contexts"])
        if contexts is None or len(contexts) != steps_done or state is None:
            found = "none" if contexts is None else len(contexts)
            raise PrivacyError(
                f"the state has the noise of {found} of the {steps_done} steps that were taken. Noise "
                "that later steps should take back would be lost. Go on from a checkpoint as it was "
                "saved."
            )
        self.contexts = contexts
        self._made_on = set(state["made_on"])


class CorrelatedNoise:
    """What all noise that is correlated over steps has: z of its σ, and what it was drawn for.

    Args:
        noise_multiplier: σ of z, per unit of the sum's scale.
        steps: number of steps of the run.
        secure_rng: as of `GaussianNoise`.
    """

    def __init__(self, noise_multiplier: float, steps: int, *, secure_rng: bool) -> None:
        self._gaussian = GaussianNoise(noise_multiplier, secure_rng=secure_rng)
        self._released = Released(steps)

    @property
    def noise_multiplier(self) -> float:
        """Standard deviation of z per unit of scale."""
        return self._gaussian.noise_multiplier

    def state(self, steps_done: int) -> dict[str, Any]:
        """All that `restore` needs: what z was drawn for at each step. Buffers follow from it."""
        return self._released.state(steps_done)

    def restore(self, state: Mapping[str, Any] | None, steps_done: int) -> None:
        """Go on after `steps_done` steps; raises PrivacyError where the state is not theirs."""
        self._released.restore(state, steps_done)
