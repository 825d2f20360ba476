"""`dptorch train vision` as a user types it, and the blocks of its page."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from dptorch.cli import train_options, vision_options
from dptorch.vision.formats import FORMATS, LAYOUTS
from dptorch.vision.job import VisionJob
from dptorch.vision.methods import METHODS
from dptorch.vision.recipes import RECIPES
from tests.cli.commands import run
from tests.source import REPOSITORY
from tests.vision.files import write_cifar10

PAGE = (REPOSITORY / "docs" / "vision.md").read_text()


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")


def test_options_are_the_fields_of_a_job() -> None:
    groups = (
        vision_options.VisionDataOptions,
        vision_options.VisionModelOptions,
        vision_options.MethodOptions,
        vision_options.OptimizerOptions,
        vision_options.VisionTrainingOptions,
        vision_options.AccuracyOptions,
        train_options.PrivacyOptions,
    )
    names = [f.name for group in groups for f in fields(group)]
    assert len(names) == len(set(names))
    assert {*names, "task", "diagnostics"} == {f.name for f in fields(VisionJob)}


def test_the_page_has_every_choice() -> None:
    assert {f.name for f in FORMATS} == set(LAYOUTS)
    for name in (*LAYOUTS, *METHODS, *RECIPES):
        assert f"`{name}`" in PAGE
    for recipe in RECIPES.values():
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{recipe.name}`"))
        for epsilon, accuracy in recipe.published:
            assert f"{epsilon:g}" in row.split("|")[3]
            assert re.search(rf"\b{accuracy:g}(\.0)? %", row)


@pytest.mark.slow
def test_the_blocks_of_the_page_run() -> None:
    scope: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    for block in blocks:
        exec(compile(block, "vision.md", "exec"), scope)
    assert scope["engine"].steps_done == 4
    assert scope["predictions"].shape == (64,)


@pytest.mark.slow
def test_from_files_to_a_report_and_a_release() -> None:
    write_cifar10(Path("data"))
    quick = ("--epochs", "1", "--sample-rate", "0.5", "--noise-multiplier", "2")
    done = run("train", "vision", "--data", "data", "--augment", "flip", *quick)
    assert done.exit_code == 0, done.output
    assert "100 to train, 40 to test: cifar10 pictures in data" in done.output
    assert re.search(r"Done: test accuracy 0\.\d+ at epsilon", done.output)
    record = json.loads(Path("runs/data-1/run.json").read_text())
    assert record["ledger"]
    released = run("release", "runs/data-1", "published")
    assert released.exit_code == 0, released.output
    public = json.loads(Path("published/run.json").read_text())
    assert public["job"]["augment"] == "flip"
    assert not {"pictures", "confusion", "groups"} & public.keys()
    assert "data:image/png" not in Path("published/report.html").read_text()


@pytest.mark.slow
def test_a_run_without_privacy_is_in_no_ledger() -> None:
    write_cifar10(Path("data"))
    done = run(
        "train", "vision", "--data", "data", "--clipping-mode", "non-private", "--epochs", "1"
    )
    assert done.exit_code == 0, done.output
    assert "at epsilon inf" in done.output
    assert not Path("runs/ledger.db").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--data is missing"),
        (("--data", "nothing"), "nothing: no image data set there. Expected in that folder"),
        (("--data", "."), "no image data set there"),
        (("--data", ".", "--recipe", "cifar10"), "cifar10-wrn-16-4"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(
    arguments: tuple[str, ...], message: str
) -> None:
    result = run("train", "vision", *arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert message in result.stderr
    assert not Path("runs").exists()
