"""Run a peer's scripts to their end."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.peers.launch import DATA
from tests.peers.suites import Outcome, environment

__all__ = ["Example", "run_examples"]


@dataclass(frozen=True)
class Example:
    """A script and its arguments.

    Attributes:
        script: its path in the checkout.
        arguments: with ``{data}`` for the folder of the data files.
        name: of the row on the page; by default the script's.
        gpus: how many it needs.
    """

    script: str
    arguments: str = ""
    name: str = ""
    gpus: int = 0

    @property
    def title(self) -> str:
        return self.name or self.script


def run_examples(
    folder: Path, examples: Iterable[Example], data: Path, *paths: Path
) -> dict[str, Outcome]:
    """Outcomes by title: passed if the script came to its end."""
    found: dict[str, Outcome] = {}
    work = folder / "work"
    work.mkdir(exist_ok=True)
    for example in examples:
        if example.gpus > torch.cuda.device_count():
            found[example.title] = ("failed", f"needs {example.gpus} GPUs")
            continue
        command = [sys.executable, "-m", "tests.peers.launch", str(folder / example.script)]
        command += example.arguments.format(data=data, work=work).split()
        done = subprocess.run(
            command, cwd=work, env=environment(*paths) | {DATA: str(data)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        said = [line for line in done.stderr.splitlines() if line.strip()]
        outcome = ("failed", " ".join(said[-1:])) if done.returncode else ("passed", "")
        print(f"{example.title}: {' '.join(outcome)}", file=sys.stderr)
        found[example.title] = outcome
    return found
