"""`dptorch scale`: what a private step on several ranks needs, for a model of your own."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dptorch.cli.options import AsJson

if TYPE_CHECKING:
    from dptorch.distributed.cost import Sizes

__all__ = ["scale"]


def scale(
    model: Annotated[
        str,
        typer.Argument(
            help="A name as of [bold]dptorch train --model[/]: [bold]package.module:factory[/], "
            "[bold]torchvision:NAME[/], [bold]timm:NAME[/], ..."
        ),
    ],
    ranks: Annotated[int, typer.Option(help="Processes, one for each GPU.")] = 8,
    input_shape: Annotated[
        str, typer.Option(metavar="SHAPE", help="Of one input: 3,224,224.")
    ] = "3,224,224",
    tokens: Annotated[
        int | None,
        typer.Option(
            help="The input is this many token ids instead.", show_default="the input is numbers"
        ),
    ] = None,
    classes: Annotated[int, typer.Option(help="Outputs of the model.")] = 1000,
    batch_size: Annotated[
        int, typer.Option(help="Expected size of a logical batch, over all ranks.")
    ] = 1024,
    max_physical_batch_size: Annotated[
        int, typer.Option(help="Most examples that go through a rank's model at once.")
    ] = 16,
    optimizer: Annotated[str, typer.Option(help="sgd, momentum or adam.")] = "adam",
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Parameters of forward passes are in bfloat16.")
    ] = False,
    layer_wise: Annotated[
        bool, typer.Option("--layer-wise", help="Layers are clipped one by one.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what memory and traffic a private step on several ranks needs, for each strategy.

    The model is built on torch's meta device, so that it may be larger than this machine.
    Activations come on top, as in ordinary training.

    [bold]Examples[/]

    [cyan]dptorch scale torchvision:resnet50 --ranks 4[/]

    [cyan]dptorch scale mypackage.nets:decoder --tokens 2048 --ranks 64 --bf16 --layer-wise[/]
    """
    from dptorch.distributed.cost import STRATEGIES, cost

    sizes = _sizes(model, input_shape, tokens, classes)
    whole = -(-batch_size // max_physical_batch_size)
    parts = -(-batch_size // (ranks * max_physical_batch_size))
    found = {
        strategy: cost(
            sizes,
            strategy,
            ranks,
            physical_batch_size=max_physical_batch_size,
            physical_batches=whole if strategy == "tensor" else parts,
            optimizer=optimizer,
            parameter_bytes=2 if bf16 else 4,
            layer_wise=layer_wise,
        )
        for strategy in STRATEGIES
    }
    if as_json:
        told = {s: {**asdict(c), "total": c.total} for s, c in found.items()}
        typer.echo(
            json.dumps({"sizes": asdict(sizes), "physical_batches": parts, **told}, indent=2)
        )
        return
    from rich.console import Console
    from rich.table import Table

    columns = ("parameters", "gathered", "optimizer", "factors", "sums", "total", "sent")
    table = Table("", *columns, box=None)
    for strategy, each in found.items():
        table.add_row(strategy, *(_bytes(getattr(each, c)) for c in columns))
    console = Console(highlight=False)
    console.print(
        f"{sizes.trainable:,} parameters to train and {sizes.frozen:,} frozen, {ranks} ranks, "
        f"{parts} physical batches of {max_physical_batch_size} on each in a step; under tensor "
        f"parallelism all {whole}"
    )
    console.print(table)
    console.print("Bytes on each rank, activations not counted; sent: by each in a step.")
    if sizes.factors is None:
        console.print("Factors are not known: the model takes another input than the one given.")


def _sizes(model: str, input_shape: str, tokens: int | None, classes: int) -> Sizes:
    import torch

    from dptorch.distributed.cost import sizes_of
    from dptorch.errors import ConfigurationError
    from dptorch.training.models import build_model

    try:
        shape = tuple(int(side) for side in input_shape.split(","))
    except ValueError:
        raise ConfigurationError(
            f"--input-shape {input_shape}: expected numbers with commas between: 3,224,224."
        ) from None

    def run(built: Any) -> object:
        if tokens is None:
            return built(torch.empty(1, *shape))
        ids = torch.zeros(1, tokens, dtype=torch.long)
        try:
            return built(ids)
        except RuntimeError:  # transformers looks at values where it is given no mask
            return built(ids, attention_mask=torch.ones(1, 1, tokens, tokens))

    with torch.device("meta"):
        built = build_model(model, shape, classes)
        try:
            return sizes_of(built, run)
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
            return sizes_of(built)


def _bytes(number: int) -> str:
    """A number of bytes as people read it.

    Example:
        >>> _bytes(1_234_567_890), _bytes(0)
        ('1.23 GB', '0')
    """
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return str(number)
