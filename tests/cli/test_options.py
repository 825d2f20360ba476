"""Options: each plan setting is spelled once, groups fill what they name, and help loads little."""

import inspect
import os
import subprocess
import sys
from dataclasses import fields

import pytest

from dptorch.cli import options, train_options
from dptorch.cli.calibrate import calibrate
from dptorch.cli.epsilon import epsilon
from dptorch.cli.train import train
from dptorch.plan import PlanSettings
from dptorch.training.data import ReadOptions
from dptorch.training.hyperparameters import SUGGESTED
from dptorch.training.job import Job
from dptorch.training.recipes import RECIPES


def names_of(*groups: type) -> set[str]:
    return {f.name for group in groups for f in fields(group)}


def test_settings_of_a_plan_have_its_names() -> None:
    settings = set(PlanSettings.__annotations__)
    assert set(options._HELP) <= settings
    assert names_of(options.RunOptions) <= settings
    assert names_of(train_options.PrivacyOptions) <= settings


def test_groups_of_train_have_the_names_of_a_job() -> None:
    groups = (
        train_options.ModelOptions,
        train_options.PrivacyOptions,
        train_options.TrainingOptions,
    )
    rest = {"recipe", "data", "reading", "diagnostics"}
    assert names_of(*groups) == {f.name for f in fields(Job)} - rest
    assert names_of(train_options.ReadingOptions) | {"column_bounds"} == names_of(ReadOptions)


def test_commands_have_few_parameters_of_their_own_and_all_options() -> None:
    assert len(inspect.signature(inspect.unwrap(train)).parameters) <= 8
    assert len(inspect.signature(train).parameters) == 48
    assert set(inspect.signature(epsilon).parameters) > names_of(options.RunOptions)
    assert set(inspect.signature(calibrate).parameters) > names_of(options.RunOptions)


def test_a_rate_alone_needs_no_batch_size() -> None:
    assert options.RunOptions(sample_rate=0.1).settings(steps=2)["batch_size"] == 1.0
    found = options.RunOptions(sample_rate=0.1, sample_size=50).settings(noise_multiplier=3.0)
    assert (found["batch_size"], found["noise_multiplier"]) == (None, 3.0)


def modules_of(code: str, **environment: str) -> set[str]:
    """The modules that are loaded when `code` is done, in a process of its own."""
    ended = f"{code}\nimport sys; print('MODULES', *sys.modules)"
    text = subprocess.run(
        [sys.executable, "-c", ended],
        capture_output=True, text=True, check=True, env=os.environ | environment,
    )  # fmt: skip
    return set(text.stdout.partition("MODULES")[2].split())


RUN = (
    "from dptorch.cli.app import app\ntry: app({!r}, prog_name='dptorch')\nexcept SystemExit: pass"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [["--version"], ["--help"], ["train", "--help"], ["ledger", "show", "--help"]]
)
def test_what_needs_no_tensors_loads_no_torch(arguments: list[str]) -> None:
    loaded = modules_of(RUN.format(arguments))
    assert "dptorch.cli.train_options" in loaded
    assert not loaded & {"torch", "numpy", "scipy", "pandas"}


@pytest.mark.slow
def test_completion_loads_no_torch() -> None:
    code = RUN.format([])
    found = {"_DPTORCH_COMPLETE": "complete_bash", "COMP_WORDS": "dptorch tr", "COMP_CWORD": "1"}
    loaded = modules_of(code, **found)
    assert not loaded & {"torch", "numpy"}
    text = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True, env=os.environ | found,
    ).stdout  # fmt: skip
    assert text.split() == ["train"]


def test_recipes_train_with_what_the_help_says() -> None:
    assert {r.name: r.hyperparameters for r in RECIPES.values()} == SUGGESTED


@pytest.mark.slow
@pytest.mark.parametrize("command", [[], ["train"], ["bench"], ["audit"], ["ledger"]])
def test_help_loads_no_room_and_no_optional_package_of_another_command(command: list[str]) -> None:
    code = (
        "import sys, dptorch; before = set(sys.modules)\n"
        "from dptorch.cli.app import app\n"
        f"app({[*command, '--help']!r}, standalone_mode=False)\n"
        "print('MODULES', *set(sys.modules) - before)"
    )
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = text.stdout.partition("MODULES")[2].split()
    rooms = {module.split(".")[1] for module in modules if module.startswith("dptorch.")}
    assert "cli" in rooms
    assert not rooms & {"audit", "bench", "blogs", "compat", "integrations"}
    optional = {
        "jinja2",
        "matplotlib",
        "pandas",
        "PIL",
        "pyarrow",
        "scipy",
        "sklearn",
        "torchvision",
    }
    assert not optional & {module.split(".")[0] for module in modules}
