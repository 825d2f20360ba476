"""A trained model with its preprocessing as one program of `torch.export`, which needs no dptorch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dptorch.atomic_files import replacing
from dptorch.errors import ConfigurationError
from dptorch.tables import Preprocessing
from dptorch.tables.columns import Boolean, Category, Date, Text
from dptorch.training.predictor import Predictor

__all__ = ["Deployed", "describe_inputs", "export"]


class Deployed(nn.Module):
    """Preprocessing, network and what makes an answer of its outputs.

    Takes raw numbers, float64 [B, D], of a table (`describe_inputs` says what they are), or prepared
    inputs, float32 [B, *shape], of anything else. Gives probabilities, float64 [B, classes], or numbers
    in their own units, float64 [B].

    Args:
        model: from `dptorch.load`.
    """

    def __init__(self, model: Predictor) -> None:
        super().__init__()
        self.preprocessing = nn.Identity() if model.schema is None else Preprocessing(model.schema)
        self.network = model.network
        self._bounds = None if model.schema is None else model.schema.label.bounds

    def forward(self, raw: Tensor) -> Tensor:
        """See the class."""
        outputs = self.network(self.preprocessing(raw)).double()
        if self._bounds is None:
            return torch.softmax(outputs, dim=1)
        low, high = self._bounds
        return low + (outputs[:, 0].clamp(-1, 1) + 1) * ((high - low) / 2)


def describe_inputs(model: Predictor) -> dict[str, Any]:
    """What the numbers of an input and of an output are, as plain values."""
    found: dict[str, Any] = {
        "model_sha256": model.digest,
        "outputs": [f"probability of {name}" for name in model.classes] or ["the number predicted"],
    }
    if model.schema is None:
        return found | {
            "input": f"float32 (rows, {', '.join(map(str, model.input_shape))}), prepared",
            "preparation": dict(model.preparation),
        }
    columns: list[dict[str, Any]] = []
    for name, column in model.schema.columns.items():
        if isinstance(column, Text):
            what = f"counts of words by crc32(word) % {column.buckets}, words of \\w+ in lower case"
            columns.append({"column": name, "numbers": column.buckets, "are": what})
        elif column.width:
            columns.append({"column": name, "numbers": 1, "are": _meaning(column)})
    return found | {
        "input": f"float64 (rows, {sum(c['numbers'] for c in columns)})",
        "columns": columns,
    }


def _meaning(column: Any) -> str:
    if isinstance(column, Category):
        listed = ", ".join(f"{i} {value}" for i, value in enumerate(column.values))
        what = listed + (f", {len(column.values)} any other" if column.other else "")
    elif isinstance(column, Boolean):
        what = "1 yes, 0 no"
    elif isinstance(column, Date):
        what = "days since 1970-01-01"
    else:
        what = "the number"
    return what + ("; NaN if the cell is empty" if column.missing else "")


def export(model: Predictor, path: str | Path) -> dict[str, Any]:
    """Write a model with its preprocessing as a file of `torch.export` (.pt2), for any number of rows.

    ``torch.export.load(path, extra_files={"inputs.json": ""})`` gives the program and says what its
    inputs are.

    Args:
        model: from `dptorch.load`.
        path: ends in .pt2.

    Guarantees:
        The program gives what `Predictor.predict_proba` gives, without dptorch.
        Held by `test_an_exported_model_predicts_the_same`.

    Returns:
        What the inputs are, as `describe_inputs` says; it is in the file too.

    Raises:
        ConfigurationError: the path ends otherwise, or the network cannot be exported.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise ConfigurationError(
            f"{path}: expected a name that ends in .pt2, the format of torch.export."
        )
    described = describe_inputs(model)
    rows = 3
    if model.schema is None:
        example = torch.zeros(rows, *model.input_shape)
    else:
        example = torch.zeros(rows, Preprocessing(model.schema).width, dtype=torch.float64)
    try:
        program = torch.export.export(
            Deployed(model).eval(), (example,), dynamic_shapes=({0: torch.export.Dim("rows")},)
        )
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigurationError(
            f"torch.export cannot trace {type(model.network).__name__} ({reason}). Its weights are in "
            "model.safetensors, and dptorch.load runs it."
        ) from error
    _write(program, path, described)
    return described


def _write(program: Any, path: Path, described: Mapping[str, Any]) -> None:
    try:
        with replacing(path) as partial, partial.open("wb") as file:
            torch.export.save(program, file, extra_files={"inputs.json": json.dumps(described)})
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written ({error.strerror}).") from None
