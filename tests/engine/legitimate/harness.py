"""Run a legitimate program under an engine, and hold each sum that reaches the noise against a loop.

A program is a model, a loss and a loop, as a user writes them. It may not be refused, and what it
sums up must be the clipped gradients of a loop over single examples: otherwise "not refused" could
be had by not looking.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset, TensorDataset

from dptorch.clipping.sums import ClippedSum
from dptorch.noise import GaussianNoise
from tests.engine.setup import make_engine

__all__ = ["STEPS", "Loss", "N", "Program", "Run", "classes", "linear", "plain_loop", "run"]

N = 12  # examples
STEPS = 2
BOUND = 0.3  # some gradients are clipped, some are not

Loss = Callable[[nn.Module, Any], Tensor]


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def classes() -> Dataset[Any]:
    """(x [5], class of three)."""
    return TensorDataset(torch.randn(N, 5), torch.arange(N) % 3)


def plain_loop(run: Run) -> None:
    for batch in run.batches():
        loss = run.loss(run.model, batch)
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()


@dataclass(frozen=True)
class Program:
    """One program.

    Attributes:
        loss: of a model and a batch of any size; the loop over single examples calls it as well.
        model, data: make them.
        loop: trains.
        reduction: the plan's.
        scale: what the loss of a batch of one is multiplied by to be the example's own.
        loaders: "both", or "engine" where following has to begin at the loader.
        tolerance: of a sum, relative to the clipping norm; None where the loss draws random numbers.
        settings: of the engine.
    """

    loss: Loss
    model: Callable[[], nn.Module] = linear
    data: Callable[[], Any] = classes
    loop: Callable[[Run], Any] = plain_loop
    reduction: str = "mean"
    scale: float = 1.0
    loaders: str = "both"
    tolerance: float | None = 2e-4
    settings: dict[str, Any] = field(default_factory=dict)
    collate: Callable[[list[Any]], Any] | None = None


@dataclass
class Step:
    """What one step summed up, and what a loop over its examples gives."""

    values: dict[str, Tensor]
    expected: dict[str, Tensor]


class Run:
    """What a loop works with.

    Attributes:
        model, engine, optimizer, data: made for this run.
        loss: the program's.
        seen: what the steps summed up.
    """

    def __init__(self, program: Program, own: bool) -> None:
        torch.manual_seed(0)
        self.program, self.own = program, own
        self.model = program.model()
        self.data = program.data()
        self.loss = program.loss
        plan = {"sample_rate": 0.5, "sample_size": N, "steps": STEPS, "max_grad_norm": BOUND}
        self.engine = make_engine(
            self.model,
            **plan | {"loss_reduction": program.reduction, "self_check": True} | program.settings,
        )
        self.optimizer = self.engine.attach(torch.optim.SGD(self.trained(), lr=0.1))
        self.physical: int | None = None
        self.seen: list[Step] = []
        self._waiting: list[Any] = []

    def trained(self) -> list[nn.Parameter]:
        """The parameters that are trained."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def use(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Train with another optimizer."""
        self.engine._binding.restore()  # type: ignore[union-attr]
        self.engine._binding = None
        self.optimizer = self.engine.attach(optimizer)
        return optimizer

    def batches(self) -> Iterator[Any]:
        """The batches of the run, of the engine's loader or of an ordinary one."""
        collate = self.program.collate
        while not self.engine.exhausted:
            if self.own:
                loader: Any = DataLoader(self.data, batch_size=5, collate_fn=collate)
            else:
                loader = self.engine.loader(
                    self.data, max_physical_batch_size=self.physical, collate_fn=collate
                )
            for batch in loader:
                rows = copy.deepcopy(batch)
                if not self.own and loader.current.padding:  # its last rows, which count nothing
                    rows = tree_map(lambda t, n=loader.current.examples: t[:n], rows)
                self._waiting.append(rows)
                yield batch
                if self.engine.exhausted:
                    return

    def step_seen(self, clipped: ClippedSum) -> None:
        """A sum is about to get its noise."""
        values = {k: v.clone() for k, v in clipped.values.items()}
        exact = self.program.tolerance is not None
        self.seen.append(Step(values, self._expected() if exact else values))
        self._waiting = []

    def _expected(self) -> dict[str, Tensor]:
        """The sum of the clipped gradients, by a loop over examples."""
        plain = self.program.model()
        plain.load_state_dict(self.model.state_dict())
        plain.train(self.model.training)
        trained = {n: p for n, p in plain.named_parameters() if p.requires_grad}
        total = {n: torch.zeros_like(p) for n, p in trained.items()}
        bound = self.engine.plan.max_grad_norm
        for batch in self._waiting:
            for i in range(_size(batch)):
                loss = self.loss(plain, row_of(batch, i)).sum() * self.program.scale
                grads = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
                found = {
                    n: torch.zeros_like(p) if g is None else g
                    for (n, p), g in zip(trained.items(), grads, strict=True)
                }
                norm = torch.stack([g.norm() for g in found.values()]).norm()
                for n, g in found.items():
                    total[n] += g * (bound / norm).clamp(max=1.0)
        return total


def row_of(batch: Any, i: int) -> Any:
    """A batch of one: example i of a batch."""
    size = _size(batch)

    def cut(t: Any) -> Any:
        return t[i : i + 1] if isinstance(t, Tensor) and t.dim() and len(t) == size else t

    return tree_map(cut, batch)


def _size(batch: Any) -> int:
    sizes: list[int] = []
    tree_map(lambda t: sizes.append(len(t)) if isinstance(t, Tensor) and t.dim() else None, batch)
    return sizes[0]


def run(program: Program, own: bool, monkeypatch: Any) -> Run:
    """Run a program to the end of its plan and compare all its sums.

    Raises:
        PrivacyError: where it is refused.
    """
    running = Run(program, own)
    plain = GaussianNoise.privatize

    def privatize(self: GaussianNoise, clipped: ClippedSum, *rest: Any, **more: Any) -> Any:
        running.step_seen(clipped)
        return plain(self, clipped, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(GaussianNoise, "privatize", privatize)
        program.loop(running)
    assert running.engine.steps_done == STEPS
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in running.trained())
    if program.tolerance is not None:
        for step in running.seen:
            for name, wanted in step.expected.items():
                far = (step.values[name].float() - wanted.float()).abs().max()
                assert far <= program.tolerance * BOUND, f"{name} is off by {far / BOUND:.2g} x C"
    return running
