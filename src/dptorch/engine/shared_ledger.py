"""The ledger of a run on several ranks: the first keeps it, the others know what is in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dptorch.accounting import Adjacency, Event
from dptorch.distributed import Ranks

if TYPE_CHECKING:
    from dptorch.ledger import RunLedger
    from dptorch.ledger.counting import Attempts

__all__ = ["SharedLedger"]


@dataclass
class _Known:
    """What a rank that does not keep the ledger knows of the run; as the attributes of `RunLedger`."""

    name: dict[str, str]
    run: str
    begun: bool
    head: tuple[int, str] | None
    attempts: Attempts
    adjacencies: tuple[Adjacency, ...]
    repeated_steps: int
    at_end: float | None

    @classmethod
    def of(cls, kept: RunLedger) -> _Known:
        return cls(
            kept.name,
            kept.run,
            kept.begun,
            kept.head,
            kept.attempts.copy(),
            kept.adjacencies,
            kept.repeated_steps,
            kept.epsilon_at_end() if kept.repeated_steps else None,
        )


class SharedLedger:
    """A `RunLedger` that rank 0 keeps for all ranks; its methods are called on all of them.

    Args:
        ranks: the processes that take the steps of the run together.
        make: makes the run's ledger; called on rank 0.

    Guarantees:
        When `count` returns, on whichever rank, the step is on disk, and where it could not be written
        down it raises on all (`test_no_rank_steps_before_the_ledger_has_the_step`).

    Raises:
        LedgerError, PrivacyError: as `make` does on rank 0.
    """

    def __init__(self, ranks: Ranks, make: Callable[[], RunLedger]) -> None:
        self._ranks = ranks
        self._kept: RunLedger | None = None
        with ranks.together():
            if ranks.is_first:
                self._kept = make()
        self._known: _Known | None = None
        self._tell()

    def open(self) -> None:
        """See `RunLedger.open`."""
        with self._ranks.together():
            if self._kept is not None:
                self._kept.open()
        self._tell()

    def count(self, step: int, event: Event) -> None:
        """See `RunLedger.count`."""
        with self._ranks.together(step=step):
            if self._kept is not None:
                self._kept.count(step, event)
        self._tell(counted=(step, event))

    def close(self) -> None:
        """See `RunLedger.close`. The other ranks do not wait for it."""
        if self._kept is not None:
            self._kept.close()

    def epsilon_at_end(self) -> float:
        """See `RunLedger.epsilon_at_end`; known where steps were repeated."""
        if self._kept is not None:
            return self._kept.epsilon_at_end()
        assert self._known is not None
        assert self._known.at_end is not None
        return self._known.at_end

    def _tell(self, counted: tuple[int, Event] | None = None) -> None:
        """Tell the other ranks what the ledger has now: all of it, where it is more than one step."""
        if self._ranks.size == 1:
            return
        message: tuple[tuple[int, str] | None, _Known | None] = (None, None)
        if (kept := self._kept) is not None:
            expected = -1
            if counted is not None and self._known is not None:
                expected = self._known.attempts.total + 1
            message = kept.head, None if kept.attempts.total == expected else _Known.of(kept)
        head, news = self._ranks.from_first(message)
        if news is not None:
            self._known = news
        elif counted is not None and self._known is not None:
            step, event = counted
            self._known.attempts.add(event, step, 1)
            self._known.head = head

    # -- what is known of the run ------------------------------------------------------------------

    @property
    def _view(self) -> RunLedger | _Known:
        view = self._kept or self._known
        assert view is not None
        return view

    @property
    def name(self) -> dict[str, str]:
        """See `RunLedger.name`."""
        return self._view.name

    @property
    def run(self) -> str:
        """See `RunLedger`."""
        return self._view.run

    @property
    def begun(self) -> bool:
        """See `RunLedger`."""
        return self._view.begun

    @property
    def head(self) -> tuple[int, str] | None:
        """See `RunLedger`."""
        return self._view.head

    @property
    def attempts(self) -> Attempts:
        """See `RunLedger`."""
        return self._view.attempts

    @property
    def adjacencies(self) -> tuple[Adjacency, ...]:
        """See `RunLedger.adjacencies`."""
        return self._view.adjacencies

    @property
    def repeated_steps(self) -> int:
        """See `RunLedger.repeated_steps`."""
        return self._view.repeated_steps
