"""`dptorch train --nproc`: the run of one process, on several."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.cli.commands import QUICK, refused, run

import dptorch
from dptorch.ledger import open_ledger
from dptorch.training.run_folder import RunFolder

OWN = ("train", "--data", "points.csv", *QUICK)


def typed(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What the console script does, in a process of its own."""
    package = str(Path(dptorch.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", "from dptorch.cli.app import main; main()", *arguments],
        capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": package},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("python_forks")
def test_two_processes_write_the_run_of_one(data: Path) -> None:
    """The same model up to rounding, the same ε, told once; each release is in the ledger once."""
    assert run(*OWN, "--seed", "0", "--name", "one").exit_code == 0
    done = typed(*OWN, "--seed", "0", "--name", "two", "--nproc", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Done:") == done.stdout.count("Report: ") == 1
    one, two = RunFolder(Path("runs/one")), RunFolder(Path("runs/two"))
    assert {p.name for p in one.path.iterdir()} == {p.name for p in two.path.iterdir()}
    for a, b in zip(one.read_metrics(), two.read_metrics(), strict=True):
        a.pop("seconds"), b.pop("seconds")
        assert a == pytest.approx(b, rel=1e-4)
    weights = [load_file(f.path / "model.safetensors") for f in (one, two)]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-5, atol=1e-6)
    first, second = open_ledger("runs/ledger.db", create=False).runs()
    assert first.steps == second.steps == 8
    assert second.repeated == 0


@pytest.mark.slow
@pytest.mark.usefixtures("python_forks")
def test_an_error_on_several_processes_is_told_once(data: Path) -> None:
    done = typed(*OWN, "--momentum", "7", "--nproc", "2")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line == "Error: --momentum 7.0: expected a number in [0, 1)."
    assert not Path("runs").exists()


def test_a_number_of_processes_that_does_not_fit_is_refused(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "expected a number of processes" in refused(run(*OWN, "--nproc", "0"))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    message = refused(run(*OWN, "--nproc", "5"))
    assert "4 processors" in message
    assert "--nproc 4" in message
    assert "has 0 GPUs" in refused(run(*OWN, "--nproc", "2", "--device", "cuda"))
    assert "--device cuda:1 is one device" in refused(
        run(*OWN, "--nproc", "2", "--device", "cuda:1")
    )
    assert "Leave --nproc out" in refused(run(*OWN, "--nproc", "2", "--shards", "4"))
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    assert "has started 3 processes" in refused(run(*OWN, "--nproc", "2"))
    assert not Path("runs").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("python_forks")
def test_a_fork_of_the_tests_python_is_a_process_of_its_own(tmp_path: Path) -> None:
    """Words, environment, folder, both streams and how it ends, also by a signal, are its own."""
    code = (
        "import os, sys; print(sys.argv[1:], os.environ['OWN'], os.getcwd());"
        "print('aside', file=sys.stderr); {}"
    )
    ends = {"sys.exit(3)": 3, "raise ValueError": 1, "os.kill(os.getpid(), 9)": -9, "pass": 0}
    for end, status in ends.items():
        done = subprocess.run(
            [sys.executable, "-c", code.format(end), "a", "b c"],
            capture_output=True, text=True, check=False, cwd=tmp_path, env={"OWN": "1"},
        )  # fmt: skip
        assert done.returncode == status
        assert done.stdout == f"['a', 'b c'] 1 {tmp_path}\n"
        assert done.stderr.startswith("aside\n")
        assert ("ValueError" in done.stderr) == (end == "raise ValueError")
