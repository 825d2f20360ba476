"""Run the training loop of `dptorch train`, and write its results.

The loop is the one that any user of `PrivacyEngine` writes. What is added here: a test after each
epoch, a checkpoint, and an orderly end when the user presses Ctrl-C.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import FrameType, TracebackType
from typing import Any, Protocol

from dptorch.distributed import Ranks
from dptorch.errors import DataError
from dptorch.sampling import PrivateLoader
from dptorch.training.canaries import CANARY_FILE
from dptorch.training.claims import for_machines
from dptorch.training.digest import digest_of
from dptorch.training.job import Setup
from dptorch.training.physical_batches import PhysicalBatches
from dptorch.training.run_folder import NOT_PRIVATE, SCHEMA_FILE, RunFolder
from dptorch.training.run_page import missing_packages, write_report
from dptorch.training.task import headline

__all__ = ["Observer", "Outcome", "Silent", "train"]

Row = dict[str, Any]


class Observer(Protocol):
    """Receives progress callbacks. Losses are of private data: show them only to the data owner."""

    def started(self, setup: Setup, step: int) -> None:
        """The run begins, or goes on after `step` steps."""

    def stepped(self, step: int, train_loss: float) -> None:
        """A logical batch is done. `train_loss` is NOT PRIVATE."""

    def tested(self, row: Mapping[str, Any]) -> None:
        """An epoch is done; `row` is what `metrics.csv` gets."""


class Silent:
    """An observer that says nothing."""

    def started(self, setup: Setup, step: int) -> None:
        """See `Observer`."""

    def stepped(self, step: int, train_loss: float) -> None:
        """See `Observer`."""

    def tested(self, row: Mapping[str, Any]) -> None:
        """See `Observer`."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        folder: what it wrote.
        last: the last row of `metrics.csv`; on several ranks the first has it.
        interrupted: whether it stopped before its plan was done; `--resume` continues it.
    """

    folder: RunFolder
    last: Mapping[str, Any]
    interrupted: bool


class StopOnSignal:
    """Turns the first Ctrl-C (or SIGTERM) into a request; the second one interrupts as usual.

    An optimizer step cut in half would have changed parameters without being counted, so the loop
    looks at `requested()` between batches instead.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            for number in self.SIGNALS:
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        # A launcher passes the signal on to processes that have had it from the terminal.
        if self._requested and self._ranks.size == 1:
            raise KeyboardInterrupt
        self._requested = True

    def requested(self) -> bool:
        """Whether to stop at the next chance: on several ranks, whether the first is to."""
        return self._ranks.from_first(self._requested)


def train(
    setup: Setup,
    folder: RunFolder,
    *,
    observer: Observer | None = None,
    resume: bool = False,
) -> Outcome:
    """Run a job to the end of its plan, or to the first Ctrl-C.

    Args:
        setup: from `dptorch.training.job.prepare`.
        folder: where the run writes; see `dptorch.training.run_folder`.
        observer: is told of each step and epoch.
        resume: continue from the folder's checkpoint.

    Guarantees:
        - At most `setup.engine.plan.steps` steps are taken, over all resumptions together.
        - After an interruption the folder holds the model of the last whole step, a statement of
          the privacy spent on exactly those steps, and a checkpoint to go on from.
        - Columns of `metrics.csv` computed from private data begin with `not_private_`.
        Held by `test_a_complete_run_cannot_be_resumed`,
        `test_an_interrupted_run_is_usable_and_resumes_to_the_same_end` and
        `test_what_comes_from_private_data_says_so`.

    Raises:
        DataError: there is nothing to resume, or the data has changed since.
    """
    engine, plan = setup.engine, setup.engine.plan
    first = engine.ranks.is_first  # which reports, and writes; the others only train
    observer = observer if first and observer is not None else Silent()
    rows: list[Row] = []
    seconds_before = 0.0
    if resume:
        path = folder.require_checkpoint()
        _refuse_changed_data(folder, setup)
        before = engine.load_checkpoint(path, **setup.kept)
        rows, seconds_before = before["rows"], before["seconds"]
    elif first:
        rows.append(_row(setup, epoch=0, seconds=0.0, epoch_stats={}))
        if setup.canaries is not None:
            setup.canaries.save(folder.path / CANARY_FILE)
    began = time.perf_counter()

    def seconds() -> float:
        return seconds_before + time.perf_counter() - began

    if first:
        folder.write("plan.json", plan.to_json())
        folder.write_json("run.json", _about(setup, "running"))
        if setup.data.table is not None:
            folder.write(SCHEMA_FILE, setup.data.table.schema.to_json())
    observer.started(setup, engine.steps_done)
    table = setup.data.table
    collate: Any = {} if setup.task.collate is None else {"collate_fn": setup.task.collate}

    def make_loader(rows: int) -> PrivateLoader:
        return engine.loader(
            setup.data.train,
            max_physical_batch_size=rows,
            num_workers=setup.job.num_workers,
            user_ids=None if table is None or table.units is None else list(table.units),
            **collate,
        )

    batches = PhysicalBatches(engine, make_loader, setup.job.max_physical_batch_size)
    steps_per_epoch = max(1, round(1 / plan.sample_rate))
    with StopOnSignal(engine.ranks) as stop:
        while engine.steps_done < plan.steps and not stop.requested():
            stats = _EpochStats()
            setup.model.train()
            for batch in batches:
                if stop.requested():
                    break
                steps_before = engine.steps_done
                try:
                    loss, examples = setup.task.loss(setup.model, batch, setup.device)
                    loss.backward()
                    setup.task.before_step(setup.optimizer, steps_before)
                    setup.optimizer.step()
                    fits = True
                except (RuntimeError, MemoryError) as error:
                    if not batches.can_halve(error, steps_before):
                        raise
                    fits = False
                if not fits:  # not in the handler: its traceback holds the tensors of this part
                    stats.drop_step()
                    batches.halve()
                    continue
                setup.optimizer.zero_grad()
                stats.add_batch(float(loss.detach()), examples)
                if engine.steps_done > steps_before:
                    observer.stepped(engine.steps_done, stats.end_step(engine.diagnostics))
            if setup.job.diagnostics:
                stats = _EpochStats.over(engine.ranks.gather(stats))
            stopping = stop.requested()
            if first and (stats.steps or not stopping):
                epoch = engine.steps_done / steps_per_epoch
                measured = stats.row() if setup.job.diagnostics else {}
                rows.append(_row(setup, epoch, seconds(), measured))
                observer.tested(rows[-1])
                folder.write_metrics(rows)
            done = {"rows": rows, "seconds": seconds()}
            engine.save_checkpoint(folder.checkpoint, extra=done, **setup.kept)

    interrupted = engine.steps_done < plan.steps
    if first:
        _finish(setup, folder, rows, "interrupted" if interrupted else "complete")
        if not interrupted:
            folder.checkpoint.unlink(missing_ok=True)
    return Outcome(folder, rows[-1] if first else {}, interrupted)


class _EpochStats:
    """Means over an epoch of what private data gave: NOT PRIVATE."""

    def __init__(self) -> None:
        self.steps = 0
        self._loss = self._examples = 0.0
        self._step_loss = self._step_examples = 0.0
        self._norm = self._clipped = self._batch = 0.0

    @classmethod
    def over(cls, ranks: Sequence[_EpochStats]) -> _EpochStats:
        """Return those of all ranks, which took the same steps on different examples."""
        found = cls()
        for name in vars(found):
            setattr(found, name, sum(getattr(each, name) for each in ranks))
        found.steps = ranks[0].steps
        return found

    def add_batch(self, mean_loss: float, examples: int) -> None:
        self._step_loss += mean_loss * examples
        self._step_examples += examples

    def drop_step(self) -> None:
        """Forget the batches since the last step: they are run again."""
        self._step_loss = self._step_examples = 0.0

    def end_step(self, diagnostics: Any) -> float:
        mean = self._step_loss / max(1.0, self._step_examples)
        self._loss += self._step_loss
        self._examples += self._step_examples
        self.drop_step()
        self.steps += 1
        if diagnostics is not None:
            self._norm += diagnostics.mean_norm * diagnostics.examples
            self._clipped += diagnostics.clipped_fraction * diagnostics.examples
            self._batch += diagnostics.examples
        return mean

    def row(self) -> Row:
        if not self._batch:
            return {}
        return {
            f"{NOT_PRIVATE}train_loss": round(self._loss / max(1.0, self._examples), 6),
            f"{NOT_PRIVATE}mean_gradient_norm": round(self._norm / self._batch, 6),
            f"{NOT_PRIVATE}clipped_fraction": round(self._clipped / self._batch, 6),
            f"{NOT_PRIVATE}mean_batch_size": round(self._batch / max(1, self.steps), 3),
        }


def _row(setup: Setup, epoch: float, seconds: float, epoch_stats: Row) -> Row:
    engine = setup.engine
    with setup.with_result():
        tested = setup.task.evaluate(setup.model, setup.data.test, setup.device)
    epsilon = engine.get_privacy_spent().epsilon if engine.steps_done else 0.0
    return {
        "epoch": round(epoch, 4),
        "step": engine.steps_done,
        "epsilon": epsilon,
        "delta": engine.plan.target_delta,
        **tested,
        "seconds": round(seconds, 3),
        **epoch_stats,
    }


def _about(setup: Setup, status: str) -> Row:
    """What `run.json` says."""
    n_train, n_test = _real_examples(setup)
    return {
        "status": status,
        "job": setup.job.to_dict(),
        "ledger": setup.engine.ledger_run,
        "data": {
            "source": setup.data.source,
            "classes": list(setup.data.classes),
            "input_shape": list(setup.data.input_shape),
            "train_examples": n_train,
            "test_examples": n_test,
            "preparation": dict(setup.data.preparation),
            **({"skipped_rows": setup.data.table.skipped} if setup.data.table else {}),
        },
        "model": {
            "class": type(setup.model).__name__,
            **({"began_from": dict(setup.began_from)} if setup.began_from else {}),
            "parameters": sum(p.numel() for p in setup.model.parameters()),
            "trainable_parameters": sum(
                p.numel() for p in setup.model.parameters() if p.requires_grad
            ),
        },
    }


def _real_examples(setup: Setup) -> tuple[int, int]:
    """Number of training and test examples. Canaries do not count: how many are in is a secret of the
    audit."""
    n_train, n_test = setup.data.sizes
    planted = 0 if setup.canaries is None else int(setup.canaries.member.sum())
    return n_train - planted, n_test


def _refuse_changed_data(folder: RunFolder, setup: Setup) -> None:
    recorded = folder.read_json("run.json")["data"]
    data = setup.data
    if data.table is not None and folder.read_json(SCHEMA_FILE) != data.table.schema.to_dict():
        raise DataError(
            f"The schema has changed since {folder.path} was begun. A run's model is for one schema. "
            "Begin a new run."
        )
    now = (*_real_examples(setup), list(data.classes), list(data.input_shape))
    then = tuple(
        recorded[key] for key in ("train_examples", "test_examples", "classes", "input_shape")
    )
    if now != then:
        raise DataError(
            f"The data has changed since {folder.path} was begun: then {then[0]} training and "
            f"{then[1]} test examples, now {now[0]} and {now[1]}, or other classes or shapes. A "
            f"run's guarantee is for one data set. Begin a new run."
        )


def _finish(setup: Setup, folder: RunFolder, rows: list[Row], status: str) -> None:
    """Write everything a reader needs; the same for a complete and an interrupted run."""
    setup.engine.release_budget()
    chosen = setup.selection
    epsilon = rows[-1]["epsilon"] if chosen is None else chosen.epsilon
    summary = {
        "epsilon": f"{epsilon:.6f}",
        "delta": f"{rows[-1]['delta']:g}",
        "steps": str(rows[-1]["step"]),
    }
    about = _about(setup, status)
    with setup.with_result():
        setup.task.write_model(folder, setup.model, {"format": "pt", **summary})
        if status == "complete":  # it may take its time, for which Ctrl-C does not wait
            about |= setup.task.finish(setup.model, setup.data.test, setup.device)
    table = setup.data.table
    schema_read = () if table is None else table.schema.read_from_data
    statement = replace(
        setup.engine.statement(),
        model_digest=digest_of(folder, about),
        read_from_data=(*setup.data.read_from_data, *schema_read),
        notes=setup.notes,
    )
    if chosen is not None:
        statement = replace(
            statement,
            epsilon=chosen.epsilon,
            accountant=chosen.accountant,
            notes=(*setup.notes, chosen.note),
        )
    n_test = setup.data.sizes[1]
    test_note = (
        f"Test results were measured exactly, on {n_test} examples that no step drew. The "
        f"guarantee is for the training examples; it does not cover those {n_test}.\n"
    )
    folder.write("statement.txt", f"{statement}\n{test_note}")
    folder.write_json("statement.json", for_machines(statement.to_dict()))
    folder.write_metrics(rows)
    result = {k: v for k, v in rows[-1].items() if not k.startswith(NOT_PRIVATE)}
    about["result"] = result | {"epsilon": epsilon}
    about["statement"] = statement.to_dict()
    folder.write_json("run.json", about)
    if not missing_packages():
        write_report(folder)


def spent_and_tested(outcome: Outcome) -> str:
    """One line: what was reached at what cost."""
    last = outcome.last
    return f"{headline(last)} at epsilon {last['epsilon']:.3f}, delta {last['delta']:g}"
