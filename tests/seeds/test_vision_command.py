"""``python -m dptorch.vision`` with every flag of private_vision's document, on CIFAR's file format."""

import hashlib
import pickle
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tests.oracles.torchvision_on_cpu  # noqa: F401
from torch import nn

from dptorch import vision
from dptorch.training.models import build_model


def cifar_files(root: Path, name: str, patch: pytest.MonkeyPatch, sizes: tuple[int, int]) -> None:
    """A small CIFAR in its own format: images bright or dark by class. The digests that torchvision
    checks become those of these files."""
    from torchvision import datasets

    kind = getattr(datasets, name)
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    key, classes = ("labels", 10) if name == "CIFAR10" else ("fine_labels", 100)

    def write(file: str, content: Any) -> list[str]:
        raw = pickle.dumps(content)
        (folder / file).write_bytes(raw)
        return [file, hashlib.md5(raw).hexdigest()]

    def batch(file: str, size: int) -> list[str]:
        labels = draw.integers(0, classes, size)
        images = draw.integers(0, 60, (size, 3072)) + (labels * 190 // classes)[:, None]
        return write(file, {"data": images.astype(np.uint8), key: labels.tolist()})

    patch.setattr(kind, "train_list", [batch("train", sizes[0])])
    patch.setattr(kind, "test_list", [batch("test", sizes[1])])
    names = {"key": [str(i) for i in range(classes)]}
    file, digest = write("names", names)
    patch.setattr(kind, "meta", {"filename": file, "key": "key", "md5": digest})


def run(line: str) -> int:
    with pytest.raises(SystemExit) as ended:
        vision.main(shlex.split(line))
    return int(ended.value.code or 0)


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    cifar_files(tmp_path, "CIFAR10", monkeypatch, (96, 40))
    cifar_files(tmp_path, "CIFAR100", monkeypatch, (96, 40))
    return f"--data {tmp_path} --workers 0 --image_size 32 --seed 1"


@pytest.mark.parametrize("mode", ["ghost_mixed", "ghost", "non-ghost"])
def test_every_flag(mode: str, cifar: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = (
        "--lr 0.002 --epochs 2 --model resnet10t --cifar_data CIFAR10 --eps 4 --grad_norm 0.2 "
        f"--bs 48 --mini_bs 24 --pretrained 0 --mode {mode} "
    )
    assert run(line + cifar) == 0
    out = capsys.readouterr().out
    assert "x clipping norm 0.2, 4 steps of about 48 examples" in out
    lines = re.findall(r"Epoch: (\d) \| .* accuracy: ([\d.]+) % \| epsilon: ([\d.]+)", out)
    assert [epoch for epoch, _, _ in lines] == ["1", "2"]
    assert float(lines[0][2]) < 3.99 < float(lines[1][2]) + 0.02 <= 4.02
    assert "poisson" in out.lower()


def test_cifar100_without_privacy(cifar: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = (
        "--model resnet10t --cifar_data CIFAR100 -gn 1 --bs 48 --pretrained 0 --mode non-private "
    )
    with pytest.warns(UserWarning, match="neither clipped nor noised"):
        assert run(line + cifar) == 0
    assert "epsilon: inf" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--mode ghost-mixed", "Did you mean 'ghost_mixed'"),
        ("--cifar_data cifar10", "'CIFAR10'"),
        ("--model resnet_18 --pretrained 0", "Did you mean 'resnet18'"),
        ("--pretrained maybe", "is not known"),
    ],
)
def test_mistakes(wrong: str, message: str, cifar: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"{cifar} {wrong}") == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_defaults_are_the_documents() -> None:
    import inspect

    defaults = {n: p.default for n, p in inspect.signature(vision.train_cifar).parameters.items()}
    expected = {
        "lr": 0.001, "epochs": 1, "model": "resnet18", "cifar_data": "CIFAR10", "eps": 2.0,
        "grad_norm": 0.1, "mode": "ghost_mixed", "bs": 1000, "mini_bs": 50, "pretrained": "1",
    }  # fmt: skip
    assert {n: defaults[n] for n in expected} == expected


@pytest.mark.parametrize(
    "old", ["gluon_resnet18_v1b", "tv_resnet152", "jx_nest_base", "densenet121"]
)
def test_old_names_of_timm_are_known(old: str) -> None:
    import torch

    with torch.device("meta"):
        assert isinstance(build_model(f"timm:{old}", (3, 224, 224), 10), nn.Module)
