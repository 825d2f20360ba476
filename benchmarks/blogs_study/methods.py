"""The study's ways of training, each behind the same few calls."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from dptorch.blogs.blogs_engine import BloGSPrivacyEngine
from dptorch.engine.privacy_engine import PrivacyEngine
from dptorch.errors import PrivacyWarning

__all__ = ["DELTA", "METHODS", "Method", "Training"]

DELTA = 1e-5
CLIP = 1.0


@dataclass(frozen=True)
class Training:
    """A model under training: iterate `loader`, and backward and step as always.

    Attributes:
        loader: one epoch of batches.
        reported: the number that the method calls epsilon, so far; None without one.
        detach: give model and optimizer back.
    """

    loader: Iterable[Any]
    reported: Callable[[], float | None]
    detach: Callable[[], None]


@dataclass(frozen=True)
class Method:
    """A way of training.

    Attributes:
        name: for the tables.
        kind: "none", "shuffle" or "noise"; what an adversary looks for depends on it.
        start: (model, optimizer, data, batch size, steps, target epsilon, seed) -> `Training`.
    """

    name: str
    kind: str
    start: Callable[..., Training]


def _plain(
    model: nn.Module,
    optimizer: Optimizer,
    data: TensorDataset,
    batch_size: int,
    steps: int,
    epsilon: float,
    seed: int | None,
) -> Training:
    return Training(_shuffled_loader(data, batch_size, seed), lambda: None, lambda: None)


def _blogs(**settings: Any) -> Callable[..., Training]:
    def start(
        model: nn.Module,
        optimizer: Optimizer,
        data: TensorDataset,
        batch_size: int,
        steps: int,
        epsilon: float,
        seed: int | None,
    ) -> Training:
        engine = _quietly(
            BloGSPrivacyEngine,
            optimizer,
            model,
            epsilon,
            DELTA,
            CLIP,
            steps,
            batch_size,
            len(data),
            seed=seed,
            **settings,
        )
        shuffled = engine.mechanism == "shuffle"
        return Training(
            _shuffled_loader(data, batch_size, seed) if shuffled else engine.loader(data),
            lambda: float(engine.get_privacy_spent()),
            engine.detach,
        )

    return start


def _dpsgd(
    model: nn.Module,
    optimizer: Optimizer,
    data: TensorDataset,
    batch_size: int,
    steps: int,
    epsilon: float,
    seed: int | None,
) -> Training:
    engine = PrivacyEngine(
        model,
        batch_size=batch_size,
        sample_size=len(data),
        steps=steps,
        target_epsilon=epsilon,
        target_delta=DELTA,
        max_grad_norm=CLIP,
        self_check=False,
        seed=seed,
    )
    engine.attach(optimizer)
    return Training(engine.loader(data), lambda: engine.get_privacy_spent().epsilon, engine.detach)


def _shuffle(index: str) -> Callable[..., Training]:
    return _blogs(index=index, on_unattainable="minimum")


METHODS: dict[str, Method] = {
    "none": Method("non-private", "none", _plain),
    "blogs-2024": Method("BloGS, index 2024", "shuffle", _shuffle("2024")),
    "blogs-0.1.21": Method("BloGS, index 0.1.21", "shuffle", _shuffle("0.1.21")),
    "dp-sgd": Method("DP-SGD", "noise", _dpsgd),
    "gaussian": Method("Gaussian sibling", "noise", _blogs(mechanism="gaussian")),
}


def _shuffled_loader(
    data: TensorDataset, batch_size: int, seed: int | None
) -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(seed or 0)
    return DataLoader(data, batch_size, shuffle=True, generator=generator)


def _quietly(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Without the warning that the page itself gives at length."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PrivacyWarning)
        return make(*args, **kwargs)
