"""Training loops as users write them: gradients, steps, optimizers, schedules, averages."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils

import dptorch
from tests.engine.legitimate.harness import N, Program, Run, plain_loop


def loss_of(m: nn.Module, b: Any) -> Tensor:
    return F.cross_entropy(m(b[0]), b[1])


def public() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(8, 5, generator=generator), torch.arange(8) % 3


LOOPS: dict[str, Program] = {}


def loop(function: Callable[[Run], Any]) -> Callable[[Run], Any]:
    """Add a loop to the table, under its name in words."""
    LOOPS[function.__name__.replace("_", " ")] = Program(loss_of, loop=function)
    return function


# -- gradients and steps ---------------------------------------------------------------------------


@loop
def zero_grad_first(run: Run) -> None:
    for batch in run.batches():
        run.optimizer.zero_grad(set_to_none=True)
        run.loss(run.model, batch).backward()
        run.optimizer.step()


@loop
def zero_grad_to_zeros(run: Run) -> None:
    for batch in run.batches():
        run.optimizer.zero_grad(set_to_none=False)
        run.loss(run.model, batch).backward()
        run.optimizer.step()


@loop
def zero_grad_of_the_model(run: Run) -> None:
    for batch in run.batches():
        run.model.zero_grad()
        run.loss(run.model, batch).backward()
        run.optimizer.step()


@loop
def closure(run: Run) -> None:
    for batch in run.batches():

        def evaluate(batch: Any = batch) -> Tensor:
            run.optimizer.zero_grad()
            loss = run.loss(run.model, batch)
            loss.backward()
            return loss

        value = run.optimizer.step(evaluate)  # type: ignore[arg-type]
        assert float(value) > 0  # type: ignore[arg-type]


@loop
def physical_batches(run: Run) -> None:
    run.physical = 2
    plain_loop(run)


@loop
def physical_batches_of_one_row(run: Run) -> None:
    run.physical = 1
    plain_loop(run)


@loop
def virtual_steps(run: Run) -> None:
    x, y = run.data.tensors
    while not run.engine.exhausted:
        for i in (0, 4, 8):
            batch = x[i : i + 4], y[i : i + 4]
            run._waiting.append(copy.deepcopy(batch))
            run.loss(run.model, batch).backward()
            if i < 8:
                run.optimizer.virtual_step()  # type: ignore[attr-defined]
        run.optimizer.step()
        run.optimizer.zero_grad()


@loop
def accumulation_by_parts(run: Run) -> None:
    """Backwards of parts add up until the step."""
    x, y = run.data.tensors
    while not run.engine.exhausted:
        for i in range(0, N, 3):
            batch = x[i : i + 3], y[i : i + 3]
            run._waiting.append(copy.deepcopy(batch))
            run.loss(run.model, batch).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()


@loop
def clip_grad_norm_before_the_step(run: Run) -> None:
    for batch in run.batches():
        run.optimizer.zero_grad()
        run.loss(run.model, batch).backward()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        run.optimizer.step()


@loop
def two_losses_one_graph(run: Run) -> None:
    for x, y in run.batches():
        out = run.model(x)
        (0.5 * F.cross_entropy(out, y)).backward(retain_graph=True)
        (0.5 * F.cross_entropy(out, y)).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()


@loop
def anomaly_detection(run: Run) -> None:
    with torch.autograd.set_detect_anomaly(True):
        plain_loop(run)


@loop
def profiled(run: Run) -> None:
    for batch in run.batches():
        with torch.autograd.profiler.record_function("step"):
            loss = run.loss(run.model, batch)
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()


@loop
def grad_enabled_by_phase(run: Run) -> None:
    for batch in run.batches():
        with torch.set_grad_enabled(True):
            run.loss(run.model, batch).backward()
            run.optimizer.step()
            run.optimizer.zero_grad()


@loop
def scaler_that_is_off(run: Run) -> None:
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for batch in run.batches():
        scaler.scale(run.loss(run.model, batch)).backward()
        scaler.step(run.optimizer)
        scaler.update()
        run.optimizer.zero_grad()


# -- optimizers, schedules, averages ---------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "weight decay": lambda p: torch.optim.SGD(p, 0.1, weight_decay=1e-2),
    "Adam": lambda p: torch.optim.Adam(p, 1e-2),
    "AdamW": lambda p: torch.optim.AdamW(p, 1e-2, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 1e-2),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
    "parameter groups": lambda p: torch.optim.AdamW(
        [{"params": p[:2], "lr": 0.1}, {"params": p[2:], "weight_decay": 0.0}], 1e-2
    ),
}


def _with_optimizer(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Any:
    def whole(run: Run) -> None:
        run.use(make(run.trained()))
        plain_loop(run)

    return whole


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 1, 0.5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda i: min(1.0, (i + 1) / 3)),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=10),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[1]
    ),
}


def _with_schedule(make: Callable[[torch.optim.Optimizer], Any]) -> Any:
    def whole(run: Run) -> None:
        schedule = make(run.optimizer)
        for batch in run.batches():
            run.loss(run.model, batch).backward()
            run.optimizer.step()
            schedule.step()
            run.optimizer.zero_grad()

    return whole


for _name, _optimizer in OPTIMIZERS.items():
    LOOPS[f"optimizer {_name}"] = Program(loss_of, loop=_with_optimizer(_optimizer))
for _name, _schedule in SCHEDULES.items():
    LOOPS[f"schedule {_name}"] = Program(loss_of, loop=_with_schedule(_schedule))


@loop
def schedule_that_follows_a_public_loss(run: Run) -> None:
    schedule = lr_scheduler.ReduceLROnPlateau(run.optimizer, patience=0)
    x, y = public()
    for batch in run.batches():
        run.loss(run.model, batch).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.model.eval()
        with torch.no_grad():
            schedule.step(F.cross_entropy(run.model(x), y).item())
        run.model.train()


@loop
def averaged_model(run: Run) -> None:
    ema = swa_utils.AveragedModel(run.model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
    for batch in run.batches():
        run.loss(run.model, batch).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        ema.update_parameters(run.model)
    with torch.no_grad():
        assert ema.eval()(public()[0]).shape == (8, 3)


@loop
def moving_average_by_hand(run: Run) -> None:
    ema = copy.deepcopy(run.model).requires_grad_(False)
    for batch in run.batches():
        run.loss(run.model, batch).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        with torch.no_grad():
            for a, p in zip(ema.parameters(), run.model.parameters(), strict=True):
                a.mul_(0.9).add_(p, alpha=0.1)


@loop
def mean_teacher(run: Run) -> None:
    """The teacher is an average of released parameters; each example has its own target."""
    teacher = copy.deepcopy(run.model).requires_grad_(False)
    run.loss = lambda m, b: F.mse_loss(m(b[0]), teacher(b[0]))
    plain_loop(run)


@loop
def checkpoints(run: Run) -> None:
    best = math.inf
    for batch in run.batches():
        loss = run.loss(run.model, batch)
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        best = min(best, loss.item())
        file = io.BytesIO()
        torch.save({"model": run.model.state_dict(), "best": best}, file)


@loop
def annealed_penalty(run: Run) -> None:
    """A weight of one term that follows a public schedule, and says so."""
    weight = iter([0.0, 0.1, 0.2, 0.3, 0.4])
    now: list[float] = []

    def annealed(m: nn.Module, b: Any) -> Tensor:
        out = m(b[0])
        beta = dptorch.tape.public_number(now[-1])
        return F.cross_entropy(out, b[1]) + beta * out.square().sum(1).mean()

    run.loss = annealed
    for batch in run.batches():
        now.append(next(weight))
        loss = annealed(run.model, batch)
        assert loss.item() > 0
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()


@loop
def schedule_of_a_weight_in_the_data(run: Run) -> None:
    """A curriculum: each example's weight is a function of its own loss and of the step."""
    threshold = [0.5]

    def curriculum(m: nn.Module, b: Any) -> Tensor:
        each = F.cross_entropy(m(b[0]), b[1], reduction="none")
        return (each * (each.detach() < threshold[-1])).mean()

    run.loss = curriculum
    for batch in run.batches():
        threshold.append(threshold[-1] + 0.3)
        curriculum(run.model, batch).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
