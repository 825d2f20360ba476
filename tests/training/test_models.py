"""What `--model` may name, and what it says when it may not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dptorch.errors import ConfigurationError
from dptorch.training.models import BUILT_IN, build_model


@pytest.mark.parametrize("name", sorted(BUILT_IN))
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 40), (3, 64, 64)])
def test_built_in_models_give_logits(name: str, shape: tuple[int, ...]) -> None:
    logits = build_model(name, shape, 7)(torch.randn(2, *shape))
    assert logits.shape == (2, 7)


def test_the_network_is_no_larger_for_larger_images() -> None:
    def size(side: int) -> int:
        return sum(p.numel() for p in build_model("cnn", (1, side, side), 10).parameters())

    assert size(28) == size(56)


def test_a_convolutional_network_needs_images() -> None:
    with pytest.raises(ConfigurationError, match=r"shape \(12,\).*--model mlp"):
        build_model("cnn", (12,), 2)


def test_unknown_names_are_listed() -> None:
    with pytest.raises(ConfigurationError, match=r"model='cn'.*'cnn', 'mlp', 'linear'"):
        build_model("cn", (1, 28, 28), 2)


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\n"
        "def plain():\n    return nn.Linear(3, 2)\n"
        "def shaped(input_shape, num_classes, width=4):\n"
        "    return nn.Sequential(nn.Linear(input_shape[0], width), nn.Linear(width, num_classes))\n"
        "class Net(nn.Linear):\n"
        "    def __init__(self, num_classes):\n        super().__init__(3, num_classes)\n"
        "def wrong():\n    return 5\n"
        "number = 5\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_nets", raising=False)
    return "my_nets"


@pytest.mark.parametrize(("name", "classes"), [("plain", 2), ("shaped", 5), ("Net", 5)])
def test_a_factory_by_import_path(factories: str, name: str, classes: int) -> None:
    model = build_model(f"{factories}:{name}", (3,), 5)
    assert isinstance(model, nn.Module)
    assert model(torch.zeros(1, 3)).shape == (1, classes)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "cannot be imported"),
        ("wrong", "returned a int. Expected an nn.Module"),
        ("number", "is a int. Expected a function"),
    ],
)
def test_a_factory_that_is_none(factories: str, name: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build_model(f"{factories}:{name}", (3,), 5)


def test_a_module_that_is_not_there() -> None:
    with pytest.raises(ConfigurationError, match=r"no_such_package:net cannot be imported"):
        build_model("no_such_package:net", (3,), 5)


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_a_missing_package_says_how_to_install_it(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigurationError, match=r"pip install 'dptorch\[vision\]'"):
        build_model(f"{package}:resnet18", (3, 32, 32), 10)


def test_pretrained_needs_a_package_that_has_weights() -> None:
    with pytest.raises(ConfigurationError, match="--pretrained goes with torchvision: and timm:"):
        build_model("cnn", (1, 28, 28), 10, pretrained=True)


def test_a_torchvision_for_another_torch_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator nms does not exist')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(ConfigurationError, match=r"does not fit this torch \(operator nms"):
        build_model("timm:resnet18", (3, 32, 32), 10)


@pytest.mark.slow
def test_a_transformer_is_made_for_the_size_of_the_pictures() -> None:
    """It would refuse any other; a convolutional network takes what comes."""
    pytest.importorskip("timm")
    for name in ("test_vit", "test_resnet"):
        model = build_model(f"timm:{name}", (3, 32, 32), 4)
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 4)
