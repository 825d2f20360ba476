"""The CIFAR-10 tutorial for Opacus 0.x to its end; `documents/opacus_cifar10.py` is its code.

The stand-in for CIFAR-10 has its files and their format, and fewer images: 640 and 256, bright or dark
by class in each colour. DPTORCH_ALL_EPOCHS=1 runs all twenty epochs, in minutes; otherwise two are run.
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
    write_cifar(tmp_path / "cifar10", "CIFAR10", monkeypatch, train=640, test=256)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def plain_accuracy(found: dict[str, Any], epochs: int) -> float:
    """Test accuracy of the same network without privacy: the other row of the tutorial's table."""
    from torchvision import models

    from dptorch import prepare

    torch.manual_seed(0)
    model = prepare(models.resnet18(num_classes=10), report=None)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=found["LR"])
    loader = torch.utils.data.DataLoader(found["train_dataset"], batch_size=128, shuffle=True)
    for _ in range(epochs):
        for images, target in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), target).backward()
            optimizer.step()
    return float(found["test"](model, found["test_loader"], "cpu"))


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
    private, plain = found["top1_acc"], plain_accuracy(found, epochs=1)
    with capsys.disabled():
        print("\n  Model          Top-1 %   epsilon")
        print(f"  private        {100 * private:7.2f}   {spent:7.2f}")
        print(f"  not private    {100 * plain:7.2f}       inf")
    assert 0 <= private <= 1
    assert 0 <= plain <= 1
