"""The form of a request: what a row of a run's data looks like in JSON.

=========  ===========================================================================================
table      an object with the columns of the schema
texts      a text; an object with both columns where the model takes pairs
pictures   the content of an image file, in base64: a server opens no path that a client names
arrays     the numbers of one input, nested as its shape is
recipe     a grey image, before the recipe's transform
=========  ===========================================================================================
"""

# No postponed annotations: pydantic reads those of its models, which name what is local here.
import datetime
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Base64Bytes, BaseModel, ConfigDict, Field, create_model

from dptorch.prediction.serving.service import takes_files
from dptorch.tables.columns import Boolean, Category, Column, Date, Number
from dptorch.text.predictor import TextPredictor
from dptorch.training.predictor import Predictor

__all__ = ["body_of", "plain", "row_depth"]

Finite = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]
Picture = Annotated[
    Base64Bytes, Field(description="The content of an image file (PNG, JPEG, ...), in base64.")
]
_STRICT = ConfigDict(extra="forbid")


def body_of(reader: Predictor | TextPredictor, max_rows: int) -> type[BaseModel]:
    """The form of a request with at most `max_rows` rows."""
    row: Any = _row_of(reader)
    rows = Annotated[list[row], Field(min_length=1, max_length=max_rows)]
    return create_model(
        "Rows",
        __config__=_STRICT,
        rows=(rows, ...),
        together=(bool, Field(False, description="Average noise over rows that are alike.")),
    )


def plain(rows: list[Any]) -> list[Any]:
    """Rows of a request as plain values."""
    return [row.model_dump(by_alias=True) if isinstance(row, BaseModel) else row for row in rows]


def row_depth(reader: Predictor) -> int:
    """How deeply the numbers of one row are nested in a request."""
    return 2 if reader.preparation.get("kind") == "recipe" else len(reader.input_shape)


def _row_of(reader: Predictor | TextPredictor) -> Any:
    if isinstance(reader, TextPredictor):
        if len(reader.columns) == 1:
            return Text
        return _object({name: (Text, {}) for name in reader.columns})
    if reader.schema is not None:
        columns = reader.schema.columns
        return _object({name: _field(each) for name, each in columns.items() if each.width})
    if takes_files(reader):
        return Picture
    row: Any = Finite
    for _ in range(row_depth(reader)):
        row = list[row]
    return row


def _object(columns: Mapping[str, tuple[Any, Any]]) -> type[BaseModel]:
    """Fields with names that Python allows; the column's own name is what JSON has."""
    fields: dict[str, Any] = {}
    for i, (name, (kind, settings)) in enumerate(columns.items()):
        fields[f"column_{i}"] = (kind, Field(alias=name, **settings))
    return create_model("Row", __config__=_STRICT, **fields)


def _field(column: Column) -> tuple[Any, dict[str, Any]]:
    kind: Any = str
    settings: dict[str, Any] = {}
    if isinstance(column, Number):
        kind = Finite | str if column.decimal != "." else Finite
        if column.bounds is not None:
            settings["description"] = "Clipped to {:g} .. {:g}.".format(*column.bounds)
    elif isinstance(column, Category):
        if not column.other:
            kind = Literal[column.values]
        settings["description"] = "One of: " + ", ".join(column.values)
    elif isinstance(column, Date):
        kind = str if column.format else datetime.date | datetime.datetime | str
    elif isinstance(column, Boolean):
        kind = bool | str
    if getattr(column, "missing", False):
        return kind | None, {"default": None, **settings}
    return kind, settings
