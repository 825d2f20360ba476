"""Show the progress of a run on a terminal or in a log."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from dptorch.training.job import Setup

__all__ = ["EpochLines", "ProgressBar", "introduce", "observer_for"]


def introduce(setup: Setup, console: Console) -> None:
    """Print what is about to be trained, on what, with how much noise."""
    plan, data = setup.engine.plan, setup.data
    n_train, n_test = data.sizes
    parameters = sum(p.numel() for p in setup.model.parameters() if p.requires_grad)
    budget = (
        f"ε at most {plan.target_epsilon:g}"
        if plan.target_epsilon is not None
        else f"ε will be {plan.epsilon():.3f}"
    )
    console.print(f"[bold]Data[/]     {n_train:,} to train, {n_test:,} to test: {data.source}")
    console.print(f"[bold]Model[/]    {setup.job.model}, {parameters:,} parameters, {setup.device}")
    console.print(
        f"[bold]Privacy[/]  {budget}, δ {plan.target_delta:g}: noise {plan.noise_multiplier:.3f} x "
        f"clipping norm {plan.max_grad_norm:g}, {plan.steps:,} steps of about "
        f"{plan.expected_batch_size:,.0f} examples"
    )
    reading = getattr(setup.job, "reading", None)  # of the tasks on numbers and images
    if data.table is not None:
        if data.table.skipped:
            console.print(f"[bold yellow]Skipped[/]  {data.table.skipped:,} rows that do not fit")
        for item in data.table.schema.read_from_data:
            console.print(
                f"[bold yellow]Assumed public[/]  {item}: read off the data without noise"
            )
    tabular = setup.job.data is not None and len(data.input_shape) == 1
    if (
        reading is not None
        and tabular
        and not (reading.schema or reading.bounds or reading.column_bounds)
    ):
        console.print(
            "[bold]Hint[/]     Columns are used as they are. Training is usually much better with "
            "--bounds LOW,HIGH or a JSON file of public ranges."
        )
    if setup.job.seed is not None:
        console.print("[bold yellow]Not private[/]: the noise comes from a seed. For tests only.")
    console.print()


def observer_for(console: Console) -> ProgressBar | EpochLines:
    """A live bar on a terminal, a line an epoch in a log."""
    return ProgressBar(console) if console.is_terminal else EpochLines(console)


class EpochLines:
    """One plain line after each epoch, for logs."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __enter__(self) -> EpochLines:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    def started(self, setup: Setup, step: int) -> None:
        """See `dptorch.training.loop.Observer`."""

    def stepped(self, step: int, train_loss: float) -> None:
        """See `dptorch.training.loop.Observer`."""

    def tested(self, row: Mapping[str, Any]) -> None:
        """See `dptorch.training.loop.Observer`."""
        from dptorch.training.task import headline

        self._console.print(
            f"epoch {row['epoch']:6.2f}   step {row['step']:5d}   ε {row['epsilon']:6.3f}   "
            f"{headline(row)}   {row['seconds']:6.1f} s"
        )


class ProgressBar:
    """A live bar with ε, losses, test accuracy and the time left."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=24),
            TextColumn("ε {task.fields[epsilon]:.3f}"),
            TextColumn("{task.fields[tested]}"),
            TextColumn("[dim]training loss {task.fields[loss]:.3f} (not private)[/]"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=console,
        )
        self._task = self._progress.add_task("", total=1, epsilon=0.0, tested="", loss=0.0)

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def started(self, setup: Setup, step: int) -> None:
        """See `dptorch.training.loop.Observer`."""
        self._progress.reset(self._task, total=setup.engine.plan.steps, completed=step)

    def stepped(self, step: int, train_loss: float) -> None:
        """See `dptorch.training.loop.Observer`."""
        self._progress.update(self._task, completed=step, loss=train_loss)

    def tested(self, row: Mapping[str, Any]) -> None:
        """See `dptorch.training.loop.Observer`."""
        from dptorch.training.task import headline

        self._progress.update(self._task, epsilon=row["epsilon"], tested=headline(row))
