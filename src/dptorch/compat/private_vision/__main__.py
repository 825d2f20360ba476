"""Train an image model on CIFAR-10 or CIFAR-100 with the flags of private_vision's ``cifar_DP``.

The command is ``python -m dptorch.compat.private_vision``. It is `dptorch train vision` under other
names: its ten flags are settings of a `dptorch.vision.job.VisionJob`, and options that private_vision
has not are those of that command.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from dptorch.cli.app import ReadableErrors
from dptorch.cli.options import grouped, panel_option, plan_option
from dptorch.cli.processes import ENTRY
from dptorch.cli.train import run_task
from dptorch.cli.train_options import (
    DATA,
    PRIVACY,
    ClippingStyle,
    Device,
    LedgerOptions,
    OutputOptions,
    Seed,
    Workers,
)
from dptorch.cli.vision_options import AccuracyOptions, MethodOptions, OptimizerOptions
from dptorch.errors import one_of

if TYPE_CHECKING:
    from dptorch.training.job import Setup

__all__ = ["CifarOptions", "main"]

MODES: Final = ("ghost_mixed", "ghost", "non-ghost", "non-private")
DATA_SETS: Final = ("CIFAR10", "CIFAR100")
_NAME: Final = "python -m dptorch.compat.private_vision"
_CODE: Final = "from dptorch.compat.private_vision.__main__ import main; main()"
_DELTA: Final = 1e-5  # private_vision's
_YES: Final = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def _flag(*names: str, help: str, default: str | bool = True) -> Any:
    return panel_option("private_vision's flags", *names, help=help, default=default)


@dataclass(frozen=True)
class CifarOptions:
    """The flags of private_vision's document, and what it has fixed, by the settings that they are."""

    learning_rate: Annotated[float, _flag("--lr", help="Learning rate.")] = 0.001
    epochs: Annotated[int, _flag("--epochs", help="Passes over the data.")] = 1
    batch_size: Annotated[
        int,
        _flag("--bs", help="Logical batch size: examples a step draws, in expectation."),
    ] = 1000
    max_physical_batch_size: Annotated[
        int,
        _flag("--mini_bs", help="Most examples in the model at once. Sets memory and speed."),
    ] = 50
    target_epsilon: Annotated[float, _flag("--eps", help="Privacy budget ε, at δ = 1e-5.")] = 2.0
    max_grad_norm: Annotated[
        float, _flag("--grad_norm", "-gn", help="Per-example gradient clipping norm.")
    ] = 0.1
    clipping_mode: Annotated[
        str | None,
        _flag(
            "--mode",
            help="ghost_mixed, ghost or non-ghost, which give the same result, or non-private.",
            default="ghost_mixed",
        ),
    ] = None
    model: Annotated[
        str,
        _flag(
            "--model", help="A model of timm, such as vit_tiny_patch16_224; or torchvision:NAME."
        ),
    ] = "resnet18"
    pretrained: Annotated[
        str, _flag("--pretrained", help="Begin with timm's weights (a download): 1 or 0.")
    ] = "1"
    cifar_data: Annotated[str, _flag("--cifar_data", help="CIFAR10 or CIFAR100.")] = "CIFAR10"
    data: Annotated[
        Path, panel_option(DATA, help="Folder of the data set, in torchvision's files.")
    ] = Path("data")
    download: Annotated[
        bool,
        panel_option(DATA, "--download", help="Let torchvision download it if it is not there."),
    ] = False
    image_size: Annotated[
        int,
        panel_option(
            DATA, "--image_size", "--image-size", help="Side in pixels that images are resized to."
        ),
    ] = 224
    clipping_fn: Annotated[str, plan_option("clipping_fn", PRIVACY, default=True)] = "abadi"
    clipping_style: ClippingStyle = "all-layer"
    num_workers: Workers = 0
    device: Device = "auto"
    seed: Seed = None


@grouped
def train_cifar(
    ctx: typer.Context,
    flags: CifarOptions,
    method: MethodOptions,
    accuracy: AccuracyOptions,
    optimizer: OptimizerOptions,
    output: OutputOptions,
    ledger: LedgerOptions,
) -> None:
    """Train an image model on CIFAR-10 or CIFAR-100 with differential privacy.

    The optimizer is Adam, unless --optimizer names another; there is no recipe. Writes
    [bold]runs/NAME/[/], as dptorch train vision does.

    [bold]Examples[/]

    [cyan]python -m dptorch.compat.private_vision --epochs 3 --model beit_large_patch16_224[/]

    [cyan]python -m dptorch.compat.private_vision --method bias-only --augment flip-crop --views 4[/]
    """

    def prepared() -> Setup:
        from dptorch.vision.job import VisionJob, prepare

        name = one_of("--cifar_data", flags.cifar_data, DATA_SETS).lower()
        groups = (flags, method, accuracy, optimizer)
        settings = {key: value for group in groups for key, value in vars(group).items()}
        del settings["cifar_data"]
        settings |= {
            "data": str(flags.data),
            "format": name,
            "model": flags.model if ":" in flags.model else f"timm:{flags.model}",
            "pretrained": _YES[one_of("--pretrained", flags.pretrained.lower(), _YES)],
            "clipping_mode": one_of("--mode", flags.clipping_mode or MODES[0], MODES),
            "scale": "half",
            "target_delta": _DELTA,
            "optimizer": optimizer.optimizer or "adam",
        }
        return prepare(VisionJob(diagnostics=output.diagnostics, **settings))

    ctx.meta[ENTRY] = _CODE
    run_task(ctx, prepared, flags.cifar_data.lower(), flags, output, ledger)


def main(arguments: list[str] | None = None) -> None:
    """Run the command with `arguments`, by default those of the process."""
    app = typer.Typer(
        cls=ReadableErrors,
        callback=train_cifar,
        invoke_without_command=True,
        subcommand_metavar="",
        add_completion=False,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
    )
    app(args=sys.argv[1:] if arguments is None else arguments, prog_name=_NAME)


if __name__ == "__main__":
    main()
