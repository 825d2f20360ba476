"""`accelerate launch` itself, with the configurations of examples/accelerate."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import dptorch
from tests.forked_python import TRAINING, forking_python
from tests.source import REPOSITORY

pytest.importorskip("accelerate")

EXAMPLES = REPOSITORY / "examples"
WORKER = REPOSITORY / "tests" / "distributed" / "launched.py"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python() -> Iterator[Path]:
    """A Python that has imported what the launcher and the programs import."""
    wanted = (
        "tests.oracles.torchvision_on_cpu", *TRAINING, "accelerate.commands.launch",
        "transformers.trainer", "peft", "datasets", "trl", "deepspeed",
    )  # fmt: skip
    modules = [name for name in wanted if find_spec(name.partition(".")[0])]
    with forking_python(modules, DS_ACCELERATOR="cpu") as python:
        yield python


def launched(python: Path, configuration: str, program: str, *arguments: str) -> list[str]:
    """The lines that the processes of `accelerate launch` print."""
    package = str(Path(dptorch.__file__).parents[1])
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        # A port in use makes the launcher choose a free one.
        port = str(held.getsockname()[1])
        done = subprocess.run(
            [
                str(python), "-m", "accelerate.commands.launch",
                "--config_file", str(EXAMPLES / "accelerate" / f"{configuration}.yaml"),
                "--main_process_port", port, str(WORKER), str(EXAMPLES / program), *arguments,
            ],
            capture_output=True, text=True, check=False,
            env={
                **os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
                "PYTHONPATH": f"{package}{os.pathsep}{REPOSITORY}",
            },
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_loop_ends_under_accelerate_launch(python: Path) -> None:
    *_, last = launched(python, "ddp", "accelerate_loop.py", "3")
    found = re.fullmatch(r"accuracy ([\d.]+), epsilon ([\d.]+)", last)
    assert found, last
    accuracy, epsilon = found.groups()
    assert float(accuracy) > 0.4  # chance is 0.1
    assert 2.9 < float(epsilon) <= 3.0


@pytest.mark.parametrize("configuration", ["fsdp2", "zero3"])
def test_programs_end_under_accelerate_launch(
    configuration: str, python: Path, tmp_path: Path
) -> None:
    """FSDP2's is refused without GPUs on every process, and ends where accelerate is made to shard."""
    pytest.importorskip("trl")
    out = ["--out", str(tmp_path), "--epochs", "0.5"]
    lines = launched(python, configuration, "sft_lora.py", *out)
    refusals = [line for line in lines if line.startswith("refused: FSDP was asked for")]
    assert len(refusals) == (2 if configuration == "fsdp2" else 0)
    ends = [m for m in (re.fullmatch(r"2 steps, epsilon ([\d.]+)", line) for line in lines) if m]
    assert len(ends) == 1  # of two processes
    assert 7.9 < float(ends[0][1]) <= 8.0
