"""Programs in examples/ run to their end and spend what they say."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest
import torch
from tests.source import REPOSITORY

FOLDER = REPOSITORY / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["accelerate_loop", "lightning_loop"])
def test_loops_of_other_libraries_learn_within_their_budget(name: str) -> None:
    torch.manual_seed(0)
    accuracy, epsilon = load(name).train(epochs=3)
    assert accuracy > 0.4  # chance is 0.1
    assert 2.9 < epsilon <= 3.0


@pytest.mark.slow
def test_a_gan_with_a_private_discriminator_runs(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    module = load("gan")
    before = [p.clone() for p in module.train(epochs=1, size=128)[0].parameters()]
    torch.manual_seed(0)
    generator, epsilon = module.train(epochs=3, size=128)
    assert 7.9 < epsilon <= 8.0
    assert all(not torch.equal(a, b) for a, b in zip(before, generator.parameters(), strict=True))
    assert "6 steps: poisson" in capsys.readouterr().out


def test_every_folder_says_what_is_in_it() -> None:
    inside = (path for path in FOLDER.iterdir() if path.is_dir() and path.name != "__pycache__")
    for folder in (FOLDER, *inside):
        said = (folder / "README.md").read_text()
        files = (p.name for p in folder.iterdir() if p.suffix in (".py", ".yaml", ".ipynb"))
        assert [name for name in files if f"]({name})" not in said] == []


def test_configurations_of_accelerate_are_those_of_their_names() -> None:
    """`tests/distributed/test_launch.py` launches them."""
    from accelerate.commands.config.config_args import load_config_from_file

    found = {p.stem: load_config_from_file(str(p)) for p in (FOLDER / "accelerate").glob("*.yaml")}
    assert set(found) == {"ddp", "fsdp2", "zero2", "zero3"}
    assert {each.num_processes for each in found.values()} == {2}
    assert found["fsdp2"].fsdp_config["fsdp_version"] == 2
    assert [found[f"zero{i}"].deepspeed_config["zero_stage"] for i in (2, 3)] == [2, 3]
