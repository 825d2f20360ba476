"""Memory of a step of ResNet-18, at 224 and 400 pixels: python -m benchmarks.picture_memory [B]

Peak of allocated memory above the model and its optimizer, each engine in a process of its own: the
tensors that it keeps between steps, and the most that a step allocates. Ghost norms of all layers are
left out: of the first one they are products of 12,544 rows with each other at 224 pixels, and of
40,000 at 400.
"""

from __future__ import annotations

import sys

from dptorch.bench.memory import Question, ask
from dptorch.bench.workloads import Unavailable

SIDES = (224, 400)  # pixels
ENGINES = (
    "non-private",
    "dptorch/auto",
    "dptorch/layer-wise",
    "dptorch/non-ghost",
    "opacus/hooks",
)


def allocated(engine: str, side: int, examples: int) -> str:
    """MiB of a step, or why there is no number."""
    size = {"B": examples, "T": side, "d": 64, "L": None, "V": None}
    try:
        found = ask(Question("resnet18_224", engine, size))["allocator"]
    except Unavailable as error:
        return str(error)[:60]
    assert found is not None
    return f"{found / 2**20:.0f}"


def main(examples: int = 4) -> None:
    """Print a table in Markdown, a row for each engine."""
    print(f"| MiB, {examples} pictures | {' | '.join(f'{side} pixels' for side in SIDES)} |")
    print("|---|--:|--:|")
    for engine in ENGINES:
        cells = [allocated(engine, side, examples) for side in SIDES]
        print(f"| {engine} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
