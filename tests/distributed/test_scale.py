"""docs/scale.md: its programs run as it says, and so does the example, on two processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
from torch import distributed as dist

import dptorch
from tests.distributed.processes import on_ranks
from tests.distributed.scenarios import programs
from tests.source import REPOSITORY

EXAMPLE = REPOSITORY / "examples" / "processes_loop.py"

pytestmark = pytest.mark.slow


@pytest.mark.usefixtures("python_forks")
def test_the_first_program_of_the_page_runs_under_torchrun(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(programs()[0])
    package = str(Path(dptorch.__file__).parents[1])
    done = subprocess.run(
        # It chooses a free port for --standalone.
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(tmp_path / "train.py")],
        capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": package},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (told,) = re.findall(r"epsilon=([\d.]+)", done.stdout)
    assert 2.9 < float(told) <= 3.0


@pytest.mark.parametrize("program", [programs()[1], programs()[3]], ids=["shards", "features"])
def test_the_programs_with_divided_models_run(program: str, tmp_path: Path) -> None:

    def work(rank: int) -> float:
        os.chdir(tmp_path)
        dist.init_process_group = lambda backend: None  # on_ranks did
        names: dict[str, Any] = {}
        exec(program, names)
        return float(names["engine"].get_privacy_spent().epsilon)

    first, second = on_ranks(2, work)
    assert first == second
    assert 2.9 < first <= 3.0
    assert (tmp_path / "run.pt").exists()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_loop_on_processes_trains_one_model_whole_and_in_shards() -> None:
    def work(rank: int) -> list[tuple[float, float]]:
        train = run_path(str(EXAMPLE))["train"]
        return [train(epochs=2), train(epochs=2, shard=True)]

    first, second = on_ranks(2, work)
    assert first == second
    for accuracy, epsilon in first:
        assert accuracy > 0.4  # chance is 0.1
        assert 2.9 < epsilon <= 3.0
