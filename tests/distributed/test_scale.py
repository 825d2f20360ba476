"""docs/scale.md: its program runs as it says, and so does the example, on two processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from runpy import run_path

import pytest
import torch

from tests.distributed.processes import on_ranks
from tests.source import REPOSITORY

EXAMPLE = REPOSITORY / "examples" / "accelerate_loop.py"

pytestmark = pytest.mark.slow


def test_the_program_of_the_page_runs_under_torchrun(tmp_path: Path) -> None:
    page = (REPOSITORY / "docs" / "scale.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "train.py").write_text(program)
    done = subprocess.run(
        # It chooses a free port for --standalone.
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(tmp_path / "train.py")],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (told,) = re.findall(r"epsilon=([\d.]+)", done.stdout)
    assert 2.9 < float(told) <= 3.0


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_loop_of_accelerate_trains_one_model_on_two_processes() -> None:
    """Accelerator wraps the model in DistributedDataParallel, after the engine was made."""

    def work(rank: int) -> tuple[float, float]:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # looked at, not used
        torch.manual_seed(rank)
        found: tuple[float, float] = run_path(str(EXAMPLE))["train"](epochs=3)
        return found

    first, second = on_ranks(2, work)
    assert first == second
    assert first[0] > 0.4  # chance is 0.1
    assert 2.9 < first[1] <= 3.0
