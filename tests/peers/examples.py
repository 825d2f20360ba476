"""Run a peer's scripts to their end."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.peers.forks import run
from tests.peers.launch import DATA
from tests.peers.launch import main as launch
from tests.peers.suites import Outcome

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
    folder: Path, examples: Iterable[Example], data: Path
) -> Iterator[dict[str, Outcome]]:
    """Outcomes by title, one at a time: passed if the script came to its end."""
    work = folder / "work"
    work.mkdir(exist_ok=True)
    for i, example in enumerate(examples):
        if example.gpus > torch.cuda.device_count():
            yield {example.title: ("failed", f"needs {example.gpus} GPUs")}
            continue
        path = folder / example.script
        script = [str(path)]
        if example.module:
            script = ["-m", str(path.parents[1]), f"{path.parent.name}.{path.stem}"]
        arguments = example.arguments.format(data=data, output=work / f"output{i}").split()
        status, printed = run(launch, [*script, *arguments], work, {DATA: str(data)})
        outcome = ("failed", error_in(printed)) if status else ("passed", "")
        print(f"{example.title}: {' '.join(outcome)}", file=sys.stderr)
        yield {example.title: outcome}


def error_in(printed: str) -> str:
    """The last line that names an error, or else the last: progress bars may be printed after it."""
    lines = [line for line in printed.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Exit|Mix)\b", line)]
    return " ".join((errors or lines)[-1:])
