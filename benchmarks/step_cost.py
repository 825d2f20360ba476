"""What a private step costs, as a ratio to the same step without privacy.

One process, rounds interleaved (ordinary, private, ordinary, private...), so that both see the same
machine. A step is forward, loss, backward, clipping, noise, optimizer and zero_grad; batch sizes are
fixed, so that sampling does not blur the ratio.

    python benchmarks/step_cost.py [--rounds 15] [--threads 2] [WORKLOAD ...]
"""

from __future__ import annotations

import argparse
import copy
import platform
import resource
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dptorch


@dataclass(frozen=True)
class Workload:
    """A model and a mean loss on a fixed batch."""

    model: nn.Module
    loss: Callable[[nn.Module], Tensor]
    batch_size: int


class Block(nn.Module):
    """A residual block with GroupNorm and in-place ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.GroupNorm(8, outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.GroupNorm(8, outputs),
        )
        same = inputs == outputs and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x), inplace=True)


def mlp() -> Workload:
    """4 x Linear(1024), B = 256, 4.2 M parameters."""
    layers = [layer for _ in range(4) for layer in (nn.Linear(1024, 1024), nn.ReLU(inplace=True))]
    x = torch.randn(256, 1024)
    return Workload(nn.Sequential(*layers[:-1]), lambda m: m(x).square().mean(1).mean(), 256)


def resnet() -> Workload:
    """ResNet-GN of width 32/64/128, 32 x 32, B = 64, 0.7 M parameters."""
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, 1, 1), nn.GroupNorm(8, 32), nn.ReLU(inplace=True), Block(32, 32, 1),
        Block(32, 32, 1), Block(32, 64, 2), Block(64, 64, 1), Block(64, 128, 2), Block(128, 128, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip
    x, y = torch.randn(64, 3, 32, 32), torch.randint(0, 10, (64,))
    return Workload(model, lambda m: F.cross_entropy(m(x), y), 64)


def gpt2_tied() -> Workload:
    """GPT-2 of 4 layers, d = 256, V = 5000, B = 8, T = 128, tied, 4.5 M parameters."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=4, n_embd=256, n_head=4, vocab_size=5000, n_positions=128, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    ids = torch.randint(0, 5000, (8, 128))
    return Workload(GPT2LMHeadModel(config), lambda m: m(ids, labels=ids).loss, 8)


def vit() -> Workload:
    """ViT of 4 layers, d = 192, 64 x 64 in patches of 8, B = 32, 1.8 M parameters."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=192, num_hidden_layers=4, num_attention_heads=3, intermediate_size=768,
        image_size=64, patch_size=8, num_labels=10,
    )  # fmt: skip
    x, y = torch.randn(32, 3, 64, 64), torch.randint(0, 10, (32,))
    return Workload(
        ViTForImageClassification(config), lambda m: F.cross_entropy(m(x).logits, y), 32
    )


class Reused(nn.Module):
    """One layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(1024, 1024), nn.Linear(1024, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


def reused() -> Workload:
    """A Linear(1024) used twice, B = 256."""
    x, y = torch.randn(256, 1024), torch.randint(0, 10, (256,))
    return Workload(Reused(), lambda m: F.cross_entropy(m(x), y), 256)


class FunctionalTie(nn.Module):
    """``F.linear(h, embedding.weight)`` for a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(5000, 256), nn.Linear(256, 256)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.inner(self.table(ids))), self.table.weight)


def functional_tie() -> Workload:
    """V = 5000, d = 256, B = 16, T = 64."""
    ids = torch.randint(0, 5000, (16, 64))
    loss = lambda m: F.cross_entropy(m(ids).transpose(1, 2), ids)
    return Workload(FunctionalTie(), loss, 16)


WORKLOADS = {w.__name__: w for w in (mlp, resnet, gpt2_tied, vit, reused, functional_tie)}


def ordinary_step(model: nn.Module, work: Workload, optimizer: torch.optim.Optimizer) -> None:
    """One step of the loop everybody writes; the private one differs only in what is attached."""
    work.loss(model).backward()
    optimizer.step()
    optimizer.zero_grad()


def measure(name: str, rounds: int) -> str:
    """Interleave ordinary and private steps; one line of a Markdown table."""
    torch.manual_seed(0)
    work = WORKLOADS[name]()
    private_model, n = copy.deepcopy(work.model), work.batch_size
    engine = dptorch.PrivacyEngine(
        private_model, sample_rate=1.0, sample_size=n, steps=10**6, noise_multiplier=1.0,
        target_delta=1e-5, seed=0,
    )  # fmt: skip
    plain = torch.optim.SGD(work.model.parameters(), lr=1e-6)
    private = engine.attach(torch.optim.SGD(private_model.parameters(), lr=1e-6))
    times: dict[str, list[float]] = {"plain": [], "private": []}
    for i in range(rounds + 2):
        for kind, model, optimizer in (
            ("plain", work.model, plain),
            ("private", private_model, private),
        ):
            start = time.perf_counter()
            ordinary_step(model, work, optimizer)
            if i >= 2:
                times[kind].append(time.perf_counter() - start)
    ratios = sorted(b / a for a, b in zip(times["plain"], times["private"], strict=True))
    tenth = len(ratios) // 10
    least = min(times["private"]) / min(times["plain"])
    median = statistics.median(ratios)
    return (
        f"| {name} | {WORKLOADS[name].__doc__} | {median:.2f} | "
        f"{ratios[tenth]:.2f} - {ratios[-1 - tenth]:.2f} | {least:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workloads", nargs="*", choices=[*WORKLOADS, []])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", dptorch.errors.PrivacyWarning)  # fixed batches, on purpose
    print(f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}\n")
    print(
        "| workload | what | median ratio | p10 - p90 | ratio of fastest |\n|---|---|---|---|---|"
    )
    for name in options.workloads or WORKLOADS:
        print(measure(name, options.rounds), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\npeak memory of the process, all workloads: {peak:.0f} MiB")


if __name__ == "__main__":
    main()
