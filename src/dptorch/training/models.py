"""Build the model that `--model` names: built in, by import path, of torchvision or of timm.

Every factory gets the shape of one input and the number of classes and returns an `nn.Module`
whose output is a matrix of logits [B, num_classes].
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from dptorch.errors import ConfigurationError, one_of
from dptorch.training.wide_resnet import WideResNet
from dptorch.validation.conversion import prepare

__all__ = ["BUILT_IN", "TanhCNN", "build_model", "linear", "mlp", "tanh_cnn"]

Shape = tuple[int, ...]
Factory = Callable[[Shape, int], nn.Module]


class TanhCNN(nn.Module):
    """Two convolutions and two linear layers with tanh, small enough to be trained privately.

    Bounded activations keep per-example gradients of a similar size, so clipping distorts them
    less than it does a ReLU network's (Papernot et al., "Tempered Sigmoid Activations for Deep
    Learning with Differential Privacy", AAAI 2021).

    Args:
        input_shape: (channels, height, width), sides of at least 14.
        num_classes: number of logits.

    Example:
        >>> TanhCNN((1, 28, 28), 10)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(self, input_shape: Shape, num_classes: int) -> None:
        super().__init__()
        if len(input_shape) != 3 or min(input_shape[1:]) < 14:
            raise ConfigurationError(
                f"The convolutional network needs images (channels, height, width) with sides of "
                f"at least 14, but one input here has shape {input_shape}. For tabular data use "
                f"--model mlp or --model linear, for small images --image-size 28."
            )
        self.conv1 = nn.Conv2d(input_shape[0], 16, kernel_size=8, stride=2, padding=3)
        self.conv2 = nn.Conv2d(16, 32, kernel_size=4, stride=2)
        self.pool = nn.MaxPool2d(kernel_size=2, stride=1)
        # Larger images are averaged down to the 4 x 4 map that 28 x 28 images end with.
        self.resize: nn.Module = nn.Identity()
        with torch.no_grad():
            side = self.convolve(torch.zeros(1, *input_shape)).shape[2:]
        if max(side) > 4:
            self.resize, side = nn.AdaptiveAvgPool2d(4), torch.Size((4, 4))
        self.hidden = nn.Linear(32 * side[0] * side[1], 32)
        self.head = nn.Linear(32, num_classes)

    def convolve(self, x_BCHW: Tensor) -> Tensor:
        """The convolutional part: [B, C, H, W] -> [B, 32, h, w]."""
        h = self.pool(torch.tanh(self.conv1(x_BCHW)))
        h = self.pool(torch.tanh(self.conv2(h)))
        resized: Tensor = self.resize(h)
        return resized

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, C, H, W]."""
        h = torch.tanh(self.hidden(self.convolve(x_BCHW).flatten(1)))
        logits: Tensor = self.head(h)
        return logits


def tanh_cnn(input_shape: Shape, num_classes: int) -> nn.Module:
    """The convolutional network of the `mnist` recipe; see `TanhCNN`."""
    return TanhCNN(input_shape, num_classes)


def linear(input_shape: Shape, num_classes: int) -> nn.Module:
    """Multinomial logistic regression, starting at zero.

    Example:
        >>> linear((432,), 10)(torch.ones(2, 432)).abs().sum().item()
        0.0
    """
    head = nn.Linear(math.prod(input_shape), num_classes)
    # The problem is convex, so a random start is only noise on top of the noise.
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return nn.Sequential(nn.Flatten(), head)


def mlp(input_shape: Shape, num_classes: int) -> nn.Module:
    """One hidden layer of 64 tanh units.

    Example:
        >>> mlp((3,), 2)(torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """
    return nn.Sequential(
        nn.Flatten(), nn.Linear(math.prod(input_shape), 64), nn.Tanh(), nn.Linear(64, num_classes)
    )


BUILT_IN: Mapping[str, Factory] = {
    "cnn": tanh_cnn,
    "mlp": mlp,
    "linear": linear,
    "wrn-16-4": WideResNet,
    # a recipe's name stands for that recipe's network
    "mnist": tanh_cnn,
    "mnist-features": linear,
}


def build_model(
    name: str, input_shape: Shape, num_classes: int, *, pretrained: bool = False
) -> nn.Module:
    """Build the model that `name` stands for.

    Args:
        name: a built-in name (`cnn`, `mlp`, `linear`, `wrn-16-4`, or a recipe's),
            `torchvision:resnet18`, `timm:vit_tiny_patch16_224`, whose BatchNorm becomes GroupNorm
            (`dptorch.prepare`), or `package.module:factory`. A factory is any callable
            that returns an `nn.Module`; it is given `input_shape` and `num_classes` if it has
            parameters of those names, and nothing otherwise. A module in the current directory
            is found.
        input_shape: shape of one input, without the batch.
        num_classes: number of logits.
        pretrained: for torchvision and timm, load their published weights (a download).

    Raises:
        ConfigurationError: unknown name, missing package, or a factory that returns something else.

    Example:
        >>> sum(p.numel() for p in build_model("mnist", (1, 28, 28), 10).parameters())
        26010
    """
    source, colon, rest = name.partition(":")
    if not colon:
        one_of("model", name, BUILT_IN)
    if pretrained and source not in ("torchvision", "timm"):
        raise ConfigurationError(
            f"--pretrained goes with torchvision: and timm: models, but {name!r} has no published "
            f"weights here. Load your own in a factory: --model package.module:factory."
        )
    with _float32():
        if not colon:
            return BUILT_IN[name](input_shape, num_classes)
        if source == "torchvision":
            return prepare(_torchvision_model(rest, num_classes, pretrained), report=None)
        if source == "timm":
            return prepare(_timm_model(rest, input_shape, num_classes, pretrained), report=None)
        return _imported_model(source, rest, input_shape, num_classes)


@contextmanager
def _float32() -> Iterator[None]:
    """Models are made in float32, which all inputs are, whatever the program's default is."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _optional(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigurationError(
            f"--model {package}:... needs the package {package}, which cannot be imported "
            f"({error}). Install it with: pip install 'dptorch[vision]'."
        ) from error
    except RuntimeError as error:  # a torchvision built for another torch fails this way
        raise ConfigurationError(
            f"{package} cannot be loaded: the installed torchvision does not fit this torch "
            f"({error}). Install the torchvision build that belongs to torch {torch.__version__}."
        ) from error


def _torchvision_model(name: str, num_classes: int, pretrained: bool) -> nn.Module:
    models = _optional("torchvision").models
    one_of("model", name, models.list_models())
    if not pretrained:
        model: nn.Module = models.get_model(name, weights=None, num_classes=num_classes)
        return model
    model = models.get_model(name, weights="DEFAULT")
    # torchvision's classifiers end in one Linear, under a name that varies.
    heads = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not heads:
        raise ConfigurationError(
            f"--pretrained torchvision:{name} has no final Linear to replace for {num_classes} "
            f"classes. Write a factory that does: --model package.module:factory."
        )
    parent, _, attribute = heads[-1].rpartition(".")
    old = model.get_submodule(heads[-1])
    assert isinstance(old, nn.Linear)
    setattr(model.get_submodule(parent), attribute, nn.Linear(old.in_features, num_classes))
    return model


def _timm_model(name: str, input_shape: Shape, num_classes: int, pretrained: bool) -> nn.Module:
    timm = _optional("timm")
    if not timm.is_model(name):
        one_of("model", name, timm.list_models())
    settings = {"pretrained": pretrained, "num_classes": num_classes, "in_chans": input_shape[0]}
    about = timm.get_pretrained_cfg(name)  # none of an old name
    model: nn.Module
    if about is None or about.input_size[-1] != input_shape[-1]:
        try:  # transformers are made for one size, which can be another than the published one
            model = timm.create_model(name, img_size=input_shape[-1], **settings)
            return model
        except TypeError as error:
            if "img_size" not in str(error):
                raise
    model = timm.create_model(name, **settings)
    return model


def _imported_model(module: str, attribute: str, input_shape: Shape, num_classes: int) -> nn.Module:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        factory: Any = importlib.import_module(module)
        for part in attribute.split("."):
            factory = getattr(factory, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(
            f"--model {module}:{attribute} cannot be imported: {error}. Expected "
            f"package.module:factory, importable from here ({os.getcwd()})."
        ) from error
    if not callable(factory):
        raise ConfigurationError(
            f"--model {module}:{attribute} is a {type(factory).__name__}. Expected a function or "
            f"an nn.Module class."
        )
    offered = {"input_shape": input_shape, "num_classes": num_classes}
    try:
        signature = inspect.signature(factory)
        given = {k: v for k, v in offered.items() if k in signature.parameters}
        signature.bind(**given)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"--model {module}:{attribute} cannot be called ({error}). It is given input_shape and "
            f"num_classes, if it takes them, and nothing else."
        ) from error
    model = factory(**given)
    if not isinstance(model, nn.Module):
        raise ConfigurationError(
            f"--model {module}:{attribute} returned a {type(model).__name__}. Expected an "
            f"nn.Module."
        )
    return model
