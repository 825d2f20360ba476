"""What the shuffle takes as a model grows: python -m benchmarks.blogs_study.scale

To 1.1 billion parameters. A shuffle takes one tensor after the other, so its cost is the sum over
the model's tensors, and one tensor of each shape is enough to measure: gradients in bfloat16, made,
shuffled and freed again. Processor time of one thread, beside that of one multiplication of the
gradient in place. Writes ``blogs/scale.json`` and its part of ``blogs.md``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.sections import put
from dptorch.blogs.shuffle import BlockShuffle
from dptorch.randomness import RootKey

__all__ = ["MODELS", "Row", "Shapes", "measure", "section", "with_section"]

#: How many tensors of which sizes a model has.
Shapes = dict[int, int]

TITLE = "## With more parameters"


def _transformer(d: int, inner: int, layers: int, kv: int, vocabulary: int) -> Shapes:
    """Of a Llama: query, key, value and output, three matrices of the MLP, norms, embedding, head."""
    found: Shapes = {}
    for size, count in (
        (d * d, 2 * layers), (kv * d, 2 * layers), (inner * d, 3 * layers), (d, 2 * layers + 1),
        (vocabulary * d, 2),
    ):  # fmt: skip
        found[size] = found.get(size, 0) + count
    return found


MODELS: dict[str, Shapes] = {
    "1 M": _transformer(64, 176, 4, 64, 6000),
    "11 M": _transformer(256, 704, 4, 256, 16000),
    "111 M": _transformer(640, 1760, 12, 640, 40000),
    "TinyLlama, 1.1 G": _transformer(2048, 5632, 22, 256, 32000),
}


@dataclass(frozen=True)
class Row:
    """One model in blocks of one size.

    Attributes:
        model, block: which.
        parameters: of all tensors.
        seconds: of processor time for one shuffle of all.
        plain: of one multiplication of all in place.
        extra_bytes: beside the gradient: the largest tensor once more, and its permutation.
    """

    model: str
    block: int
    parameters: int
    seconds: float
    plain: float
    extra_bytes: int


def measure(model: str, shapes: Shapes, block: int, tries: int = 3) -> Row:
    """One row; the least of a few tries of each shape."""
    shuffled = plain = 0.0
    for size, count in shapes.items():
        gradient = torch.randn(size, dtype=torch.float32).to(torch.bfloat16)
        shuffle = BlockShuffle({"g": block}, 1.0, RootKey.from_seed(0))
        times: tuple[list[float], list[float]] = [], []
        for step in range(tries):
            began = time.thread_time()
            shuffle.apply({"g": gradient}, step)
            middle = time.thread_time()
            gradient.mul_(1.0)
            times[0].append(middle - began)
            times[1].append(time.thread_time() - middle)
        shuffled += count * min(times[0])
        plain += count * min(times[1])
    largest = max(shapes)
    extra = 2 * largest + 8 * (largest // max(1, min(block, largest // 2)))
    total = sum(size * count for size, count in shapes.items())
    return Row(model, block, total, shuffled, plain, extra)


def section(rows: Sequence[Row]) -> str:
    """Its part of the page."""
    lines = [
        TITLE,
        "",
        "Gradients in bfloat16 with the shapes of Llamas, one tensor after the other; processor time "
        "of one thread for one shuffle of all, and for multiplying the gradient in place once. *Extra* "
        "is what is needed beside the gradient: the largest tensor once more, and the order of its "
        "blocks. Time grows with the parameters; in blocks of one coordinate faster, as the order of a "
        "large tensor fits no cache.",
        "",
        "| parameters | block | shuffle, s | ns a parameter | one multiplication, s | extra |",
        "|---|---:|---:|---:|---:|---:|",
        *(
            f"| {r.model} | {r.block} | {r.seconds:.3g} | {1e9 * r.seconds / r.parameters:.2g} | "
            f"{r.plain:.2g} | {r.extra_bytes / 2**20:.3g} MiB |"
            for r in rows
        ),
        "",
        "Made by `python -m benchmarks.blogs_study.scale --output docs`.",
        "",
    ]
    return "\n".join(lines) + "\n"


def with_section(page: str, folder: Path) -> str:
    """The page with the section of what was measured last, if anything was."""
    file = folder / "blogs" / "scale.json"
    if not file.exists():
        return page
    rows = [Row(**r) for r in json.loads(file.read_text())]
    return put(page, section(rows), "## Make this page")


def main() -> None:
    """Measure, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs"))
    parser.add_argument("--block", type=int, action="append")
    folder = (given := parser.parse_args()).output
    torch.set_num_threads(1)
    rows = []
    for model, shapes in MODELS.items():
        for block in given.block or (1024, 1):
            rows.append(measure(model, shapes, block))
            print(rows[-1], flush=True)
    (folder / "blogs").mkdir(parents=True, exist_ok=True)
    text = json.dumps([asdict(r) for r in rows], indent=1)
    (folder / "blogs" / "scale.json").write_text(text + "\n")
    page = folder / "blogs.md"
    if page.exists():
        page.write_text(with_section(page.read_text(), folder))


if __name__ == "__main__":
    main()
