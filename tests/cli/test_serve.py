"""`dptorch serve` as a user types it; what it serves is tested with the application."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.commands import refused, run
from tests.prediction.serving.setup import make_run, row, service_of

from dptorch.prediction.serving.keys import client_of, read_keys


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("serve"))


def test_a_key_is_made_and_shown_once(shards: Path) -> None:
    result = run("serve", str(shards), "--new-key", "clinic")
    assert result.exit_code == 0, result.output
    key = result.output.split()[-1]
    assert client_of(read_keys(shards / "api_keys.json"), key) == "clinic"
    assert "cannot be shown again" in refused(run("serve", str(shards), "--new-key", "clinic"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "Give the budget of all answers"),
        (("--budget", "8"), "must be epsilon and delta"),
        (("--budget", "-1,1e-5"), "epsilon=-1.0"),
        (("--budget", "inf,1e-5"), "epsilon=inf"),
        (("--budget", "nan,1e-5"), "epsilon=nan"),
        (("--budget", "8,1"), "delta=1.0"),
        (("--budget", "8,1e-5", "--queries", "0"), "queries 0"),
        (("--budget", "8,1e-5", "--mechanism", "gnmx"), "Did you mean 'gnmax'"),
        (("--budget", "8,1e-5", "--rate", "often"), "rate 'often'"),
        (("--budget", "8,1e-5", "--keys", "none.json"), "--new-key"),
        (("--budget", "8,1e-5", "--ledger", "mysql://a/b"), "not understood"),
    ],
)
def test_what_cannot_be_served_is_refused(
    shards: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    pytest.importorskip("fastapi", reason="FastAPI has left Python 3.10")
    if not (shards / "api_keys.json").exists():
        assert run("serve", str(shards), "--new-key", "someone").exit_code == 0
    ledger = () if "--ledger" in options else ("--ledger", str(tmp_path / "ledger.db"))
    assert message in refused(run("serve", str(shards), *ledger, *options))


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    assert "is not the folder of a run" in refused(run("serve", str(tmp_path)))


def test_the_ledgers_commands_know_answers(shards: Path, tmp_path: Path) -> None:
    location = str(tmp_path / "ledger.db")
    for mechanism, clip in (("gnmax", None), ("laplace", 1.0)):
        service = service_of(shards, location, mechanism=mechanism, clip=clip, name=mechanism)
        service.answer([row(1), row(2)])
    shown = run("ledger", "show", "--json", "--ledger", location)
    assert [each["steps"] for each in json.loads(shown.output)] == [2, 2]
    table = run("ledger", "show", "--ledger", location)
    assert table.output.count("answers") == 2
    total = json.loads(run("ledger", "total", "--json", "--ledger", location).output)
    assert total[0]["steps"] == 4
    assert 0 < total[0]["planned"] < total[0]["committed"]
    assert run("ledger", "close", "laplace", "--ledger", location).exit_code == 0
    assert run("ledger", "verify", "--ledger", location).exit_code == 0
