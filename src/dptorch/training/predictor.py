"""A trained model with its preprocessing: rows in, classes or numbers out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dptorch.errors import ConfigurationError, DataError
from dptorch.tables import Encoded, Preprocessing, Schema, chunk_of, encode
from dptorch.tables.faults import Faults
from dptorch.training.digest import verify
from dptorch.training.preparation import prepare_inputs
from dptorch.training.run_folder import PRETRAINED, SCHEMA_FILE, RunFolder, load_model

__all__ = ["Predictor", "load"]

_BATCH: Final = 512  # always: the last bit of a matrix product may depend on the number of rows


@dataclass(frozen=True, eq=False)
class Predictor:
    """A trained model that takes rows as they are.

    Attributes:
        network: the trained network, in evaluation mode: prepared inputs -> outputs.
        classes: names of the classes; empty where a number is predicted.
        input_shape: shape of one prepared input.
        preparation: what is done to an input.
        schema: of a table; None for other data.
        statement: the privacy statement, as plain values.
        digest: SHA-256 of all that predictions depend on.

    Example:
        >>> import dptorch
        >>> model = dptorch.load("runs/patients-1")  # doctest: +SKIP
        >>> model.predict([{"age": 61, "sex": "f", "smoker": "no"}])  # doctest: +SKIP
        array(['flu'], dtype=object)
    """

    network: nn.Module
    classes: tuple[str, ...]
    input_shape: tuple[int, ...]
    preparation: Mapping[str, Any]
    schema: Schema | None
    statement: Mapping[str, Any]
    digest: str

    @property
    def is_number(self) -> bool:
        """Whether a number is predicted, not a class."""
        return not self.classes

    def predict(self, rows: Any) -> NDArray[Any]:
        """Predict the class name of each row (object [N]), or a number (float64 [N]). Where a picture
        may have several attributes, their names with commas.

        Args:
            rows: of a table, what `dptorch.tables.chunk_of` takes: a DataFrame, columns, a list of
                rows. Of images, what the model was trained on: arrays [N, ...], or paths of files.

        Raises:
            DataError: rows that do not fit the schema, the first twenty of them listed.
        """
        return self.decide(self.outputs(self.inputs(rows)))

    def predict_proba(self, rows: Any) -> NDArray[np.float64]:
        """Estimate the probability of each class, float64 [N, classes]; see `predict`.

        Raises:
            ConfigurationError: the model predicts a number.
        """
        if self.is_number:
            raise ConfigurationError("this model predicts a number, so there are no probabilities.")
        return self.probabilities(self.outputs(self.inputs(rows)))

    def inputs(self, rows: Any) -> Tensor:
        """Prepare rows: float32 [N, *input_shape].

        Raises:
            DataError: they do not fit.
        """
        if self.schema is None:
            return prepare_inputs(self.preparation, rows)
        if isinstance(rows, Encoded):
            return Preprocessing(self.schema).of(rows.raw)
        faults = Faults("rows")
        used = [name for name, column in self.schema.columns.items() if column.width]
        encoded = encode(self.schema, [chunk_of(rows, used)], faults, labelled=False)
        return Preprocessing(self.schema).of(encoded.raw)

    def outputs(self, inputs: Tensor) -> Tensor:
        """Run the network on prepared inputs: float32 [N, outputs]."""
        if not len(inputs):
            return torch.empty(0, len(self.classes) or 1)
        device = next((p.device for p in self.network.parameters()), torch.device("cpu"))
        with torch.no_grad():
            return torch.cat([self.network(x.to(device)).cpu() for x in inputs.split(_BATCH)])

    def probabilities(self, outputs: Tensor) -> NDArray[np.float64]:
        """Turn outputs [N, classes] into probabilities, float64 [N, classes]."""
        if self.preparation.get("several"):
            return np.asarray(outputs.double().sigmoid().numpy())
        return np.asarray(torch.softmax(outputs.double(), dim=1).numpy())

    def decide(self, outputs: Tensor) -> NDArray[Any]:
        """Turn outputs into class names (object [N]) or numbers in their units (float64 [N])."""
        if self.is_number:
            assert self.schema is not None
            assert self.schema.label.bounds is not None
            low, high = self.schema.label.bounds
            scaled = outputs[:, 0].double().clamp(-1, 1).numpy()
            return np.asarray(low + (scaled + 1) * ((high - low) / 2))
        if self.preparation.get("several"):
            found = [
                ",".join(name for name, on in zip(self.classes, row, strict=True) if on)
                for row in (outputs > 0).tolist()
            ]
            return np.array(found, dtype=object)
        names = np.array(self.classes, dtype=object)
        return np.asarray(names[outputs.argmax(1).numpy()])


def load(folder: str | Path, *, digest: str | None = None) -> Predictor:
    """Load the model of a run or a release on images, arrays or a table; see `dptorch.load`.

    Args:
        folder: such as "runs/demo", or what `dptorch release` wrote.
        digest: SHA-256 that the model must have; None trusts the statement in the folder.

    Raises:
        DataError: the folder is incomplete, or its model is not the one that is stated.
        ConfigurationError: the model's factory cannot be imported any more.
    """
    run = RunFolder(Path(folder))
    about = run.read_json("run.json")
    if (run.path / PRETRAINED).is_dir():
        raise DataError(
            f"{run.path} is a run on texts: its model is in {run.path / PRETRAINED}, in transformers' "
            "own format. dptorch.load runs it."
        )
    found = verify(run, about, digest)
    schema = None
    if about["data"]["preparation"].get("kind") == "table":
        schema = Schema.read(run.path / SCHEMA_FILE)
    return Predictor(
        network=load_model(folder),
        classes=tuple(about["data"]["classes"]),
        input_shape=tuple(about["data"]["input_shape"]),
        preparation=about["data"]["preparation"],
        schema=schema,
        statement=about["statement"],
        digest=found,
    )
