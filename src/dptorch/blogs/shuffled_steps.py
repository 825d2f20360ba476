"""Training steps of DP-BloGS: choose block sizes, shuffle gradients, count the index."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from dptorch.blogs.allocation import equal_share, per_step, trainable_groups
from dptorch.blogs.index import make_index
from dptorch.blogs.index_statement import (
    BloGSSpent,
    BloGSStatement,
    running_statistics,
    warning_text,
)
from dptorch.blogs.shuffle import BlockShuffle
from dptorch.engine.optimizer_binding import OptimizerBinding
from dptorch.errors import (
    BudgetExhausted,
    ConfigurationError,
    PrivacyError,
    one_of,
    warn,
)
from dptorch.randomness import RootKey
from dptorch.sampling import PrivateLoader

__all__ = ["ShuffledSteps", "check_settings"]


class ShuffledSteps:
    """Shuffles the gradients of one model, once per optimizer step, until the index is spent.

    Args:
        model: its trainable parameters are taken as they are now, tied ones once.
        target_epsilon: largest BloGS index of the run.
        delta: δ of the index formula.
        clip_value: largest L2 norm of each tensor of the batch gradient.
        steps: optimizer steps for which the block sizes are chosen.
        batch_size, dataset_size: for ``index="0.1.21"``.
        index: a name in `dptorch.blogs.INDICES`.
        allocation: see `trainable_groups`.
        on_unattainable: what to do about a target below what blocks of one coordinate have:
            "raise", or "minimum": use those and stop at their index instead, with a warning.
        on_budget_exhausted: "stop": warn once and step no more; "raise" `BudgetExhausted`.
        seed: permutations that can be repeated, instead of the operating system's randomness.

    Guarantees:
        None of privacy; see `dptorch.blogs.index_statement`. Every gradient of a step is clipped and
        shuffled, or `shuffle` raises and none is changed.
        Held by `test_no_raw_gradient_is_stepped_whichever_step_is_called` and
        `test_a_bad_gradient_is_no_step`.

    Raises:
        ConfigurationError: for settings that cannot be met.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        target_epsilon: float,
        delta: float,
        clip_value: float,
        steps: int,
        batch_size: int,
        dataset_size: int | None = None,
        index: str = "2024",
        allocation: str = "layer",
        on_unattainable: str = "raise",
        on_budget_exhausted: str = "stop",
        seed: int | None = None,
    ) -> None:
        check_settings(target_epsilon, delta, clip_value, steps, batch_size)
        one_of("on_unattainable", on_unattainable, ("raise", "minimum"))
        self._on_exhausted = one_of("on_budget_exhausted", on_budget_exhausted, ("stop", "raise"))
        _refuse_several_processes()
        self.index = make_index(
            index,
            clip_value=clip_value,
            delta=delta,
            batch_size=batch_size,
            dataset_size=dataset_size,
        )
        self.steps_planned = steps
        self.steps_done = 0
        self.target = target_epsilon
        groups = trainable_groups(model, allocation)
        # A group of one element has no order to shuffle, and the index would be 4C for it.
        shuffled = [group for group in groups if group.size > 1]
        sizes = [group.size for group in shuffled]
        chosen = (
            equal_share(
                self.index,
                sizes,
                steps,
                target_epsilon,
                at_minimum=on_unattainable == "minimum",
            )
            if sizes
            else []
        )
        self.per_step = per_step(self.index, sizes, chosen)
        self.group_block_sizes = {g.name: b for g, b in zip(shuffled, chosen, strict=True)}
        attained = self.index.after(steps, self.per_step)
        if attained > target_epsilon:
            self.target = attained
            warn(
                f"target_epsilon={target_epsilon:g} cannot be met: blocks of one coordinate have a "
                f"BloGS index of {attained:.4g} after {steps} steps. The run uses them and stops "
                "there."
            )
        self._names = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
        block_sizes = {
            name: max(1, min(b, n // 2))
            for group, b in zip(shuffled, chosen, strict=True)
            for name, n in group.sizes.items()
        }
        self.unshuffled = tuple(n for g in groups for n, d in g.sizes.items() if d == 1)
        self.buffers = running_statistics(model)
        key = RootKey.from_os() if seed is None else RootKey.from_seed(seed)
        self._shuffle = BlockShuffle(
            {**dict.fromkeys(self.unshuffled, 1), **block_sizes}, clip_value, key
        )
        self._binding: OptimizerBinding | None = None
        self._warned_exhausted = False
        warn(warning_text(self.unshuffled, self.buffers, not key.source.is_private))

    @property
    def exhausted(self) -> bool:
        """Whether another step would exceed the target."""
        return self.index.after(self.steps_done + 1, self.per_step) > self.target

    def shuffle(self, optimizer: Any) -> bool:
        """Clip and shuffle what `optimizer` is about to step on; counts one step.

        Returns:
            Whether to step. False where no parameter has a gradient, which is no step, and past the
            target.

        Raises:
            PrivacyError: a parameter with a gradient is not one of the run, or a gradient cannot be
                shuffled. Nothing was changed.
            BudgetExhausted: past the target, if asked for.
        """
        gradients: dict[str, Tensor] = {}
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if id(p) not in self._names:
                    raise PrivacyError(
                        f"a parameter of shape {tuple(p.shape)} has a gradient but was not "
                        "trainable, or not there, when the run was set up: its gradient would be "
                        "stepped as it is. Freeze and unfreeze before making the engine."
                    )
                gradients[self._names[id(p)]] = p.grad
        if not gradients:
            return False
        if self.exhausted:
            self._stop()
            return False
        self._shuffle.apply(gradients, self.steps_done)
        self.steps_done += 1
        return True

    def attach(self, optimizer: Optimizer) -> None:
        """Make `optimizer` shuffle whenever it steps, until `detach`."""
        self._binding = OptimizerBinding(
            optimizer,
            take_step=lambda: self.shuffle(optimizer),
            add_pending=lambda: None,
            drop_pending=lambda: None,
            owner=self,
        )

    def detach(self) -> None:
        """Give the optimizer its own methods back."""
        if self._binding is not None:
            self._binding.restore()
            self._binding = None

    def loader(self, dataset: Any, **kwargs: Any) -> PrivateLoader:
        """There is none.

        Raises:
            ConfigurationError: always; any DataLoader serves.
        """
        raise ConfigurationError(
            "the block shuffle takes batches from any DataLoader. loader() is for "
            'mechanism="gaussian", which must draw them itself.'
        )

    def _stop(self) -> None:
        message = (
            f"the BloGS index stands at {self.spent():.4f} after {self.steps_done} steps; another "
            f"would exceed {self.target:g} and was not taken. Plan more steps, or stop here."
        )
        if self._on_exhausted == "raise":
            raise BudgetExhausted(message)
        if not self._warned_exhausted:
            self._warned_exhausted = True
            warn(message)

    def spent(self) -> BloGSSpent:
        """The index so far; it grows with every step."""
        value = self.index.after(self.steps_done, self.per_step)
        return BloGSSpent.of_shuffle(value, self.index.delta)

    def statement(self) -> BloGSStatement:
        """What this run does and does not guarantee."""
        return BloGSStatement(
            index=self.index.name,
            nominal_epsilon=float(self.spent()),
            delta=self.index.delta,
            steps=self.steps_done,
            steps_planned=self.steps_planned,
            target_epsilon=self.target,
            clip_value=self._shuffle.clip_value,
            block_sizes=self.block_sizes,
            unshuffled=self.unshuffled,
            buffers=self.buffers,
            key_provenance=self._shuffle.key.source.value,
        )

    @property
    def block_sizes(self) -> dict[str, int]:
        """Name of each tensor that is shuffled -> its block size."""
        alone = set(self.unshuffled)
        return {n: b for n, b in self._shuffle.block_sizes.items() if n not in alone}

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on. Contains the key of the permutations."""
        return {
            "steps_done": self.steps_done,
            "index": self.index.name,
            "per_step": self.per_step,
            "block_sizes": dict(self._shuffle.block_sizes),
            "key": self._shuffle.key.export(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the run that `state_dict` came from.

        Raises:
            ConfigurationError: if that run had other block sizes or another index.
        """
        mine = self.state_dict()
        other = [k for k in ("index", "per_step", "block_sizes") if state.get(k) != mine[k]]
        if other:
            raise ConfigurationError(
                f"the checkpoint belongs to a run with another {other[0]}. Make the engine with the "
                "model, target, steps and index of that run."
            )
        done = state["steps_done"]
        if isinstance(done, bool) or not isinstance(done, int) or done < 0:
            raise ConfigurationError(f"the checkpoint has steps_done={done!r}, no number of steps.")
        self._shuffle.key = RootKey.restore(state["key"])
        self.steps_done = done


def check_settings(
    target_epsilon: float, delta: float, clip_value: float, steps: int, batch_size: int
) -> None:
    """Refuse settings that neither mechanism can honour.

    Raises:
        ConfigurationError: naming the first of them.
    """
    for name, value in (("target_epsilon", target_epsilon), ("clip_value", clip_value)):
        if not (math.isfinite(value) and value > 0):
            raise ConfigurationError(f"{name}={value!r} must be a positive number.")
    if not 0 < delta < 1:
        raise ConfigurationError(f"delta={delta!r} must be in (0, 1), for example 1e-5.")
    for name, count in (("steps", steps), ("batch_size", batch_size)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ConfigurationError(f"{name}={count!r} must be a positive integer.")


def _refuse_several_processes() -> None:
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        world = distributed.get_world_size()
        if world > 1:
            raise ConfigurationError(
                f"the block shuffle runs in one process, and this is one of {world}: each would "
                "draw its own permutations and the models would drift apart."
            )
