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
        module: run it as a module, from two folders up, as its relative imports need.
        arguments: with ``{data}`` for the folder of the data files, ``{output}`` for an empty one.
        name: of the row on the page; by default the script's.
        gpus: how many it needs.
    """

    script: str
    arguments: str = ""
    name: str = ""
    gpus: int = 0
    module: bool = False

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
        path = folder / example.script
        script = [str(path)]
        if example.module:
            script = ["-m", str(path.parents[1]), f"{path.parent.name}.{path.stem}"]
        command = [sys.executable, "-m", "tests.peers.launch", *script]
        output = work / f"output{len(found)}"
        command += example.arguments.format(data=data, output=output).split()
        done = subprocess.run(
            command, cwd=work, env=environment(*paths) | {DATA: str(data)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        said = [line for line in done.stderr.splitlines() if line.strip()]
        outcome = ("failed", " ".join(said[-1:])) if done.returncode else ("passed", "")
        print(f"{example.title}: {' '.join(outcome)}", file=sys.stderr)
        found[example.title] = outcome
    return found
