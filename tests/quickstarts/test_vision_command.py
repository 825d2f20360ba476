"""The command of `dptorch.compat.private_vision` with every flag of its document, on CIFAR's files."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from tests.vision.files import write_cifar10, write_cifar100
from torch import nn

from dptorch.compat.private_vision import __main__ as vision
from dptorch.training.models import build_model

pytestmark = pytest.mark.slow

SMALL = "--image_size 32 --seed 1 --model test_resnet --pretrained 0 --bs 50 --mini_bs 25"


def run(line: str) -> int:
    with pytest.raises(SystemExit) as ended:
        vision.main(shlex.split(line))
    return int(ended.value.code or 0)


def record(name: str) -> dict[str, Any]:
    """What the run of that name says of itself."""
    found: dict[str, Any] = json.loads(Path("runs", name, "run.json").read_text())
    return found


@pytest.fixture(autouse=True)
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar10(tmp_path / "data")
    write_cifar100(tmp_path / "data")
    monkeypatch.chdir(tmp_path)


def test_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    line = (
        "--lr 0.002 --epochs 2 --model test_resnet --cifar_data CIFAR10 --eps 4 --grad_norm 0.2 "
        "--bs 50 --mini_bs 25 --pretrained 0 --mode ghost"
    )
    assert run(f"{line} --image_size 32 --seed 1") == 0
    out = capsys.readouterr().out
    assert "x clipping norm 0.2, 4 steps of about 50 examples" in out
    assert "ε at most 4, δ 1e-05" in out
    job, result = record("cifar10-1")["job"], record("cifar10-1")["result"]
    assert 3.96 < result["epsilon"] <= 4
    expected = {
        "learning_rate": 0.002, "optimizer": "adam", "clipping_mode": "ghost", "scale": "half",
        "max_physical_batch_size": 25, "model": "timm:test_resnet", "pretrained": False,
        "target_delta": 1e-5, "clipping_style": "all-layer", "method": "full", "views": 1,
    }  # fmt: skip
    assert {name: job[name] for name in expected} == expected


def test_our_options_are_there_too() -> None:
    ours = (
        "--clipping-style layer-wise --clipping-fn automatic --optimizer adamw --weight-decay 0.01 "
        "--decay cosine --method bias-only --augment flip-crop --views 2 --ema 0.9 --low-pass 0.5 "
        "--name ours --no-ledger"
    )
    assert run(f"{SMALL} {ours}") == 0
    job = record("ours")["job"]
    expected = {
        "clipping_style": "layer-wise", "clipping_fn": "automatic", "optimizer": "adamw",
        "weight_decay": 0.01, "decay": "cosine", "method": "bias-only", "augment": "flip-crop",
        "views": 2, "ema": 0.9, "low_pass": 0.5, "clipping_mode": "ghost_mixed",
    }  # fmt: skip
    assert {name: job[name] for name in expected} == expected
    about = record("ours")["model"]
    assert about["trainable_parameters"] < about["parameters"] / 10


def test_cifar100_without_privacy(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"{SMALL} --cifar_data CIFAR100 -gn 1 --mode non-private") == 0
    printed = capsys.readouterr()
    assert "at epsilon inf" in printed.out
    assert "neither clipped nor noised" in printed.err
    assert record("cifar100-1")["data"]["classes"][:2] == ["0", "1"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--mode ghost-mixed", "Did you mean 'ghost_mixed'"),
        ("--cifar_data cifar10", "'CIFAR10'"),
        ("--model resnet_18", "Did you mean 'resnet18'"),
        ("--model torchvision:resnet_18", "Did you mean 'resnet18'"),
        ("--pretrained maybe", "is not known"),
        ("--bs 1000", "--bs 1000"),
    ],
)
def test_mistakes(wrong: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"{SMALL} {wrong}") == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not Path("runs").exists()


def test_nothing_is_downloaded_unasked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without its files the layout is shown; what torchvision fetches goes into the folder."""
    datasets = pytest.importorskip("torchvision.datasets")
    fetched: list[tuple[str, bool]] = []

    def fetch(root: str, *, download: bool) -> None:
        fetched.append((root, download))
        write_cifar10(Path(root))

    monkeypatch.setattr(datasets, "CIFAR10", fetch)
    line = f"{SMALL} --data empty --eps 8"
    assert run(line) == 2
    said = capsys.readouterr().err
    assert "cifar-10-batches-py/ with data_batch_1" in said
    assert "--download lets torchvision fetch cifar10." in said
    assert not fetched
    for _ in range(2):  # the second finds them there
        assert run(f"{line} --download") == 0
    assert fetched == [("empty", True)]


def test_processes_run_this_command(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr(
        "torch.distributed.launcher.api.elastic_launch", lambda *_: lambda *how: started.append(how)
    )
    assert run(f"{SMALL} --nproc 2 --device cpu") == 0
    ((flag, code, *words),) = started
    assert (flag, words) == ("-c", shlex.split(f"{SMALL} --nproc 2 --device cpu"))
    assert "dptorch.compat.private_vision" in code


def test_defaults_are_the_documents() -> None:
    assert vision.CifarOptions() == vision.CifarOptions(
        learning_rate=0.001, epochs=1, model="resnet18", cifar_data="CIFAR10", target_epsilon=2.0,
        max_grad_norm=0.1, batch_size=1000, max_physical_batch_size=50, pretrained="1",
    )  # fmt: skip
    assert vision.MODES[0] == "ghost_mixed"


@pytest.mark.parametrize(
    "old", ["gluon_resnet18_v1b", "tv_resnet152", "jx_nest_base", "densenet121"]
)
def test_old_names_of_timm_are_known(old: str) -> None:
    """At another size than they were published for, too."""
    import torch

    with torch.device("meta"):
        model = build_model(f"timm:{old}", (3, 64, 64), 10)
        assert isinstance(model, nn.Module)
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 10)
