"""What the study measures: accuracy, time for a step, and what an adversary proves."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.blogs_study.methods import CLIP, DELTA, METHODS, Method
from benchmarks.blogs_study.tasks import Task, get_task
from dptorch.audit.evidence import Evidence
from dptorch.audit.games import audit_step
from dptorch.audit.result import AuditResult, judge
from dptorch.errors import PrivacyWarning

__all__ = ["Result", "Study", "Timing", "run_study", "step_audit", "time_steps"]

EPSILONS = (1.0, 3.0, 8.0)
_KNOWN_BATCH = 16  # records in the step game beside the canary


@dataclass(frozen=True)
class Result:
    """One way of training one task.

    Attributes:
        task, method: names.
        target: the ε or index asked for; infinity for non-private training.
        reported: what the method says it spent; None without a number.
        accuracy: on the test set, in [0, 1], at the learning rate best there.
        learning_rate: that one.
        step_claim: what the method says of a single step whose batch is known.
        step_lower: ε that the step game proves of such a step, at 95 %.
        step_ceiling: the most that it could have proved.
        final_lower: ε that a black-box attack on the final model proves of the whole run, at 95 %.
    """

    task: str
    method: str
    target: float
    reported: float | None
    accuracy: float
    learning_rate: float
    step_claim: float
    step_lower: float
    step_ceiling: float
    final_lower: float

    @property
    def refuted(self) -> bool:
        """Whether a measurement exceeds what the method says."""
        return self.step_lower > self.step_claim or self.final_lower > self.target


@dataclass(frozen=True)
class Timing:
    """Time of a step over that of a non-private one, from interleaved rounds.

    Attributes:
        model, method: names.
        low, median, high: 10th, 50th and 90th percentile of the ratio.
    """

    model: str
    method: str
    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Study:
    """All of it, in the order in which it was measured.

    Attributes:
        about: task name -> what it is.
        results, timings: the rows.
        quick: whether it was cut short.
    """

    about: dict[str, str]
    results: list[Result]
    timings: list[Timing]
    quick: bool


def run_study(
    tasks: Iterable[str],
    *,
    epsilons: Sequence[float] = EPSILONS,
    quick: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> Study:
    """Train and attack every task in every way.

    Args:
        tasks: names in `TASKS`.
        epsilons: targets of the ways that have one.
        quick: one learning rate, a fifth of the epochs, fewer games: to see that it works.
        progress: told one line for each result.
    """
    about: dict[str, str] = {}
    results: list[Result] = []
    timings: list[Timing] = []
    for name in tasks:
        task = get_task(name)
        if quick:
            task = replace(
                task,
                epochs=max(1, task.epochs // 5),
                learning_rates=task.learning_rates[-1:],
                inputs=task.inputs[:1500],
                labels=task.labels[:1500],
            )
        about[task.name] = task.about
        for method in METHODS.values():
            for target in epsilons if method.kind != "none" else (float("inf"),):
                result = measure(task, method, target, games=30 if quick else 100)
                results.append(result)
                progress(_line(result))
        timings += time_steps(task, rounds=5 if quick else 25)
    if not quick:
        timings += time_steps(eleven_million(), rounds=15)
    return Study(about, results, timings, quick)


def measure(task: Task, method: Method, target: float, *, games: int) -> Result:
    """Train at every learning rate, attack the best model and one step."""
    best: tuple[float, float, float | None, float] | None = None
    for rate in task.learning_rates:
        accuracy, reported, final = train(task, method, target, rate)
        if best is None or accuracy > best[0]:
            best = (accuracy, rate, reported, final)
    assert best is not None
    step = step_audit(task, method, target, games=games)
    return Result(
        task=task.name,
        method=method.name,
        target=target,
        reported=best[2],
        accuracy=best[0],
        learning_rate=best[1],
        step_claim=step.claimed_epsilon,
        step_lower=step.epsilon_lower,
        step_ceiling=step.ceiling,
        final_lower=best[3],
    )


def train(
    task: Task, method: Method, target: float, learning_rate: float
) -> tuple[float, float | None, float]:
    """(accuracy, what is reported, ε proved from the final model) of one run."""
    coins = np.random.default_rng(7).random(len(task.canary_labels)) < 0.5
    data = TensorDataset(
        torch.cat([task.inputs, task.canary_inputs[coins]]),
        torch.cat([task.labels, task.canary_labels[coins]]),
    )
    model = task.make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    steps = task.epochs * -(-len(data) // task.batch_size)
    run = method.start(model, optimizer, data, task.batch_size, steps, target, 1)
    done = 0
    while done < steps:
        for inputs, labels in run.loader:
            optimizer.zero_grad()
            task.loss(model, inputs, labels).backward()
            optimizer.step()
            done += 1
            if done >= steps:
                break
    reported = run.reported()
    run.detach()
    model.eval()
    scores = -task.losses(model, task.canary_inputs, task.canary_labels).numpy()
    found = judge(
        Evidence(np.nan_to_num(scores, nan=-1e30), coins),
        epsilon=target,
        delta=DELTA,
        adversary="sees the final model",
    )
    return task.accuracy(model), reported, found.epsilon_lower


def step_audit(task: Task, method: Method, target: float, *, games: int) -> AuditResult:
    """The step game on a step of the method's own run: its optimizer, its noise or its blocks.

    The adversary knows the weights, a batch and the canary, and sees the gradient that the
    optimizer got. For a shuffle it compares values bit for bit; for noise, it projects on the
    canary's contribution.
    """
    game = _StepGame(task, method, target)
    inside, outside, score = game.known()
    return audit_step(
        game.release,
        inside=inside,
        outside=outside,
        epsilon=game.claim(),
        delta=DELTA,
        score=score,
        games=games,
    )


class _StepGame:
    """Plays single steps of a method, each with fresh randomness."""

    def __init__(self, task: Task, method: Method, target: float) -> None:
        self._task, self._method, self._target = task, method, target
        n = _KNOWN_BATCH
        self._outside = (task.inputs[:n], task.labels[:n])
        self._inside = (
            torch.cat([task.inputs[:n], task.canary_inputs[:1]]),
            torch.cat([task.labels[:n], task.canary_labels[:1]]),
        )
        self._steps = task.epochs * -(-len(task.labels) // task.batch_size)
        self._left = 0
        self._start(None)

    def _start(self, seed: int | None) -> None:
        task = self._task
        self._model = task.make_model()
        # With a learning rate of zero every game is played at the same weights.
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=0.0)
        self._run = self._method.start(
            self._model,
            self._optimizer,
            TensorDataset(task.inputs, task.labels),
            task.batch_size,
            self._steps,
            self._target,
            seed,
        )
        self._left = self._steps

    def _restart(self, seed: int | None) -> None:
        self._run.detach()
        self._start(seed)

    def release(self, member: bool) -> list[Tensor]:
        """The gradient that the optimizer gets."""
        if not self._left:
            self._restart(None)
        self._left -= 1
        self._optimizer.zero_grad()
        inputs, labels = self._inside if member else self._outside
        self._task.loss(self._model, inputs, labels).backward()
        with warnings.catch_warnings():
            # The game's batches are known to the adversary, and no Poisson samples.
            warnings.simplefilter("ignore", PrivacyWarning)
            self._optimizer.step()
        return [p.grad.clone() for p in self._model.parameters() if p.grad is not None]

    def claim(self) -> float:
        """What the method reports after one step; noise without amplification, as the batch is
        known."""
        self._restart(None)
        self.release(True)
        reported = self._run.reported()
        return float("inf") if reported is None else reported

    def known(self) -> tuple[list[Tensor], list[Tensor], str]:
        """What the adversary knows of both worlds, and its best score."""
        if self._method.kind == "noise":
            # Two runs with one seed have the same noise: the difference is the canary's share.
            pair = []
            for member in (True, False):
                self._restart(0)
                pair.append(self.release(member))
            self._restart(None)
            share = [a - b for a, b in zip(*pair, strict=True)]
            return share, [torch.zeros_like(d) for d in share], "projection"
        model = self._task.make_model()
        sides = []
        for inputs, labels in (self._inside, self._outside):
            model.zero_grad()
            self._task.loss(model, inputs, labels).backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            if self._method.kind == "shuffle":
                gradients = [g * (CLIP / g.norm()).clamp(max=1) for g in gradients]
            sides.append([g.clone() for g in gradients])
        return sides[0], sides[1], "exact-match"


def time_steps(task: Task, *, rounds: int) -> list[Timing]:
    """Each method's time for forward, backward and step over the non-private one's.

    Methods take turns within a round, so that whatever else the machine does falls on all of them.
    """
    settings = [(m, 8.0, m.name) for m in METHODS.values()]
    blogs = METHODS["blogs-2024"]
    settings.append((blogs, 1e-9, "BloGS, blocks of one coordinate"))
    # Whole batches, again and again.
    times = -(-task.batch_size // len(task.labels))
    inputs = task.inputs.repeat(times, *[1] * (task.inputs.dim() - 1))[: task.batch_size]
    labels = task.labels.repeat(times, *[1] * (task.labels.dim() - 1))[: task.batch_size]
    sides: list[tuple[nn.Module, torch.optim.Optimizer]] = []
    for method, target, _ in settings:
        model = task.make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        data = TensorDataset(task.inputs, task.labels)
        method.start(model, optimizer, data, task.batch_size, 10_000, target, None)
        sides.append((model, optimizer))
    seconds = np.zeros((rounds + 2, len(sides)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PrivacyWarning)
        for turn in range(rounds + 2):
            for i, (side, stepping) in enumerate(sides):
                start = time.perf_counter()
                stepping.zero_grad()
                task.loss(side, inputs, labels).backward()
                stepping.step()
                seconds[turn, i] = time.perf_counter() - start
    ratios = (seconds / seconds[:, :1])[2:]  # the first rounds warm up
    low, median, high = np.percentile(ratios, [10, 50, 90], axis=0)
    return [
        Timing(task.name, name, float(low[i]), float(median[i]), float(high[i]))
        for i, (_, _, name) in enumerate(settings)
    ]


def eleven_million() -> Task:
    """A network of 11.1 million parameters on inputs of noise, for its time alone."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(640, 784, generator=generator)
    labels = torch.randint(10, (640,), generator=generator)
    return Task(
        name="11.1 M parameters",
        about="four linear layers",
        make_model=lambda: nn.Sequential(
            nn.Linear(784, 2560),
            nn.ReLU(),
            nn.Linear(2560, 2560),
            nn.ReLU(),
            nn.Linear(2560, 1000),
            nn.ReLU(),
            nn.Linear(1000, 10),
        ),
        inputs=inputs,
        labels=labels,
        test_inputs=inputs,
        test_labels=labels,
        canary_inputs=inputs[:1],
        canary_labels=labels[:1],
        batch_size=128,
        epochs=1,
        learning_rates=(0.01,),
    )


def _line(result: Result) -> str:
    target = "" if result.target == float("inf") else f" at {result.target:g}"
    return (
        f"{result.task}, {result.method}{target}: accuracy {100 * result.accuracy:.1f} %, "
        f"one step said to have {result.step_claim:.2f} proves {result.step_lower:.2f}, the final "
        f"model {result.final_lower:.2f}"
    )
