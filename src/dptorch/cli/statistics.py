"""`dptorch statistics`: private means, deviations, quantiles and histograms of a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dptorch.cli.options import AsJson
from dptorch.errors import ConfigurationError, DataError

__all__ = ["statistics"]


def statistics(
    data: Annotated[
        Path,
        typer.Argument(
            help="A table (with --schema), or pictures: a folder of images, CIFAR's files, ...",
            show_default=False,
        ),
    ],
    epsilon: Annotated[float, typer.Option(help="What all numbers together may cost.")],
    schema: Annotated[
        Path | None,
        typer.Option(help="Of a table: see [bold]dptorch schema[/].", show_default=False),
    ] = None,
    delta: Annotated[
        float | None,
        typer.Option(show_default="the largest power of ten that is at most 1 / (10 records)"),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Of a table: age,sex. The fewer, the less noise.",
            show_default="all that have statistics",
        ),
    ] = None,
    quantiles: Annotated[
        str, typer.Option(metavar="LEVELS", help="Of numbers with a histogram.")
    ] = "0.05,0.25,0.5,0.75,0.95",
    bins: Annotated[
        int | None,
        typer.Option(
            help="Of the histograms of numbers, which quantiles are read from; 0 for none.",
            show_default="64; 0 for pictures",
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            help="Of pictures: cifar10, cifar100, mnist, celeba, parquet or folder.",
            show_default="what is there",
        ),
    ] = None,
    channels: Annotated[int, typer.Option(help="Of pictures: 1 (grey) or 3 (RGB).")] = 3,
    mechanism: Annotated[
        str,
        typer.Option(
            help="[bold]discrete_gaussian[/], exact, or [bold]gaussian[/], which needs slightly less "
            "noise."
        ),
    ] = "discrete_gaussian",
    out: Annotated[
        Path | None,
        typer.Option(help="JSON file of the numbers with their statement.", show_default=False),
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder of the runs, where the ledger is.")] = Path(
        "runs"
    ),
    ledger: Annotated[
        str | None,
        typer.Option(
            envvar="DPTORCH_LEDGER",
            help="Where the release is written down before it is made.",
            show_default="ledger.db in the folder of the runs",
        ),
    ] = None,
    no_ledger: Annotated[bool, typer.Option("--no-ledger", help="Keep no ledger.")] = False,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Name of the data set in the ledger.",
            show_default="a random id kept beside the data",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Repeatable, and [bold]not private[/].", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Release statistics of a data set under differential privacy.

    Means and deviations, quantiles and histograms of the columns of a table, or means and deviations of
    the channels of pictures, in one release. It is charged in the ledger that runs on the same data are
    charged in. Use it for bounds that a schema needs, and for what inputs are scaled by.

    [bold]Examples[/]

    [cyan]dptorch statistics patients.csv --schema patients.schema.json --epsilon 0.5[/]

    [cyan]dptorch statistics patients.csv --schema wide.json --epsilon 0.2 --columns pay --bins 256[/]

    [cyan]dptorch statistics data --format cifar10 --epsilon 0.1[/]
    """
    from dptorch.atomic_files import replacing
    from dptorch.cli.ledger import for_new_run
    from dptorch.statistics import describe_pictures, describe_table

    if not data.exists():
        raise DataError(f"{data} does not exist (looked from {Path.cwd()}).")
    if data.is_file() and schema is None and data.suffix not in (".parquet", ".pq"):
        raise ConfigurationError(
            f"--schema (not given): {data} is a table, and bounds and values of its columns have to be "
            f"public. Make a schema with: dptorch schema {data}"
        )
    terms: dict[str, Any] = {
        "epsilon": epsilon,
        "delta": delta,
        "quantiles": _numbers(quantiles),
        "mechanism": mechanism,
        "seed": seed,
    }
    if not no_ledger:
        terms["ledger"] = for_new_run(ledger, runs, dataset, data=str(data), as_json=as_json)
    if schema is not None:
        names = None if columns is None else [name.strip() for name in columns.split(",")]
        found = describe_table(
            data,
            schema,
            columns=names,
            bins=64 if bins is None else bins,
            **terms,
        )
    else:
        found = describe_pictures(data, format=format, channels=channels, bins=bins or 0, **terms)
    if out is not None:
        try:
            with replacing(out) as partial:
                partial.write_text(found.to_json(), encoding="utf-8")
        except OSError as error:
            # The release is spent: it is shown at least.
            typer.echo(found.to_json())
            raise ConfigurationError(f"--out {out} cannot be written ({error.strerror}).") from None
    typer.echo(found.to_json() if as_json else str(found), nl=False)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigurationError(
            f"quantiles={text!r} must be levels with commas, such as 0.25,0.5,0.75."
        ) from None
