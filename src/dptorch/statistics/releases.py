"""One release of statistics: planned, charged, noised, in that order, like a step of training.

The plan is that of one step in which everybody takes part: the same noise, keys, accounting and ledger,
so that statistics and the runs that use them add up.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dptorch.accounting import Adjacency
from dptorch.clipping.sums import ClippedSum, RoundedSum
from dptorch.distributed import Ranks
from dptorch.engine.run_state import RunState
from dptorch.errors import ConfigurationError, DataError, one_of
from dptorch.ledger.datasets import DatasetLedger, of_one_data_set
from dptorch.noise import get_mechanism
from dptorch.noise.fingerprint import fingerprint
from dptorch.plan import PrivacyPlan, make_plan
from dptorch.plan.settings import PlanSettings
from dptorch.randomness import RootKey
from dptorch.statistics.contributions import integer_sum, share_of_block, unit_means
from dptorch.statistics.quantities import Floats, Quantity, layout
from dptorch.statistics.statement import StatisticsStatement
from dptorch.statistics.summaries import Summary, summarise
from dptorch.tables.columns import is_empty, text_of

__all__ = ["MECHANISMS", "Statistics", "describe", "release"]

#: Noise that a release may have, and the accountant of each.
MECHANISMS = {"discrete_gaussian": "rdp", "gaussian": "pld"}
_UNITS = ("example", "user")


@dataclass(frozen=True)
class Statistics:
    """What was released; ``str()`` is a table with the statement below it.

    Attributes:
        summaries: by name of the column.
        statement: what they guarantee.
    """

    summaries: Mapping[str, Summary]
    statement: StatisticsStatement

    def __getitem__(self, name: str) -> Summary:
        return self.summaries[name]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "statistics_version": 1,
            "columns": {name: each.to_dict() for name, each in self.summaries.items()},
            "statement": self.statement.to_dict(),
        }

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    def __str__(self) -> str:
        width = max(len(name) for name in self.summaries)
        lines = [f"{name:<{width}}  {each}" for name, each in self.summaries.items()]
        return "\n".join(lines) + f"\n\n{self.statement}"


def describe(
    quantities: Sequence[Quantity],
    values: Mapping[str, Any],
    *,
    owners: Sequence[Any] | None = None,
    **terms: Any,
) -> Statistics:
    """Release statistics of columns, all together under (ε, δ).

    Args:
        quantities: what is asked for, of a column each.
        values: column -> numbers [N]; NaN for what is missing, and the place in its `values` for a
            `Choice`.
        owners: the person of each row, [N]; ε then protects a person with all their rows, which count
            as the mean of them. None where a row is a unit.
        terms: of `release`: epsilon, delta, quantiles, mechanism, adjacency, ledger and seed.

    Raises:
        ConfigurationError, DataError, BudgetExhausted, LedgerError: as `release`.

    Example:
        >>> from dptorch.statistics import Numeric
        >>> ages = np.random.default_rng(0).normal(50, 10, 20_000)
        >>> found = describe([Numeric("age", (0, 120))], {"age": ages}, epsilon=0.5, seed=0)
        >>> round(found["age"].mean), round(found["age"].quantiles["0.5"])
        (50, 50)
    """
    columns = [_numbers_of(q.name, values) for q in quantities]
    lengths = {len(column) for column in columns} | ({len(owners)} if owners is not None else set())
    if len(lengths) != 1:
        raise ConfigurationError(f"columns of {sorted(lengths)} rows: all need the same.")
    texts = None if owners is None else _texts_of(owners)
    units = lengths.pop() if texts is None else len(set(texts))
    return release(
        quantities,
        unit_means(quantities, np.stack(columns, axis=1), texts),
        units=units,
        unit="example" if owners is None else "user",
        **terms,
    )


def _numbers_of(name: str, values: Mapping[str, Any]) -> Floats:
    try:
        found = np.asarray(values[name], np.float64)
    except (ValueError, TypeError):
        # Python's error would quote a cell.
        raise DataError(f"column {name!r} holds what is no number.") from None
    if found.ndim != 1 and found.shape[1:] != (1,):
        raise DataError(
            f"column {name!r} has the shape {found.shape}, and needs one number for each record: "
            "ε would protect one of several. Give a column for each, or one number a row and its "
            "record in owners=."
        )
    return found.reshape(-1)


def _texts_of(owners: Sequence[Any]) -> list[str]:
    """The person of each row as a text: 1, 1.0 and "1 " are one, as in tables."""
    for row, owner in enumerate(owners):
        if is_empty(owner):
            raise DataError(f"row {row} has no owner. Leave it out, or say whose it is.")
    return [text_of(owner) for owner in owners]


def release(
    quantities: Sequence[Quantity],
    parts: Iterable[Floats],
    *,
    units: int,
    epsilon: float,
    delta: float | None = None,
    quantiles: Sequence[float] = (0.05, 0.25, 0.5, 0.75, 0.95),
    mechanism: str = "discrete_gaussian",
    unit: str = "example",
    adjacency: Adjacency | str = Adjacency.ZERO_OUT,
    ledger: DatasetLedger | None = None,
    read_from_data: Sequence[str] = (),
    seed: int | None = None,
) -> Statistics:
    """Release statistics of what units contribute, all together under (ε, δ).

    Args:
        quantities: what is asked for, of a column each.
        parts: what units contribute, from `dptorch.statistics.contributions.unit_means`, or
            `dptorch.statistics.pictures.picture_means`. Read once, after the release is planned.
        units: how many there are; public, as it is in training.
        epsilon, delta: of the whole release. By default δ is the largest power of ten that is at most
            1 / (10 units).
        quantiles: of columns with a histogram, from which they are read.
        mechanism: "discrete_gaussian", whose sums are exact, or "gaussian", which needs less noise by
            about a tenth, and of which attacks on floating-point numbers are not covered.
        unit: what is protected: "example", or "user" where the parts are means over a user's rows.
        adjacency: zero-out, or replace-one, which costs twice the noise.
        ledger: of the data set; the release is written down there before its noise is drawn.
        read_from_data: what of the bounds and lists of values was read off the private data, in words;
            the statement says so.
        seed: for tests; a release with a seed is not private.

    Guarantees:
        - What is released is (ε, δ)-differentially private for one unit, and was charged before its
          noise was drawn. Held by `test_the_noise_is_that_of_the_plan`,
          `test_the_release_is_charged_before_its_noise_is_drawn` and
          `test_an_audit_of_releases_does_not_refute_them`.
        - Sums are exact: no order of rows, and no other row, changes what one contributes.
          Held by `test_one_unit_moves_the_sum_by_no_more_than_the_bound`.

    Raises:
        ConfigurationError: a value out of range, or no noise meets (ε, δ).
        DataError: the parts are not as many units as was said.
        BudgetExhausted, LedgerError: the ledger does not admit it. Nothing was released.
    """
    plan = _plan(units, epsilon, delta, mechanism, unit, Adjacency.of(adjacency))
    levels = _levels(quantiles)
    blocks = layout(quantities)
    key = RootKey.from_os() if seed is None else RootKey.from_seed(seed)
    # Each process that calls this makes a release of its own, with other noise, and is charged for it.
    run = RunState(plan, key, Ranks.alone())
    if ledger is not None:
        ledger = of_one_data_set(ledger)
        if (cap := ledger.cap) is not None and cap.adjacency is Adjacency.ADD_REMOVE:
            raise ConfigurationError(
                "the data set's cap protects how many records there are (adjacency='add-remove'), "
                "which statistics publish. Give it a cap under 'zero-out' or 'replace-one'."
            )
        account = ledger.ledger.dataset(ledger.dataset)
        account.size_is_public = True
        run.use_ledger(account)
        run.reserve_budget()
    try:
        sums, found = integer_sum(quantities, parts)
        if found != units:
            raise DataError(f"units={units}, and {found} contributed. Say how many there are.")
        noisy = _noised(torch.from_numpy(sums), run)
    finally:
        run.release_budget()
    each = share_of_block(len(blocks)) / RoundedSum.UNITS
    summaries = summarise(
        quantities, noisy / each, noise=plan.noise_multiplier / each, units=units, quantiles=levels
    )
    spent, kept = run.get_privacy_spent(), run.ledger_run
    statement = StatisticsStatement(
        plan=plan,
        epsilon=spent.epsilon,
        quantities=tuple(quantities),
        key_source=key.source,
        ledger=None if kept is None else {name: kept[name] for name in ("run", "dataset")},
        read_from_data=tuple(read_from_data),
    )
    return Statistics(summaries, statement)


def _plan(
    units: int,
    epsilon: float,
    delta: float | None,
    mechanism: str,
    unit: str,
    adjacency: Adjacency,
) -> PrivacyPlan:
    one_of("mechanism", mechanism, MECHANISMS)
    one_of("unit", unit, _UNITS)
    if adjacency is Adjacency.ADD_REMOVE:
        raise ConfigurationError(
            "adjacency='add-remove' protects how many records there are, which means are divided by. "
            "Use 'zero-out', at the same cost."
        )
    settings: PlanSettings = {
        "sample_rate": 1.0,
        "sample_size": units,
        "steps": 1,
        "target_epsilon": epsilon,
        "max_grad_norm": 1.0,
        "loss_reduction": "sum",
        "mechanism": mechanism,
        "accountant": MECHANISMS[mechanism],
        "adjacency": adjacency,
        "unit": unit,
    }
    if delta is not None:
        settings["target_delta"] = delta
    if unit == "user":
        settings["max_examples_per_user"] = 1  # the mean of their rows
    return make_plan(**settings)


def _levels(quantiles: Sequence[float]) -> tuple[float, ...]:
    levels = tuple(float(level) for level in quantiles)
    if not all(0 < level < 1 for level in levels) or list(levels) != sorted(set(levels)):
        raise ConfigurationError(
            f"quantiles={levels}: expected numbers between 0 and 1, in order, each once."
        )
    return levels


def _noised(sums: torch.Tensor, run: RunState) -> Floats:
    """The sum with noise, float64 [coordinates], in units of the bound on one unit's vector."""
    plan, key = run.plan, run.key
    exact = plan.mechanism == "discrete_gaussian"
    clipped: ClippedSum = (
        RoundedSum({"sum": sums}, max_norm=1.0)
        if exact
        else ClippedSum({"sum": sums.double() / RoundedSum.UNITS}, max_norm=1.0)
    )
    context = fingerprint(clipped.values, key, 0) if key.source.is_private else 0
    run.count_step(sampled=True)  # from here on it is spent, whatever happens
    noisy = get_mechanism(plan.mechanism)(plan.noise_multiplier).privatize(
        clipped, key, 0, context=context
    )
    # Exact noise was added to the whole numbers in place; the gradient's float32 would round them.
    values = sums.double() / RoundedSum.UNITS if exact else noisy.values["sum"].double()
    found: Floats = values.numpy()
    return found
