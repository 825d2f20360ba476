"""A trained model with its preprocessing as one program that needs no dptorch: torch.export or ONNX."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Final

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
    """Write a model with its preprocessing as one file, for any number of rows.

    The name of the file says the format:

    - ``.pt2``: `torch.export`. ``torch.export.load(path, extra_files={"inputs.json": ""})`` gives the
      program and says what its inputs are.
    - ``.onnx``: for runtimes without PyTorch. Input "rows", output "answers"; the model's metadata
      has "inputs.json". Needs the extra `onnx`.

    Args:
        model: from `dptorch.load`.
        path: ends in .pt2 or .onnx.

    Guarantees:
        The program gives what `Predictor.predict_proba` gives, without dptorch.
        Held by `test_an_exported_model_predicts_the_same`.

    Returns:
        What the inputs are, as `describe_inputs` says; it is in the file too.

    Raises:
        ConfigurationError: the path ends otherwise, the network cannot be exported, or a package that
            the format needs is missing.
    """
    path = Path(path)
    if path.suffix not in _WRITERS:
        raise ConfigurationError(
            f"{path}: expected a name that ends in .pt2 (torch.export) or .onnx."
        )
    described = describe_inputs(model)
    try:
        program = _trace(model)
        with replacing(path) as partial:
            _WRITERS[path.suffix](program, partial, json.dumps(described))
    except ConfigurationError:
        raise
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written ({error.strerror}).") from None
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigurationError(
            f"{type(model.network).__name__} cannot be written as {path.suffix} ({reason}). Its "
            "weights are in model.safetensors, and dptorch.load runs it."
        ) from error
    return described


def _trace(model: Predictor) -> torch.export.ExportedProgram:
    rows = 3
    if model.schema is None:
        example = torch.zeros(rows, *model.input_shape)
    else:
        example = torch.zeros(rows, Preprocessing(model.schema).width, dtype=torch.float64)
    return torch.export.export(
        Deployed(model).eval(), (example,), dynamic_shapes=({0: torch.export.Dim("rows")},)
    )


def _write_pt2(program: torch.export.ExportedProgram, path: Path, described: str) -> None:
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={"inputs.json": described})


def _write_onnx(program: torch.export.ExportedProgram, path: Path, described: str) -> None:
    try:
        import onnx
        import onnxscript  # noqa: F401  torch.onnx imports it, and would name no way out
    except ImportError as error:
        raise ConfigurationError(
            f"writing .onnx needs {error.name}: pip install 'dptorch[onnx]'."
        ) from None
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):  # it prints its progress
        warnings.simplefilter("ignore")
        made = torch.onnx.export(
            program, (), dynamo=True, input_names=["rows"], output_names=["answers"], verbose=False
        )
    assert made is not None
    proto = made.model_proto
    onnx.helper.set_model_props(proto, {"inputs.json": described})
    path.write_bytes(proto.SerializeToString())


_WRITERS: Final[Mapping[str, Callable[[torch.export.ExportedProgram, Path, str], None]]] = {
    ".pt2": _write_pt2,
    ".onnx": _write_onnx,
}
