"""`dptorch predict`: what a trained model says of new rows."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from dptorch.errors import ConfigurationError, one_of

if TYPE_CHECKING:
    from dptorch.text.predictor import TextPredictor
    from dptorch.training.predictor import Predictor

__all__ = ["predict"]


def predict(
    run: Annotated[Path, typer.Argument(help="Folder of a run or release.", show_default=False)],
    rows: Annotated[
        Path,
        typer.Argument(
            help="What to predict from: a table with the columns of the schema, rows of texts, a "
            "folder of images, or [bold].npz[/] (array x).",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="CSV file to write.", show_default="the terminal")
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMNS",
            help="Columns of the table to copy beside the predictions: id,date.",
            show_default=False,
        ),
    ] = None,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Add one column for each class.")
    ] = False,
    on_bad_row: Annotated[
        str, typer.Option(help="[bold]error[/], or [bold]skip[/] rows that do not fit.")
    ] = "error",
    digest: Annotated[
        str | None,
        typer.Option(
            help="SHA-256 that the model must have, from its statement.", show_default=False
        ),
    ] = None,
) -> None:
    """Predict new rows with a trained model.

    The run knows how its data was prepared: give the rows as they are. Predictions tell nothing more of
    the training data than the model does, whatever rows are asked for.

    [bold]Examples[/]

    [cyan]dptorch predict runs/patients-1 new.csv --out predictions.csv --keep patient_id[/]

    [cyan]dptorch predict runs/letters-1 new.jsonl --probabilities[/]

    [cyan]dptorch predict released-model photos/[/]
    """
    from dptorch.text.predictor import TextPredictor, load

    one_of("on_bad_row", on_bad_row, ("error", "skip"))
    model = load(run, digest=digest)
    if probabilities and not model.classes:
        raise ConfigurationError(
            "--probabilities are of classes, and this model predicts a number. Leave it out."
        )
    kept = [name.strip() for name in (keep or "").split(",") if name.strip()]
    skip = on_bad_row == "skip"
    inputs: Any
    if isinstance(model, TextPredictor):
        place, numbers, columns, inputs, skipped = _texts(model, rows, kept, skip)
    elif model.schema is not None:
        place, numbers, columns, inputs, skipped = _table(model, rows, kept, skip)
    elif kept:
        raise ConfigurationError("--keep names columns of a table, and this model is for others.")
    else:
        place, numbers, inputs = _others(model, rows)
        columns, skipped = {}, 0
    outputs = model.outputs(inputs)
    header = [place, *columns, "prediction"]
    cells: list[Sequence[Any]] = [numbers, *columns.values(), model.decide(outputs).tolist()]
    if probabilities:
        header += [f"probability of {name}" for name in model.classes]
        cells += [[f"{p:.6f}" for p in column] for column in model.probabilities(outputs).T]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(zip(*cells, strict=True))
    if out is None:
        typer.echo(text.getvalue(), nl=False)
    else:
        _write(out, text.getvalue())
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if skipped:
        console.print(f"[bold yellow]Skipped[/] {skipped:,} rows that do not fit.")
    if out is not None:
        console.print(f"[bold green]Predicted[/] {len(outputs):,} rows: {out}")


def _table(
    model: Predictor, path: Path, keep: list[str], skip: bool
) -> tuple[str, Sequence[Any], dict[str, list[str]], Any, int]:
    """(what rows are numbered by, their numbers, kept columns, inputs, rows left out) of a table."""
    from dptorch.errors import DataError
    from dptorch.tables import encode, open_table
    from dptorch.tables.faults import Faults

    assert model.schema is not None
    if not path.exists():
        raise DataError(f"{path} does not exist (looked from {Path.cwd()}).")
    table = open_table(path, model.schema.file)
    faults = Faults(str(path), table.place)
    rows = encode(model.schema, table.chunks(faults), faults, labelled=False, keep=keep, skip=skip)
    return table.place, rows.numbers, rows.kept, model.inputs(rows), rows.skipped


def _texts(
    model: TextPredictor, path: Path, keep: list[str], skip: bool
) -> tuple[str, Sequence[Any], dict[str, list[str]], Any, int]:
    """The same of rows of texts."""
    from dptorch.errors import DataError
    from dptorch.text.rows import read_rows

    rows = read_rows(str(path))
    found: list[Any] = []
    numbers: list[int] = []
    for number, row in enumerate(rows):
        try:
            (tokens,) = model.inputs([row])
        except DataError as error:
            if skip:
                continue
            raise DataError(f"{path}: {str(error).replace('row 0', f'row {number}')}") from None
        found.append(tokens)
        numbers.append(number)
    absent = [name for name in keep if rows and name not in rows[0]]
    if absent:
        raise DataError(f"{path} has no column {absent[0]!r} to keep. Found: {', '.join(rows[0])}.")
    kept = {name: [str(rows[number][name]) for number in numbers] for name in keep}
    return "row", numbers, kept, found, len(rows) - len(found)


def _others(model: Predictor, path: Path) -> tuple[str, Sequence[Any], Any]:
    """(what an input is, the name of each, inputs) of images and arrays."""
    import numpy as np

    from dptorch.errors import DataError
    from dptorch.training.preparation import image_files

    if not path.exists():
        raise DataError(f"{path} does not exist (looked from {Path.cwd()}).")
    if model.preparation["kind"] == "images":
        files = image_files(path)
        return "file", [str(file) for file in files], model.inputs(files)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            array = arrays["x"] if hasattr(arrays, "files") else arrays
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise DataError(
            f"{path}: not an .npz file with an array x ({error}). Write one with np.savez(path, x=...)."
        ) from error
    return "row", range(len(array)), model.inputs(array)


def _write(path: Path, text: str) -> None:
    from dptorch.atomic_files import replacing

    try:
        with replacing(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"--out {path} cannot be written ({error.strerror}).") from None
