"""What a run's entries add up to, repeated steps included, in the words accountants understand."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from dptorch.accounting.correlated import BufferedGaussian, CyclicGaussian, SeparatedGaussian
from dptorch.accounting.events import (
    EpochwiseGaussian,
    Event,
    FixedSizeGaussian,
    PureRelease,
    RandomAllocationGaussian,
    SampledDiscreteGaussian,
    SampledGaussian,
    TruncatedPoissonGaussian,
)
from dptorch.errors import LedgerError, PrivacyError
from dptorch.ledger.entry import Entry

__all__ = ["Attempts", "once"]

# Steps draw their batches independently of each other.
_BY_STEP = (SampledGaussian, TruncatedPoissonGaussian, FixedSizeGaussian)
# The steps of an epoch share one draw.
_BY_EPOCH = (RandomAllocationGaussian, EpochwiseGaussian)


class Attempts:
    """How often each step of a run was released.

    A run that is killed and resumed draws the same batch for a step as before. Two releases on one
    batch are not two independently sampled steps: an observer may average their noise. They are one
    step whose noise is smaller by sqrt(attempts). The adaptive composition of m Gaussian mechanisms
    of multiplier σ on one sample is dominated by one of multiplier σ/√m (Dong, Roth, Su 2022,
    arXiv:1905.02383, Corollary 3.3); sampling amplifies the dominating pair (Zhu, Dong, Wang 2022,
    arXiv:2106.08567, Theorem 11); that other steps come in between changes nothing (concurrent
    composition: Vadhan and Zhang 2023, arXiv:2207.08335). Where the steps of an epoch share one
    draw, all of an epoch is counted as often as the most often released of its steps.

    Under banded noise a record's contribution to one step is in the noise of the next b - 1 too. A run
    that goes on from a checkpoint has the noise of the steps before it, and new noise from there on:
    rows of Cx + z are released again, with other z. A record's columns in them grow by the root of how
    often, so that a turn counts as often as the most often released step of it and of the next.

    Example:
        >>> attempts = Attempts()
        >>> attempts.add(SampledGaussian(2.0, 0.1, 1), first=0, steps=10)
        >>> attempts.add(SampledGaussian(2.0, 0.1, 1), first=7, steps=5)  # killed, resumed at 7
        >>> attempts.total, attempts.distinct
        (15, 12)
        >>> [(round(e.noise_multiplier, 3), e.steps) for e in attempts.events()]
        [(2.0, 9), (1.414, 3)]
    """

    def __init__(self) -> None:
        self._times: dict[Event, Counter[int]] = {}

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> Attempts:
        """What the entries of one run add up to."""
        attempts = cls()
        attempts.add_entries(entries)
        return attempts

    def add_entries(self, entries: Iterable[Entry]) -> None:
        """Count what further entries of the run say.

        Raises:
            LedgerError: they give back steps that were never added.
        """
        events: dict[str, Event] = {}  # by the text of an entry's body: most are alike
        for entry in entries:
            if entry.first is not None and entry.steps is not None:
                if entry.body not in events:
                    events[entry.body] = Event.from_dict(entry.detail["event"])
                count = self.add if entry.kind == "steps" else self.take_back
                count(events[entry.body], entry.first, entry.steps)

    def add(self, event: Event, first: int, steps: int) -> None:
        """Count a release of each of the steps first, first + 1, ..."""
        counter = self._times.setdefault(once(event), Counter())
        counter.update(range(first, first + steps))

    def take_back(self, event: Event, first: int, steps: int) -> None:
        """Undo `add` for steps that were not released after all.

        Raises:
            LedgerError: they were never added.
        """
        counter = self._times.get(once(event), Counter())
        counter.subtract(range(first, first + steps))
        if min(counter.values(), default=0) < 0:
            raise LedgerError(
                f"the ledger gives back steps from {first} on that it never counted. It has been "
                "edited. Run `dptorch ledger verify`."
            )

    def copy(self) -> Attempts:
        """A copy that can be added to."""
        other = Attempts()
        other._times = {event: counter.copy() for event, counter in self._times.items()}
        return other

    @property
    def total(self) -> int:
        """All releases."""
        return sum(counter.total() for counter in self._times.values())

    @property
    def distinct(self) -> int:
        """Steps released at least once."""
        return len({s for counter in self._times.values() for s, n in counter.items() if n})

    @property
    def released(self) -> set[Event]:
        """What single steps were released as."""
        return {event for event, counter in self._times.items() if any(counter.values())}

    def times(self, step: int) -> int:
        """How often one step was released."""
        return sum(counter[step] for counter in self._times.values())

    def events(self, *, each_as: Event | None = None) -> list[Event]:
        """The history for an accountant.

        Args:
            each_as: what to take every step for, instead of what it was.

        Raises:
            PrivacyError: steps of a mechanism for which no rule of repetition is known.
        """
        counts = self._times
        if each_as is not None:
            counts = {each_as: sum(counts.values(), start=Counter())}
        return [e for event, counter in counts.items() for e in _history(event, counter)]


def _history(event: Event, times: Counter[int]) -> list[Event]:
    if isinstance(event, SampledDiscreteGaussian):
        # Its sums of noise are not its noise at another scale: repeated steps go without sampling.
        once = sum(n == 1 for n in times.values())
        again = sum(n for n in times.values() if n > 1)
        split = [replace(event, steps=once), replace(event, sample_rate=1.0, steps=again)]
        return [part for part in split if part.steps]
    if isinstance(event, PureRelease):
        total = sum(times.values())  # each release is ε-DP, whatever came before
        return [replace(event, steps=total)] if total else []
    if isinstance(event, CyclicGaussian):
        return _turns(event, times)
    if isinstance(event, SeparatedGaussian | BufferedGaussian):
        # Each branch of a run is Cx + z with the z of its own steps: no row was released more often.
        most, last = (
            max(times.values(), default=0),
            max((s for s, n in times.items() if n), default=-1),
        )
        noise = event.noise_multiplier / math.sqrt(max(1, most))
        return [replace(event, noise_multiplier=noise, steps=last + 1)] if most else []
    if isinstance(event, _BY_STEP):
        groups = Counter(n for n in times.values() if n)
    elif isinstance(event, _BY_EPOCH):
        epochs: dict[int, int] = {}
        for step, n in times.items():
            epoch = step // event.steps_per_epoch
            epochs[epoch] = max(epochs.get(epoch, 0), n)
        groups = Counter()
        for n in epochs.values():
            groups[n] += event.steps_per_epoch if n else 0
    else:
        raise PrivacyError(
            f"the ledger counts step by step. The {event.kind} mechanism is one release of many steps, "
            "and no rule is known for a run of it that is killed and resumed."
        )
    return [
        replace(event, noise_multiplier=event.noise_multiplier / math.sqrt(n), steps=steps)
        for n, steps in sorted(groups.items())
        if n
    ]


def _turns(event: CyclicGaussian, times: Counter[int]) -> list[Event]:
    """A record that takes part in a turn is in rows of that turn and the next: both count for it as
    often as the most often released of their rows."""
    most: Counter[int] = Counter()
    for step, n in times.items():
        most[step // event.bands] = max(most[step // event.bands], n)
    groups: Counter[int] = Counter()
    for turn, n in most.items():
        if n:
            groups[max(n, most[turn + 1])] += event.bands
    return [
        replace(event, noise_multiplier=event.noise_multiplier / math.sqrt(n), steps=steps)
        for n, steps in sorted(groups.items())
    ]


def once(event: Event) -> Event:
    """The event of one step."""
    return replace(event, steps=1)
