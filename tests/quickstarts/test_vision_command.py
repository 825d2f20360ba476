"""The command of `dptorch.compat.private_vision` with every flag of its document, on CIFAR's files."""

import re
import shlex
from pathlib import Path

import pytest
from tests.quickstarts.cifar_files import write_cifar
from torch import nn

from dptorch.compat.private_vision import __main__ as vision
from dptorch.training.models import build_model

pytestmark = pytest.mark.slow


def run(line: str) -> int:
    with pytest.raises(SystemExit) as ended:
        vision.main(shlex.split(line))
    return int(ended.value.code or 0)


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in ("CIFAR10", "CIFAR100"):
        write_cifar(tmp_path, name, monkeypatch, train=100, test=40)
    return f"--data {tmp_path} --workers 0 --image_size 32 --seed 1"


@pytest.mark.parametrize("mode", ["ghost_mixed", "ghost", "non-ghost"])
def test_every_flag(mode: str, cifar: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = (
        "--lr 0.002 --epochs 2 --model resnet10t --cifar_data CIFAR10 --eps 4 --grad_norm 0.2 "
        f"--bs 50 --mini_bs 25 --pretrained 0 --mode {mode} "
    )
    assert run(line + cifar) == 0
    out = capsys.readouterr().out
    assert "x clipping norm 0.2, 4 steps of about 50 examples" in out
    lines = re.findall(r"Epoch: (\d) \| .* accuracy: ([\d.]+) % \| epsilon: ([\d.]+)", out)
    assert [epoch for epoch, _, _ in lines] == ["1", "2"]
    assert float(lines[0][2]) < 3.99 < float(lines[1][2]) + 0.02 <= 4.02
    assert "poisson" in out.lower()


def test_cifar100_without_privacy(cifar: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = (
        "--model resnet10t --cifar_data CIFAR100 -gn 1 --bs 50 --pretrained 0 --mode non-private "
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
