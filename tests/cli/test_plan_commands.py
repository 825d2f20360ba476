"""`dptorch --version`, `dptorch epsilon`, `dptorch calibrate`."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from dptorch import __version__
from dptorch.cli.app import app


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stdout, result.stderr


def number(text: str) -> float:
    match = re.search(r"(epsilon|multiplier) ([\d.]+)", text)
    assert match is not None
    return float(match.group(2))


def test_version() -> None:
    assert run("--version") == (0, f"dptorch {__version__}\n", "")


def test_calibrate_and_epsilon_undo_each_other() -> None:
    sampling = ("--sample-rate", "0.1", "--steps", "20", "--delta", "1e-5")
    code, out, _ = run("calibrate", "--epsilon", "2", *sampling)
    assert code == 0
    sigma = number(out)
    code, out, _ = run("epsilon", "--noise-multiplier", str(sigma), *sampling)
    assert code == 0
    assert 1.99 < number(out) <= 2.0


def test_numbers_of_examples_instead_of_a_rate() -> None:
    noise = ("--noise-multiplier", "1.5", "--delta", "1e-5")
    by_rate = run("epsilon", *noise, "--sample-rate", "0.25", "--steps", "8")
    by_size = run("epsilon", *noise, "--batch-size", "50", "--sample-size", "200", "--epochs", "2")
    assert by_rate == by_size
    assert by_rate[0] == 0


def test_json_is_json() -> None:
    arguments = ("--sample-rate", "0.5", "--steps", "3", "--delta", "1e-5", "--json")
    spent = json.loads(run("epsilon", "--noise-multiplier", "2", *arguments)[1])
    assert spent["plan"]["noise_multiplier"] == 2.0
    plan = json.loads(run("calibrate", "--epsilon", "5", *arguments)[1])
    assert plan["target_epsilon"] == 5.0


@pytest.mark.parametrize(
    "arguments",
    [
        ("epsilon", "--noise-multiplier", "1", "--steps", "3", "--delta", "1e-5"),
        ("epsilon", "--noise-multiplier", "1", "--sample-rate", "0.1", "--steps", "3"),
        (
            "epsilon",
            "--noise-multiplier",
            "1",
            "--sample-rate",
            "7",
            "--steps",
            "3",
            "--delta",
            "1e-5",
        ),
        ("calibrate", "--epsilon", "-1", "--sample-rate", "0.1", "--steps", "3", "--delta", "1e-5"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...]) -> None:
    code, _, err = run(*arguments)
    assert code == 2
    assert err.startswith("Error: ")
    assert len(err.strip().splitlines()) == 1
