"""`dptorch check`: find out whether a model can be trained privately, before the first step."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dptorch.cli.options import AsJson
from dptorch.errors import ConfigurationError, one_of

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["check"]

_DTYPES = ("float32", "float64", "bfloat16")


def check(
    model: Annotated[
        str,
        typer.Argument(
            help="[bold]package.module:factory[/], [bold]timm:[/]NAME, [bold]torchvision:[/]NAME, "
            "or a built-in one (cnn, mlp, linear).",
            show_default=False,
        ),
    ],
    input_shape: Annotated[
        str,
        typer.Option(help="One input, without the batch: 3,224,224. Of token ids: their number."),
    ] = "3,32,32",
    vocab_size: Annotated[
        int | None,
        typer.Option(help="Inputs are token ids below this, not numbers.", show_default=False),
    ] = None,
    num_classes: Annotated[int, typer.Option(help="Outputs of a built-in or library model.")] = 10,
    examples: Annotated[int, typer.Option(min=2, help="How many to compare.")] = 3,
    dtype: Annotated[
        str, typer.Option(help="Precision: float32, float64 or bfloat16.")
    ] = "float32",
    prepare: Annotated[
        bool, typer.Option(help="Convert BatchNorm first, as dptorch.prepare does.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the weights and the synthetic inputs.")] = 0,
    every_parameter: Annotated[
        bool, typer.Option("--all", help="List every parameter, not only those at fault.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check a model on synthetic inputs: exact per-example gradients, and no example touches another.

    Exit code 1 if there is a fault.

    [bold]Examples[/]

    [cyan]dptorch check torchvision:resnet18 --prepare[/]

    [cyan]dptorch check mypackage.models:build --input-shape 128 --vocab-size 32000[/]
    """
    import torch

    from dptorch.training.models import build_model
    from dptorch.validation.conversion import prepare as prepare_model
    from dptorch.validation.gradient_check import check as check_model

    shape = _shape(input_shape)
    one_of("dtype", dtype, _DTYPES)
    precision = getattr(torch, dtype)
    torch.manual_seed(seed)
    net = build_model(model, shape, num_classes).to(precision)
    _leave_zero(net)
    if prepare:
        prepare_model(net, report=lambda text: typer.echo(text, err=True))
    size = (examples, *shape)
    inputs = (
        torch.randn(size, dtype=precision)
        if vocab_size is None
        else torch.randint(0, vocab_size, size)
    )
    report = check_model(net, inputs, synthetic_loss, examples=examples)
    if as_json:
        typer.echo(json.dumps(_without_nan(report.to_dict()), indent=2))
    else:
        typer.echo(report.table(every_parameter=every_parameter))
    if not report.ok:
        raise typer.Exit(1)


def _leave_zero(model: nn.Module) -> None:
    """Give parameters that start at one small number, as zero-initialised layers and layer scales
    do, random values: behind a factor of zero no gradient can be compared."""
    import torch

    with torch.no_grad():
        for p in model.parameters():
            if p.numel() and bool((p == p.flatten()[0]).all()) and abs(p.flatten()[0].item()) < 0.1:
                p.normal_(std=0.1)


def synthetic_loss(model: nn.Module, inputs: Tensor) -> Tensor:
    """One loss for each example, that every output moves: ``sum_i cos(i) o_i + o_i^2 / 2`` over the
    numbers o_i that a model, of whatever structure of outputs, gives for it.

    Raises:
        ConfigurationError: if no output is a floating-point tensor with the examples in dimension 0.
    """
    import torch
    from torch.utils._pytree import tree_leaves

    total: Tensor | None = None
    for out in tree_leaves(model(inputs)):
        if not isinstance(out, torch.Tensor) or not out.is_floating_point() or not out.dim():
            continue
        if out.shape[0] == inputs.shape[0] and out.requires_grad | (not torch.is_grad_enabled()):
            flat = out.flatten(1) if out.dim() > 1 else out[:, None]
            pattern = torch.arange(flat.shape[1], device=out.device).cos().to(out.dtype)
            loss = (flat * pattern + flat.square() / 2).sum(1)
            total = loss if total is None else total + loss
    if total is None:
        raise ConfigurationError(
            "the model returned no floating-point tensor with the examples in dimension 0. Check "
            "it from Python, with a loss of your own: dptorch.check(model, batch, loss_fn)."
        )
    return total


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise ConfigurationError(
            f"--input-shape {text!r} is not a shape. Expected positive numbers like 3,224,224."
        )
    return shape


def _without_nan(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(v) for v in value]
    return value
