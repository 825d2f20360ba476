"""`dptorch --version`, `dptorch epsilon`, `dptorch calibrate`, `dptorch plan`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dptorch import __version__
from dptorch.accounting import Workload
from dptorch.accounting.toeplitz import coefficients_of
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


RUN = ("--sample-rate", "0.05", "--steps", "100", "--delta", "1e-5")


def test_samplers_and_adjacency_change_the_number() -> None:
    noise = ("--noise-multiplier", "2", "--delta", "1e-5")
    sizes = ("--batch-size", "50", "--sample-size", "1000", "--epochs", "2")
    costs = {}
    for sampling in ("poisson", "random-allocation", "shuffled"):
        code, out, err = run("epsilon", *noise, *sizes, "--sampling", sampling)
        assert code == 0, err
        costs[sampling] = number(out)
    assert costs["random-allocation"] < costs["poisson"] < costs["shuffled"]
    assert (
        number(run("epsilon", *noise, *sizes, "--adjacency", "replace-one")[1]) > costs["poisson"]
    )


@pytest.mark.slow
def test_the_discrete_mechanism_is_planned_with_its_own_accountant(tmp_path: Path) -> None:
    own = ("--sample-rate", "0.01", "--steps", "100", "--delta", "1e-5")
    discrete = (*own, "--mechanism", "discrete_gaussian", "--accountant", "rdp")
    plot = tmp_path / "curve.png"
    code, out, _ = run("calibrate", "--epsilon", "1", *discrete, "--plot", str(plot))
    assert code == 0
    assert plot.stat().st_size > 1000
    code, again, _ = run("epsilon", "--noise-multiplier", str(number(out)), *discrete)
    assert code == 0
    assert 0.99 < number(again) <= 1.0
    code, _, err = run("epsilon", "--noise-multiplier", "1", *own, "--mechanism", "discrete")
    assert code == 2
    assert "Did you mean 'discrete_gaussian'?" in err


def test_tuning_is_paid_for() -> None:
    code, out, _ = run("epsilon", "--noise-multiplier", "2", *RUN, "--runs", "10")
    one, tuned = (number(line) for line in out.strip().splitlines())
    assert code == 0
    assert one < tuned
    found = json.loads(run("epsilon", "--noise-multiplier", "2", *RUN, "--runs", "10", "--json")[1])
    assert found["epsilon"] <= one
    assert found["epsilon_with_tuning"] == pytest.approx(tuned, abs=1e-4)


@pytest.mark.slow
def test_calibrate_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "eps.svg"
    code, out, _ = run("calibrate", "--epsilon", "2", *RUN, "--plot", str(picture))
    assert code == 0
    assert str(picture) in out.replace("\n", "")
    svg = picture.read_text()
    assert svg.count('id="line2d_') > 5


@pytest.mark.parametrize("name", ["eps.txt", "missing/eps.png"])
def test_a_plot_that_cannot_be_written_is_refused_at_once(tmp_path: Path, name: str) -> None:
    code, out, err = run("calibrate", "--epsilon", "2", *RUN, "--plot", str(tmp_path / name))
    assert (code, out) == (2, "")
    assert "--plot" in err


def test_plan_shows_the_best_first() -> None:
    asked = ("--sample-size", "60000", "--epsilon", "3", "--hours", "1")
    machine = ("--examples-per-second", "300", "--bytes-per-example", "1e6")
    sizes = ("--batch-size", "256", "--batch-size", "1024")
    code, out, err = run("plan", *asked, *machine, *sizes)
    assert code == 0, err
    assert out.index("1,024") < out.index("256")
    assert "GiB" in out
    found = json.loads(run("plan", *asked, *machine, *sizes, "--json")[1])
    best = found["choices"][0]
    assert (best["batch_size"], best["steps"]) == (1024, 1054)
    assert best["hours"] == pytest.approx(1.0, abs=1e-3)
    assert found["delta"] == 1e-6


NOISE = ("plan", "--sample-size", "320", "--batch-size", "20", "--epochs", "4", "--epsilon", "4")


@pytest.mark.slow
def test_plan_says_what_bands_and_mechanisms_give(tmp_path: Path) -> None:
    code, out, err = run(*NOISE, "--mechanism", "banded")
    assert code == 0, err
    assert [line.split()[1] for line in out.splitlines() if "%" in line] == [
        "1",
        "2",
        "4",
        "8",
        "16",
    ]
    found = json.loads(run(*NOISE, "--mechanism", "banded", "--bands", "4", "--json")[1])
    assert list(found["choices"]) == ["1", "4"]
    assert found["best"] == "4"
    plot = tmp_path / "noise.svg"
    code, out, err = run(*NOISE, "--mechanism", "all", "--plot", str(plot))
    assert code == 0, err
    assert plot.stat().st_size > 1000
    for mechanism in ("gaussian", "banded", "inverse-banded", "buffered-toeplitz"):
        assert mechanism in out
    sgd = ("--coefficients", "sgd", "--momentum", "0.9", "--decay", "linear", "--bands", "4")
    steered = json.loads(run(*NOISE, "--mechanism", "banded", *sgd, "--json")[1])["choices"]["4"]
    workload = Workload(0.9, tuple(1 - t / 64 for t in range(64)))
    assert steered["coefficients"] == coefficients_of(4, 64, workload).tolist()
    assert steered["coefficients"] != found["choices"]["4"]["coefficients"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*NOISE, "--mechanism", "band"), "Did you mean 'banded'"),
        ((*NOISE, "--mechanism", "banded", "--bands", "many"), "--bands 'many'"),
        ((*NOISE, "--mechanism", "banded", "--bands", "17"), "at most 16 groups"),
        (
            (*NOISE, "--mechanism", "banded", "--plot", "x.png"),
            "--plot 'x.png' is for",
        ),
        ((*NOISE, "--mechanism", "banded", "--momentum", "0.9"), "--momentum 0.9 and"),
        ((*NOISE, "--mechanism", "all", "--coefficients", "sgd"), "--coefficients 'sgd' is for"),
        ((*NOISE, "--mechanism", "all", "--batch-size", "40"), "--batch-size [20, 40]"),
        ((*NOISE[:5], *NOISE[7:], "--mechanism", "all"), "--epochs (not given)"),
        (
            ("epsilon", "--noise-multiplier", "1", "--sample-rate", "7", *RUN[2:]),
            "--sample-rate 7.0",
        ),
        (("epsilon", "--noise-multiplier", "1", *RUN[:4]), "--delta is missing"),
        (("calibrate", "--epsilon", "-1", *RUN), "--epsilon -1.0"),
        (("calibrate", "--epsilon", "1", *RUN, "--accountant", "exat"), "--accountant 'exat'"),
        (("plan", "--sample-size", "10", "--epsilon", "1"), "--epochs (not given)"),
        (
            ("plan", "--sample-size", "1000", "--epsilon", "1", "--hours", "1"),
            "--examples-per-second",
        ),
        (("plan", "--sample-size", "0", "--epsilon", "1", "--steps", "9"), "--sample-size 0"),
    ],
)
def test_errors_speak_of_flags(arguments: tuple[str, ...], words: str) -> None:
    code, _, err = run(*arguments)
    assert code == 2
    assert words in err
    assert not re.search(r"[a-z]+_[a-z_]+=", err), "no Python argument is named"


def test_help_teaches() -> None:
    for command in ("epsilon", "calibrate", "plan"):
        code, out, _ = run(command, "--help")
        assert code == 0
        assert "Examples" in out


@pytest.mark.slow
def test_no_help_shows_a_python_type_for_a_switch() -> None:
    commands = [(), *((name,) for name in _names()), *(("ledger", n) for n in _names("ledger"))]
    assert ("ledger", "show") in commands
    for command in commands:
        code, out, _ = run(*command, "--help")
        assert code == 0, command
        assert "--help" in out
        assert "bool>" not in out.lower(), command


def _names(*group: str) -> list[str]:
    """The commands that a group's help lists."""
    _, out, _ = run(*group, "--help")
    panels = out[out.index("--help") :]
    return re.findall(r"^│ ([a-z]+)\s", panels, re.MULTILINE)
