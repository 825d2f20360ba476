"""Train an image model on CIFAR-10 or CIFAR-100 with the flags of private_vision's ``cifar_DP``.

The command is ``python -m dptorch.compat.private_vision``.

Batches are drawn as epsilon assumes, every parameter is trained, and no layer is frozen for want of a
formula. Needs ``pip install 'dptorch[vision]'``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from torch import nn
from torch.utils.data import Dataset

from dptorch.engine.privacy_engine import PrivacyEngine
from dptorch.errors import ConfigurationError, DataError, PrivacyError, one_of
from dptorch.training.models import build_model
from dptorch.training.task import evaluate
from dptorch.validation.conversion import prepare

__all__ = ["main"]

_NAME = "python -m dptorch.compat.private_vision"

MODES = ("ghost_mixed", "ghost", "non-ghost", "non-private")
DATA_SETS = ("CIFAR10", "CIFAR100")
_DELTA = 1e-5  # private_vision's
_YES = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def train_cifar(
    lr: Annotated[float, typer.Option("--lr", help="Learning rate of Adam.")] = 0.001,
    epochs: Annotated[int, typer.Option("--epochs", help="Passes over the data.")] = 1,
    bs: Annotated[
        int,
        typer.Option(
            "--bs", help="Logical batch size: examples a step draws, in expectation. Sets accuracy."
        ),
    ] = 1000,
    mini_bs: Annotated[
        int,
        typer.Option(
            "--mini_bs", help="Most examples in the model at once. Sets memory and speed."
        ),
    ] = 50,
    eps: Annotated[float, typer.Option("--eps", help="Privacy budget ε, at δ = 1e-5.")] = 2.0,
    grad_norm: Annotated[
        float, typer.Option("--grad_norm", "-gn", help="Per-example gradient clipping norm.")
    ] = 0.1,
    mode: Annotated[
        str,
        typer.Option(
            "--mode",
            help="ghost_mixed, ghost or non-ghost, which give the same result, or non-private.",
        ),
    ] = "ghost_mixed",
    model: Annotated[
        str, typer.Option("--model", help="A model of timm, such as vit_tiny_patch16_224.")
    ] = "resnet18",
    pretrained: Annotated[
        str, typer.Option("--pretrained", help="Begin with timm's weights (a download): 1 or 0.")
    ] = "1",
    cifar_data: Annotated[
        str, typer.Option("--cifar_data", help="CIFAR10 or CIFAR100.")
    ] = "CIFAR10",
    data: Annotated[
        Path, typer.Option("--data", help="Folder of the data set. It is downloaded if missing.")
    ] = Path("data"),
    image_size: Annotated[
        int, typer.Option("--image_size", help="Side in pixels that images are resized to.")
    ] = 224,
    workers: Annotated[int, typer.Option("--workers", help="Processes that read images.")] = 2,
    seed: Annotated[
        int | None, typer.Option("--seed", help="For tests: noise from a number. Not private.")
    ] = None,
) -> None:
    """Train an image model on CIFAR-10 or CIFAR-100 with differential privacy.

    [bold]Example[/]

    [cyan]python -m dptorch.compat.private_vision --epochs 3 --model beit_large_patch16_224[/]
    """
    console = Console(highlight=False, soft_wrap=True)
    try:
        one_of("--mode", mode, MODES)
        one_of("--cifar_data", cifar_data, DATA_SETS)
        weights = _YES[one_of("--pretrained", pretrained.lower(), _YES)]
        train, test = _cifar(cifar_data, data, image_size)
        network = _network(model, image_size, len(train.classes), weights)
        _train(
            network, train, test, console, lr=lr, epochs=epochs, batch_size=bs, mini_batch=mini_bs,
            target_epsilon=eps, max_grad_norm=grad_norm, mode=mode, workers=workers, seed=seed,
        )  # fmt: skip
    except (ConfigurationError, DataError, PrivacyError) as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]Error:[/] {escape(str(error))}")
        raise typer.Exit(2) from None


def _cifar(name: str, root: Path, size: int) -> tuple[Any, Any]:
    """(train, test); each image is resized and scaled to [-1, 1] by itself."""
    try:
        from torchvision import datasets, transforms
    except (ImportError, RuntimeError) as error:  # RuntimeError: it was built for another torch
        raise ConfigurationError(
            f"CIFAR is read by torchvision, which cannot be imported ({error}). Install it with: "
            f"pip install 'dptorch[vision]', in the build that belongs to torch {torch.__version__}."
        ) from error
    look = transforms.Compose(
        [
            transforms.Resize(size),
            transforms.ToTensor(),
            transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ]
    )
    kind = getattr(datasets, name)
    try:
        return tuple(kind(root, train=t, download=True, transform=look) for t in (True, False))
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{name} is not in {root} and cannot be downloaded ({error}). Put the files of its "
            f"python version into {root / kind.base_folder}."
        ) from error


def _network(name: str, size: int, classes: int, pretrained: bool) -> nn.Module:
    try:
        network = build_model(f"timm:{name}", (3, size, size), classes, pretrained=pretrained)
    except OSError as error:
        raise ConfigurationError(
            f"the weights of {name} cannot be downloaded ({error}). Use --pretrained 0 to begin with "
            "random ones."
        ) from error
    return prepare(network)


def _train(
    network: nn.Module,
    train: Dataset[Any],
    test: Dataset[Any],
    console: Console,
    *,
    lr: float,
    epochs: int,
    batch_size: int,
    mini_batch: int,
    target_epsilon: float,
    max_grad_norm: float,
    mode: str,
    workers: int,
    seed: int | None,
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.to(device).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    engine = PrivacyEngine(
        network,
        batch_size=batch_size,
        sample_size=len(train),  # type: ignore[arg-type]
        epochs=epochs,
        target_epsilon=target_epsilon,
        target_delta=_DELTA,
        max_grad_norm=max_grad_norm,
        clipping_mode=mode,
        seed=seed,
    )
    engine.attach(optimizer)
    loader = engine.loader(train, max_physical_batch_size=mini_batch, num_workers=workers)
    plan = engine.plan
    console.print(
        f"{sum(p.numel() for p in network.parameters()):,} parameters on {device}; noise "
        f"{plan.noise_multiplier:.3f} x clipping norm {plan.max_grad_norm:g}, {plan.steps} steps of "
        f"about {plan.expected_batch_size:,.0f} examples"
    )
    for epoch in range(1, epochs + 1):
        for x, y in track(
            loader, f"Epoch {epoch}", console=console, disable=not console.is_terminal
        ):
            loss = F.cross_entropy(network(x.to(device)), y.to(device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        accuracy, test_loss = evaluate(network, test, device)
        console.print(
            f"Epoch: {epoch} | Test loss: {test_loss:.3f} | Test accuracy: {100 * accuracy:.2f} % | "
            f"epsilon: {engine.get_privacy_spent().epsilon:.3f}"
        )
    console.print(f"\n{engine.statement()}", markup=False)


def main(arguments: list[str] | None = None) -> None:
    """Run the command with `arguments`, by default those of the process."""
    app = typer.Typer(add_completion=False, rich_markup_mode="rich")
    app.command()(train_cifar)
    app(
        args=sys.argv[1:] if arguments is None else arguments,
        prog_name=_NAME,
    )


if __name__ == "__main__":
    main()
