"""The CIFAR-10 tutorial for Opacus 0.x to its end; `documents/opacus_cifar10.py` is its code.

The stand-in for CIFAR-10 has its files and their format, and fewer images: 320 and 128, bright or dark
by class in each colour, in batches of half the size. DPTORCH_ALL_EPOCHS=1 runs all twenty epochs, in
minutes; otherwise two are run.
"""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.quickstarts.cifar_files import write_cifar
from torch import nn

from dptorch.compat.opacus0.dp_model_inspector import IncompatibleModuleException

pytestmark = pytest.mark.slow

CODE = Path(__file__).parent / "documents" / "opacus_cifar10.py"


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFAR-10's files under ../cifar10."""
    write_cifar(tmp_path / "cifar10", "CIFAR10", monkeypatch, train=320, test=128)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def plain_row(found: dict[str, Any]) -> tuple[float, int]:
    """(test accuracy, steps) of the row without privacy: what the tutorial trains, as it trains it, but
    without clipping and noise."""
    from torchvision import models

    from dptorch import prepare

    torch.manual_seed(0)
    model = prepare(models.resnet18(num_classes=10), report=None)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=found["LR"])
    parts, steps = found["N_ACCUMULATION_STEPS"], 0
    for _ in range(found["EPOCHS"]):
        for i, (images, target) in enumerate(found["train_loader"], start=1):
            (nn.functional.cross_entropy(model(images), target) / parts).backward()
            if i % parts == 0 or i == len(found["train_loader"]):
                optimizer.step()
                optimizer.zero_grad()
                steps += 1
    return float(found["test"](model, found["test_loader"], "cpu")), steps


@pytest.mark.usefixtures("cifar10")
def test_the_tutorial_runs_to_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    found: dict[str, Any] = {"__name__": "tutorial"}
    torch.manual_seed(0)
    for cell in re.split(r"^# %%", CODE.read_text(), flags=re.MULTILINE)[1:]:
        title, _, code = cell.partition("\n")
        if "raises" in title:
            with pytest.raises(IncompatibleModuleException, match="BatchNorm2d at 'bn1'"):
                exec(compile(code, CODE.name, "exec"), found)
        else:
            exec(compile(code, CODE.name, "exec"), found)
        found |= {"BATCH_SIZE": 64, "VIRTUAL_BATCH_SIZE": 256}
        if "DPTORCH_ALL_EPOCHS" not in os.environ:
            found["EPOCHS"] = 2
    out = capsys.readouterr().out
    engine = found["privacy_engine"]
    assert "Is the model valid? True" in out
    assert f"Using sigma={engine.noise_multiplier} and C=1.2" in out
    # Five batches an epoch: one step of four, and one on the rest.
    assert engine.steps == 2 * found["EPOCHS"]
    spent, alpha = engine.get_privacy_spent(found["DELTA"])
    assert 0.99 * found["EPSILON"] < spent <= found["EPSILON"]
    assert alpha > 1
    printed = [float(e) for e in re.findall(r"\(ε = ([\d.]+), δ = 1e-05\)", out)]
    assert len(printed) == found["EPOCHS"]
    assert printed[0] == 0.0  # before the first step nothing was released
    assert printed == sorted(printed)
    assert printed[-1] < spent
    # Every step was drawn as accounted: none counts as a batch of unknown origin.
    assert {event.sample_rate for event in engine._run.history()} == {0.8}
    assert "Test set:" in out
    private = found["top1_acc"]
    plain, steps = plain_row(found)
    assert steps == engine.steps  # the rows differ in clipping and noise alone
    with capsys.disabled():
        print("\n  Model          Top-1 %   epsilon   of CIFAR-10, published")
        print(f"  private        {100 * private:7.2f}   {spent:7.2f}   61 %; 53 % at epsilon 5")
        print(f"  not private    {100 * plain:7.2f}       inf   76 %")
    assert 0 < private < 1
    assert 0 < plain < 1
