"""All faults of a table in one message."""

from __future__ import annotations

from typing import Final

from dptorch.errors import DataError

__all__ = ["SHOWN", "Faults"]

SHOWN: Final = 20  # faults that a message lists; the others are counted


class Faults:
    """What is wrong with the rows of a table.

    Args:
        source: the file, for messages.
        place: what a row's number counts: "line" of a text file, "row" of anything else.

    Example:
        >>> faults = Faults("ages.csv", "line")
        >>> faults.add(3, "age", "'x' is not a finite number")
        >>> faults.rows, faults.message()[:58]
        ({3}, "ages.csv, line 3, column 'age': 'x' is not a finite number")
    """

    def __init__(self, source: str, place: str = "row") -> None:
        self.source = source
        self.place = place
        self.rows: set[int] = set()
        self.count = 0
        self._shown: list[tuple[int, str]] = []

    def add(self, row: int, column: str | None, what: str) -> None:
        """Note a fault. `what` says what was found, without a full stop."""
        self.rows.add(row)
        self.count += 1
        where = f"{self.place} {row}" + ("" if column is None else f", column {column!r}")
        self._shown.append((row, f"{where}: {what}"))
        if len(self._shown) > 50 * SHOWN:
            self._first()

    def _first(self) -> list[str]:
        """The faults of the first rows; columns are checked one after another."""
        self._shown = sorted(self._shown, key=lambda fault: fault[0])[:SHOWN]
        return [text for _, text in self._shown]

    def message(self) -> str:
        """The text for all of them."""
        way_out = "Mend them, or leave such rows out with --on-bad-row skip."
        shown = self._first()
        if self.count == 1:
            return f"{self.source}, {shown[0]}. {way_out.replace('them', 'it')}"
        more = "" if self.count <= SHOWN else f"; the first {SHOWN}"
        head = f"{self.source}: {self.count:,} faults in {len(self.rows):,} rows{more}:"
        return "\n".join([head, *(f"  {text}" for text in shown), way_out])

    def refuse(self) -> None:
        """Raise a DataError that lists them, if there are any."""
        if self.count:
            raise DataError(self.message())
