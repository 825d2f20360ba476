"""What a server answers with: the model or the models of a run, and one budget."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dptorch.errors import ConfigurationError, DataError
from dptorch.ledger import Ledger
from dptorch.prediction.ensemble import ENSEMBLE, load_ensemble
from dptorch.prediction.mechanisms import NO_LABEL
from dptorch.prediction.predictor import PrivatePredictor, refuse_bad_rows
from dptorch.risk import rounded_up
from dptorch.text.predictor import TextPredictor, load
from dptorch.training.predictor import Predictor
from dptorch.training.run_folder import RunFolder

__all__ = ["Reply", "Service", "open_service", "takes_files"]


@dataclass(frozen=True)
class Reply:
    """What a service says about rows.

    Attributes:
        answers: the class of each row, None where models did not agree; or a number in its units.
        charged: how many rows were charged.
        source: as in `dptorch.prediction.predictor.Answers`.
    """

    answers: list[Any]
    charged: int
    source: str


@dataclass(frozen=True, eq=False)
class Service:
    """A run that answers.

    Attributes:
        reader: prepares rows, and knows classes and schema.
        predictor: answers, charged to the budget if the run needs one.
        name: of the run.
    """

    reader: Predictor | TextPredictor
    predictor: PrivatePredictor
    name: str
    _tokenizing: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, rows: Sequence[Any], *, together: bool = False) -> Reply:
        """The class, or the number, of each row.

        Guarantees:
            A run that was trained privately answers what `dptorch predict` does, to the last bit.
            Held by `test_a_server_answers_what_the_run_predicts`.

        Raises:
            DataError, ConfigurationError: rows that do not fit; nothing was spent.
            BudgetExhausted, LedgerError: see `PrivatePredictor.predict`.
        """
        reader = self.reader
        if isinstance(reader, TextPredictor):
            with self._tokenizing:  # a tokenizer is changed by what it reads
                tokens = reader.inputs(rows)
            return Reply(reader.decide(reader.outputs(tokens)).tolist(), 0, "covered")
        inputs = self.inputs(rows)
        if self.predictor.covered is not None:
            refuse_bad_rows(inputs)
            return Reply(reader.decide(reader.outputs(inputs)).tolist(), 0, "covered")
        found = (
            self.predictor.predict_together(inputs) if together else self.predictor.predict(inputs)
        )
        named = [None if i == NO_LABEL else reader.classes[i] for i in found.labels.tolist()]
        return Reply(named, found.charged, found.source)

    def inputs(self, rows: Sequence[Any]) -> Tensor:
        """Prepare rows that are no texts, [N, *input_shape].

        Raises:
            DataError: they do not fit.
        """
        reader, given = self.reader, list[Any](rows)
        assert isinstance(reader, Predictor)
        prepared: Any = given
        if reader.schema is None and not takes_files(reader):
            try:
                prepared = np.asarray(given, np.float64)
            except ValueError:
                raise DataError("the rows have different shapes.") from None
        elif reader.schema is None and not all(isinstance(each, bytes) for each in given):
            raise DataError("a row is not the content of a picture's file.")  # opens no path
        try:
            with np.errstate(over="ignore"):
                inputs = reader.inputs(prepared)
        except (RuntimeError, ValueError, IndexError) as error:
            raise DataError(f"the rows cannot be read: {error}") from None
        if tuple(inputs.shape[1:]) != reader.input_shape or not len(inputs):
            raise DataError(
                f"a row has the shape {list(inputs.shape[1:])}. Expected: {list(reader.input_shape)}."
            )
        return inputs

    def budget(self) -> dict[str, Any]:
        """What is spent and what is left: all of it public."""
        predictor = self.predictor
        spent = predictor.spent()
        found: dict[str, Any] = {
            "run": self.name,
            "needed": predictor.plan is not None,
            "epsilon_spent": float(rounded_up(spent.epsilon)),
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
        try:
            predictor = PrivatePredictor(reader.network, trained_with=reader.statement)
        except ConfigurationError as error:
            why = str(error).partition(". ")[0]
            raise ConfigurationError(
                f"{folder.path} cannot be served: {why}. Train it privately without a seed, or train "
                "models on disjoint parts, whose answers get noise: dptorch train --shards 20."
            ) from None
        return Service(reader, predictor, folder.path.name)
    ensemble = load_ensemble(run)
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


def takes_files(reader: Predictor) -> bool:
    """Whether a row is the content of a picture's file."""
    return bool(reader.preparation.get("kind") == "images")
