"""What a private step of the zoo's models costs, in processor time: python -m benchmarks.zoo_cost

    python -m benchmarks.zoo_cost              # all, an hour or two on one core
    python -m benchmarks.zoo_cost pvt swin rec # only names that begin so; other rows are kept

Each model at its published width and depth on small images, BatchNorm replaced by GroupNorm; and
models that are no image models, at a usual size: a recommender with a million rows, a graph network, a
UNet of a diffusion model. Noise, SGD and zero_grad are included, on one thread. Ratios of processor
time change little on a busy machine. Writes its section of ``docs/cost_profile.md``, the worst first.
"""

from __future__ import annotations

import copy
import gc
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tests.oracles.torchvision_on_cpu  # noqa: F401
import torch
import torch.nn.functional as F
from tests.tape.zoo.vision import group_norm, steady
from torch import Tensor, nn

from benchmarks.sections import put
from benchmarks.zoo import TIMM, TORCHVISION, build, loss_of
from dptorch.bench.all_engines import engines
from dptorch.bench.engines import NON_PRIVATE, start
from dptorch.bench.suite import Options, facts
from dptorch.bench.timing import interleave
from dptorch.bench.workloads import Workload

DOCS = Path(__file__).parents[1] / "docs"
ROWS, PAGE = DOCS / "cost" / "zoo.json", DOCS / "cost_profile.md"
IMAGES, ROUNDS = 8, 3
LIMIT = 2.0
"""What no model is to cost more than, times the ordinary step."""


def image_model(library: str, name: str) -> Workload:
    """A model of `benchmarks.zoo` on a few images."""
    model, size = build(library, name)
    batch = torch.randn(IMAGES, 3, size, size), torch.randint(0, 10, (IMAGES,))
    return Workload(steady(group_norm(model)), batch, loss_of)


class Recommender(nn.Module):
    """Users and items looked up, and a network on both."""

    def __init__(self, rows: int, d: int) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(rows, d), nn.Embedding(rows, d)
        self.head = nn.Sequential(nn.Linear(2 * d, 128), nn.ReLU(), nn.Linear(128, 1))

    def forward(self, pairs: Tensor) -> Tensor:
        """A score for each pair, [B]."""
        both = torch.cat([self.users(pairs[:, 0]), self.items(pairs[:, 1])], 1)
        return self.head(both)[:, 0]


def recommender(rows: int = 500_000, d: int = 16) -> Workload:
    """A million rows in two tables, of which a batch touches a thousand."""
    pairs = torch.randint(0, rows, (512, 2)), torch.rand(512).round()
    losses = lambda model, x, y: F.binary_cross_entropy_with_logits(model(x), y, reduction="none")
    return Workload(Recommender(rows, d), pairs, losses)


class GraphNetwork(nn.Module):
    """Three rounds of messages over dense adjacencies, then a mean over nodes."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.messages = nn.ModuleList(nn.Linear(d, d) for _ in range(3))
        self.own = nn.ModuleList(nn.Linear(d, d) for _ in range(3))
        self.head = nn.Linear(d, 10)

    def forward(self, nodes: Tensor, adjacency: Tensor) -> Tensor:
        """Logits of each graph."""
        for message, own in zip(self.messages, self.own, strict=True):
            nodes = F.relu(adjacency @ message(nodes) + own(nodes))
        return self.head(nodes.mean(1))


def graph_network(graphs: int = 32, nodes: int = 64, d: int = 128) -> Workload:
    """Graphs of 64 nodes."""
    adjacency = (torch.rand(graphs, nodes, nodes) < 0.1).float() / 6
    batch = torch.randn(graphs, nodes, d), adjacency, torch.randint(0, 10, (graphs,))
    losses = lambda model, x, a, y: F.cross_entropy(model(x, a), y, reduction="none")
    return Workload(GraphNetwork(d), batch, losses)


class UNetBlock(nn.Module):
    """Two convolutions with GroupNorm and a shift by the time."""

    def __init__(self, inputs: int, outputs: int, time: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.GroupNorm(8, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1)
        )
        self.shift = nn.Linear(time, outputs)
        self.second = nn.Sequential(
            nn.GroupNorm(8, outputs), nn.SiLU(), nn.Conv2d(outputs, outputs, 3, padding=1)
        )
        self.skip = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Of the same size."""
        return self.second(self.first(x) + self.shift(time)[:, :, None, None]) + self.skip(x)


class UNet(nn.Module):
    """Down, attention in the middle, and up again with what was there on the way."""

    def __init__(self, d: int = 32) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, 4 * d), nn.SiLU(), nn.Linear(4 * d, 4 * d))
        self.stem, self.out = nn.Conv2d(3, d, 3, padding=1), nn.Conv2d(d, 3, 3, padding=1)
        self.down = nn.ModuleList([UNetBlock(d, d, 4 * d), UNetBlock(d, 2 * d, 4 * d)])
        self.attention = nn.MultiheadAttention(2 * d, 4, batch_first=True)
        self.up = nn.ModuleList([UNetBlock(4 * d, d, 4 * d), UNetBlock(2 * d, d, 4 * d)])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The noise that is in x."""
        time, x, kept = self.time(t[:, None]), self.stem(x), list[Tensor]()
        for block in self.down:
            x = block(x, time)
            kept.append(x)
            x = F.avg_pool2d(x, 2)
        flat = x.flatten(2).transpose(1, 2)
        flat = flat + self.attention(flat, flat, flat, need_weights=False)[0]
        x = flat.transpose(1, 2).view(x.shape)
        for block in self.up:
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0), kept.pop()], 1), time)
        return self.out(x)


def diffusion_unet() -> Workload:
    """Noise to be told from images of 32 pixels."""
    noise = torch.randn(16, 3, 32, 32)
    losses = lambda model, x, t, noise: (model(x, t) - noise).square().mean((1, 2, 3))
    return Workload(UNet(), (torch.randn(16, 3, 32, 32), torch.rand(16), noise), losses)


OTHERS: dict[str, Callable[[], Workload]] = {
    "recommender": recommender,
    "graph_network": graph_network,
    "diffusion_unet": diffusion_unet,
}


def measure(work: Workload) -> float:
    """The private step's processor time over the ordinary one's."""
    work.model.train()
    other = Workload(copy.deepcopy(work.model), work.inputs, work.losses)
    known = engines()
    ordinary, private = start(known[NON_PRIVATE], other), start(known["dptorch/auto"], work)
    found = interleave(ordinary, {"dptorch/auto": private}, seconds=0.0, rounds=ROUNDS)
    return found["dptorch/auto"].cpu_ratio


def section(kept: dict[str, Any]) -> str:
    """Its part of the page: a table, the worst first."""
    rows = sorted(kept["rows"], key=lambda r: -(r.get("ratio") or 0.0))
    ratios = sorted(r["ratio"] for r in rows if "ratio" in r)
    over = sum(ratio > LIMIT for ratio in ratios)
    lines = [
        "## The zoo",
        "",
        "A private step's processor time over the ordinary one's, on one thread: forward, loss, "
        "backward, clipping, noise, SGD and zero_grad. Image models at their published width and "
        f"depth, on {IMAGES} images as small as [zoo.md](zoo.md) has them. So few and small examples "
        "are the worst case: noise and the watching of the forward pass cost as much as for a full "
        f"batch, and are a larger share. The median of {ROUNDS}, by `python -m benchmarks.zoo_cost`.",
        "",
        *(f"- {name}: {value}" for name, value in kept["facts"].items()),
        "",
        f"{len(ratios)} models: median {ratios[len(ratios) // 2]:.2f}, worst {ratios[-1]:.2f}, "
        f"{over} above {LIMIT:g}.",
        "",
        "| model | parameters | ratio |",
        "|---|--:|--:|",
        *(
            f"| {r['model']} | {r['parameters'] / 1e6:.1f} M | {r['ratio']:.2f} |"
            if "ratio" in r
            else f"| {r['model']} | | {r['error']} |"
            for r in rows
        ),
        "",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
    """Measure what is asked for, and write after each."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    chosen: dict[str, Callable[[], Workload]] = dict(OTHERS)
    for library, names in (("timm", TIMM), ("torchvision", TORCHVISION.split())):
        for name in names:
            chosen[f"{library} {name}"] = lambda library=library, name=name: image_model(
                library, name
            )
    wanted = tuple(arguments)
    kept = json.loads(ROWS.read_text()) if ROWS.exists() else {"rows": []}
    for label, make in chosen.items():
        if wanted and not label.split()[-1].startswith(wanted):
            continue
        torch.manual_seed(0)
        row: dict[str, Any] = {"model": label}
        try:
            work = make()
            row["parameters"] = sum(p.numel() for p in work.model.parameters())
            row["ratio"] = round(measure(work), 3)
        except Exception as problem:  # a row that fails says why
            row["error"] = " ".join(str(problem).split())[:160]
        print(row, flush=True)
        kept["rows"] = [r for r in kept["rows"] if r["model"] != label] + [row]
        kept["facts"] = facts(Options([], threads=1, rounds=ROUNDS))
        ROWS.write_text(json.dumps(kept, indent=1) + "\n")
        if any("ratio" in r for r in kept["rows"]):
            PAGE.write_text(put(PAGE.read_text(), section(kept)))
        gc.collect()


if __name__ == "__main__":
    main(sys.argv[1:])
