"""What a server answers with: the models of a run, and one budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dptorch.errors import ConfigurationError, DataError
from dptorch.ledger import Ledger
from dptorch.prediction.ensemble import ENSEMBLE, load_ensemble
from dptorch.prediction.mechanisms import NO_LABEL
from dptorch.prediction.predictor import Answers, PrivatePredictor
from dptorch.training.predictor import Predictor, load
from dptorch.training.run_folder import RunFolder

__all__ = ["Service", "columns_of", "open_service", "row_depth"]


@dataclass(frozen=True, eq=False)
class Service:
    """A run that answers.

    Attributes:
        reader: prepares rows, and knows classes and schema.
        predictor: answers, charged to the budget if the run needs one.
        name: of the run.
    """

    reader: Predictor
    predictor: PrivatePredictor
    name: str

    def answer(
        self, rows: Sequence[Any], *, together: bool = False
    ) -> tuple[list[str | None], Answers]:
        """The class of each row, None where the models do not agree.

        Raises:
            DataError, ConfigurationError: rows that do not fit; nothing was spent.
            BudgetExhausted, LedgerError: see `PrivatePredictor.predict`.
        """
        inputs = self.inputs(rows)
        found = (
            self.predictor.predict_together(inputs) if together else self.predictor.predict(inputs)
        )
        classes = self.reader.classes
        return [None if i == NO_LABEL else classes[i] for i in found.labels.tolist()], found

    def inputs(self, rows: Sequence[Any]) -> Tensor:
        """Prepare rows, [N, *input_shape].

        Raises:
            DataError: they do not fit.
        """
        given: Any = list(rows)
        if self.reader.schema is None:
            try:
                given = np.asarray(given, np.float64)
            except ValueError:
                raise DataError("the rows have different shapes.") from None
        try:
            with np.errstate(over="ignore"):
                inputs = self.reader.inputs(given)
        except (RuntimeError, ValueError, IndexError) as error:
            raise DataError(f"the rows cannot be read: {error}") from None
        if tuple(inputs.shape[1:]) != self.reader.input_shape or not len(inputs):
            raise DataError(
                f"a row has the shape {list(inputs.shape[1:])}. Expected: "
                f"{list(self.reader.input_shape)}."
            )
        return inputs

    def budget(self) -> dict[str, Any]:
        """What is spent and what is left: all of it public."""
        predictor = self.predictor
        spent = predictor.spent()
        found: dict[str, Any] = {
            "run": self.name,
            "needed": predictor.plan is not None,
            "epsilon_spent": spent.epsilon,
            "delta": spent.delta,
        }
        if predictor.plan is not None:
            found |= {
                "epsilon": predictor.plan.target_epsilon,
                "queries": predictor.plan.queries,
                "remaining": predictor.remaining,
                "share_spent": min(1.0, predictor.account.spent),
                "unit": predictor.plan.unit,
                "mechanism": predictor.plan.mechanism,
                "models": predictor.plan.models,
            }
        return found


def open_service(
    run: str | Path,
    *,
    ledger: Ledger | None = None,
    budget: tuple[float, float] | None = None,
    **terms: Any,
) -> Service:
    """Load a run and begin, or go on with, its budget.

    Args:
        run: a folder of `dptorch train`, with `--shards` or without.
        ledger: where answers are charged; a run of shards needs one.
        budget: (ε, δ) of all answers; of a run of shards.
        terms: "mechanism", "queries", "clip", "threshold" and "name" of `PrivatePredictor`.

    Raises:
        ConfigurationError: a budget that is missing, or does not fit.
        DataError: the run cannot be loaded.
        BudgetExhausted, LedgerError: the ledger does not admit the budget.
    """
    folder = RunFolder(Path(run))
    about = folder.read_json("run.json")
    if about.get("kind") != ENSEMBLE:
        reader = load(run)
        _refuse_unservable(reader)
        predictor = PrivatePredictor(reader.network, trained_with=reader.statement)
        return Service(reader, predictor, folder.path.name)
    ensemble = load_ensemble(run)
    _refuse_unservable(ensemble.reader)
    if budget is None or ledger is None:
        raise ConfigurationError(
            f"budget=None: the models of {folder.path} were trained without privacy. Give the budget "
            "of all answers, such as --budget 8,1e-5, and how many they may be: --queries 1000."
        )
    predictor = PrivatePredictor(
        list(ensemble.models),
        budget=budget,
        ledger=ledger.dataset(ensemble.dataset),
        unit=ensemble.unit,
        **{"name": ensemble.budget} | {k: v for k, v in terms.items() if v is not None},
    )
    return Service(ensemble.reader, predictor, folder.path.name)


def _refuse_unservable(reader: Predictor) -> None:
    kind = reader.preparation.get("kind")
    if kind == "images":
        raise ConfigurationError(
            "the run was trained on a folder of images, whose rows are paths of files: a server opens "
            "no path that a client names. Train on an .npz of images instead."
        )
    if reader.is_number:
        raise ConfigurationError("the run predicts a number. `dptorch serve` answers with classes.")


def row_depth(reader: Predictor) -> int:
    """How deeply the numbers of one row are nested in a request; 0 for the columns of a table."""
    if reader.schema is not None:
        return 0
    if reader.preparation.get("kind") == "recipe":
        return 2  # a grey image, before the recipe's transform
    return len(reader.input_shape)


def columns_of(reader: Predictor) -> Mapping[str, Any]:
    """The columns that a row of a table has."""
    assert reader.schema is not None
    return {name: column for name, column in reader.schema.columns.items() if column.width}
