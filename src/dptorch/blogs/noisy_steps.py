"""Training steps with a guarantee, in the place of the block shuffle: DP-SGD with a norm per layer.

Each example's gradient is clipped group by group, group l to C_l, and the sum gets Gaussian noise of
standard deviation σ C_l / √w_l, where the weights w_l sum to one. Divided by these deviations, one
example moves the whole sum by at most ``sqrt(sum_l w_l) / σ = 1 / σ``, so it is the Gaussian mechanism
of noise multiplier σ, whatever norms and weights are, and one accountant covers it (group-wise
clipping: He et al. 2023, arXiv:2212.01539). That is the parameter-wise budget that ForgetNet names,
with a proof: group l takes w_l / (2 σ²) of the step's zero-concentrated privacy.

Nothing is implemented here: it is a plan for the one engine of dptorch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dptorch.blogs.allocation import Group, trainable_groups
from dptorch.blogs.index_statement import BloGSSpent
from dptorch.blogs.shuffle import BlockShuffle
from dptorch.blogs.shuffled_steps import check_settings
from dptorch.engine.privacy_engine import PrivacyEngine
from dptorch.errors import ConfigurationError, one_of
from dptorch.randomness import RootKey
from dptorch.sampling import PrivateLoader
from dptorch.statement import Statement

__all__ = ["WEIGHTS", "NoisySteps", "group_settings"]

WEIGHTS = ("equal", "size")


class NoisySteps:
    """The steps of one run of the Gaussian sibling; the same face as `ShuffledSteps`.

    Args:
        model, target_epsilon, delta, steps, on_budget_exhausted, seed: see `PrivacyEngine`.
        clip_value: C_l, of every group or by name.
        batch_size: expected batch size.
        dataset_size: number of records, from which the sampling rate follows.
        allocation: what a group is, see `trainable_groups`.
        weights: w_l, see `group_settings`.
        shuffle_blocks: size of blocks to permute in each tensor *after* the noise. That is
            post-processing: it costs no privacy, gives none, and spoils the gradient. None: do not.

    Guarantees:
        Those of `PrivacyEngine`, at the stated ε; see its statement.
        Held by `test_noise_of_a_layer_is_sigma_c_over_root_w` and
        `test_what_is_spent_is_proven_and_stops`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        target_epsilon: float,
        delta: float,
        clip_value: float | Mapping[str, float],
        steps: int,
        batch_size: int,
        dataset_size: int | None,
        allocation: str = "layer",
        weights: str | Mapping[str, float] = "equal",
        shuffle_blocks: int | None = None,
        on_budget_exhausted: str = "stop",
        seed: int | None = None,
    ) -> None:
        norm = clip_value if isinstance(clip_value, int | float) else 1.0
        check_settings(target_epsilon, delta, norm, steps, batch_size)
        if dataset_size is None:
            raise ConfigurationError(
                'mechanism="gaussian" draws Poisson batches, whose rate is batch_size over the '
                "number of records: pass dataset_size=len(train_dataset)."
            )
        if shuffle_blocks is not None and shuffle_blocks < 1:
            raise ConfigurationError(f"shuffle_blocks={shuffle_blocks!r} must be at least 1.")
        self.engine = PrivacyEngine(
            model,
            batch_size=batch_size,
            sample_size=dataset_size,
            steps=steps,
            target_epsilon=target_epsilon,
            target_delta=delta,
            clipping_style=group_settings(model, clip_value, allocation, weights),
            on_budget_exhausted=on_budget_exhausted,
            seed=seed,
        )
        self._shuffle: BlockShuffle | None = None
        self._names = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
        if shuffle_blocks is not None:
            key = RootKey.from_os() if seed is None else RootKey.from_seed(seed)
            sizes = dict.fromkeys(self._names.values(), shuffle_blocks)
            self._shuffle = BlockShuffle(sizes, math.inf, key)
        self._hook: Any = None

    def attach(self, optimizer: Optimizer) -> None:
        """Make `optimizer` step on noisy gradients."""
        self.engine.attach(optimizer)
        if self._shuffle is not None:
            # Torch calls it on entry to the real step, which the engine reaches with noise only.
            self._hook = optimizer.register_step_pre_hook(self._permute)

    def _permute(self, optimizer: Optimizer, *_: Any) -> None:
        assert self._shuffle is not None
        noisy = {
            self._names[id(p)]: p.grad
            for group in optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        }
        self._shuffle.apply(noisy, self.engine.steps_done)

    def detach(self) -> None:
        """Give model and optimizer back."""
        self.engine.detach()
        if self._hook is not None:
            self._hook.remove()

    @property
    def steps_done(self) -> int:
        """Steps taken, empty batches included."""
        return self.engine.steps_done

    @property
    def exhausted(self) -> bool:
        """Whether every planned step is done."""
        return self.engine.exhausted

    def spent(self) -> BloGSSpent:
        """ε so far."""
        private = self.engine.statement().private
        return BloGSSpent.of_gaussian(*self.engine.get_privacy_spent(), private=private)

    def statement(self) -> Statement:
        """What the run guarantees."""
        return self.engine.statement()

    def loader(self, dataset: Any, **kwargs: Any) -> PrivateLoader:
        """Poisson batches of `dataset`; see `PrivacyEngine.loader`."""
        return self.engine.loader(dataset, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        """See `PrivacyEngine.state_dict`."""
        return self.engine.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `PrivacyEngine.load_state_dict`."""
        self.engine.load_state_dict(state)


def group_settings(
    model: nn.Module,
    clip_value: float | Mapping[str, float],
    allocation: str = "layer",
    weights: str | Mapping[str, float] = "equal",
) -> dict[str, tuple[float, float]]:
    """The engine's `clipping_style` for norms C_l and weights w_l.

    Args:
        model: its trainable parameters.
        clip_value: one norm for every group, or group name -> norm.
        allocation: see `trainable_groups`.
        weights: "equal", every group the same; "size", proportional to C_l √d_l, which makes the
            total power of the noise smallest; or group name -> weight, summing to one.

    Returns:
        pattern -> (C_l, w_l), as `dptorch.clipping.read_style` reads it.

    Raises:
        ConfigurationError: an unknown group, or one without a norm or weight.

    Example:
        >>> group_settings(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)), 0.5)
        {'0.*': (0.5, 0.5), '1.*': (0.5, 0.5)}
    """
    groups = trainable_groups(model, allocation)
    norms = _by_group("clip_value", clip_value, groups)
    if isinstance(weights, str):
        one_of("weights", weights, WEIGHTS)
        power = {g.name: norms[g.name] * math.sqrt(g.size) for g in groups}
        raw = power if weights == "size" else dict.fromkeys(power, 1.0)
        total = math.fsum(raw.values())
        shares = {name: value / total for name, value in raw.items()}
    else:
        shares = _by_group("weights", weights, groups)
    patterns = {_pattern(g, allocation): (norms[g.name], shares[g.name]) for g in groups}
    # The first pattern that matches takes a parameter: layers inside others go before them.
    return dict(sorted(patterns.items(), key=lambda item: -item[0].count(".")))


def _by_group(
    name: str, given: float | Mapping[str, float], groups: list[Group]
) -> dict[str, float]:
    names = [g.name for g in groups]
    if not isinstance(given, Mapping):
        return dict.fromkeys(names, float(given))
    for key in given:
        one_of(f"group in {name}", key, names)
    missing = [n for n in names if n not in given]
    if missing:
        raise ConfigurationError(
            f"{name} has no entry for {missing[0]!r}. The groups are: {', '.join(names)}."
        )
    return {n: float(given[n]) for n in names}


def _pattern(group: Group, allocation: str) -> str:
    first = next(iter(group.sizes))
    if allocation == "parameter":
        return first
    layer = first.rpartition(".")[0]
    return f"{layer}.*" if layer else "*"
