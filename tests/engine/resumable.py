"""A run of one's own loop that can be saved and resumed, for the tests of checkpoints."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedules

import dptorch
from dptorch.engine import checkpoint
from tests.engine.setup import make_data, parameters

STEPS = 11  # of which 4 are an epoch
PUBLIC_METRIC = (0.5, 0.4, 0.6, 0.6, 0.6, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7)
Make = Callable[[Any], Any]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.05, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.05),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1, lr_decay=0.01),
}
SCHEDULERS: dict[str, Make] = {
    "cosine": lambda o: schedules.CosineAnnealingLR(o, STEPS),
    "one cycle": lambda o: schedules.OneCycleLR(o, 0.2, total_steps=STEPS + 1),
    "lambda": lambda o: schedules.LambdaLR(o, lambda step: 0.9**step),
    "sequence": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, total_iters=3), schedules.ExponentialLR(o, 0.8)], [4]
    ),
    "plateau": lambda o: schedules.ReduceLROnPlateau(o, patience=1),
}
PAIRS = [("sgd", name) for name in SCHEDULERS] + [(name, "cosine") for name in OPTIMIZERS]


class Run:
    """A run of one's own loop, whose forward draws from three global generators."""

    def __init__(self, optimizer: str = "sgd", scheduler: str = "cosine", **plan: Any) -> None:
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Dropout(0.5), nn.Linear(9, 3))
        settings = {"sample_rate": 0.25, "sample_size": 24, "steps": STEPS, "noise_multiplier": 0.7}
        self.engine = dptorch.PrivacyEngine(self.model, target_delta=1e-3, **(settings | plan))
        self.optimizer = self.engine.attach(OPTIMIZERS[optimizer](self.model.parameters()))
        self.scheduler = SCHEDULERS[scheduler](self.optimizer)

    def go(self, until: int, physical: int | None = None) -> None:
        loader = self.engine.loader(make_data(), max_physical_batch_size=physical)
        while self.engine.steps_done < until:
            for x, y in loader:
                x = x + 0.01 * random.random() + 0.01 * np.random.rand()  # noqa: NPY002
                F.cross_entropy(self.model(x), y).backward()
                before = self.engine.steps_done
                self.optimizer.step()
                self.optimizer.zero_grad()
                if self.engine.steps_done > before:
                    self.next_rate()
                if self.engine.steps_done == until and self.engine.steps_done > before:
                    break

    def next_rate(self) -> None:
        if isinstance(self.scheduler, schedules.ReduceLROnPlateau):
            self.scheduler.step(PUBLIC_METRIC[self.engine.steps_done - 1])
        else:
            self.scheduler.step()

    def save(self, path: checkpoint.File, **more: Any) -> None:
        self.engine.save_checkpoint(path, scheduler=self.scheduler, **more)

    def load(self, path: checkpoint.File) -> Any:
        return self.engine.load_checkpoint(path, scheduler=self.scheduler)

    def everything(self) -> list[Tensor]:
        state = self.optimizer.state_dict()["state"]
        moments = [v for s in state.values() for v in s.values() if isinstance(v, Tensor)]
        rate = torch.tensor(self.optimizer.param_groups[0]["lr"])
        return [parameters(self.model), rate, *moments]
