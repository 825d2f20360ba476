"""What programs do to a batch before the model gets it, and the forms that batches have."""

from __future__ import annotations

import random
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from tests.engine.legitimate.harness import Program, classes
from tests.engine.legitimate.loops import LOOPS, loss_of

__all__ = ["BATCHES"]

_OF_ROWS: dict[str, Callable[[nn.Module, Any], Tensor]] = {
    "moved and cast": lambda m, b: loss_of(m, (b[0].to("cpu").float(), b[1].to("cpu").long())),
    "normalised by constants": lambda m, b: loss_of(m, ((b[0] - 0.5) / 0.25, b[1])),
    "normalised by itself": lambda m, b: loss_of(
        m, ((b[0] - b[0].mean(1, keepdim=True)) / b[0].std(1, keepdim=True), b[1])
    ),
    "flipped": lambda m, b: loss_of(m, (torch.flip(b[0], [1]), b[1])),
    "rolled": lambda m, b: loss_of(m, (b[0].roll(2, dims=1), b[1])),
    "flattened": lambda m, b: loss_of(m, (b[0].view(b[0].size(0), -1), b[1].squeeze())
        if len(b[0]) > 1 else (b[0], b[1])),
    "public permutation of columns": lambda m, b: loss_of(m, (b[0][:, [4, 2, 0, 1, 3]], b[1])),
    "appended constants": lambda m, b: loss_of(
        m, (torch.cat([b[0][:, :4], torch.ones(len(b[0]), 1)], 1), b[1])
    ),
    "missing values filled": lambda m, b: loss_of(
        m, (torch.where(b[0] > 1, torch.zeros_like(b[0]), b[0]), b[1])
    ),
    "in place": lambda m, b: loss_of(m, (b[0].clone().clamp_(-1, 1).mul_(2), b[1])),
    "quantised": lambda m, b: loss_of(m, ((b[0] * 8).round() / 8, b[1])),
    "relabelled": lambda m, b: loss_of(m, (b[0], torch.tensor([2, 0, 1])[b[1]])),
}  # fmt: skip
_RANDOM: dict[str, Callable[[nn.Module, Any], Tensor]] = {
    "noise": lambda m, b: loss_of(m, (b[0] + 0.1 * torch.randn_like(b[0]), b[1])),
    "masked inputs": lambda m, b: loss_of(m, (b[0] * (torch.rand_like(b[0]) > 0.15), b[1])),
    "flip by example": lambda m, b: loss_of(
        m, (torch.where(torch.rand(len(b[0]), 1) < 0.5, b[0], -b[0]), b[1])
    ),
    "flip by coin": lambda m, b: loss_of(m, (-b[0] if random.random() < 0.5 else b[0], b[1])),
    "dropout of features": lambda m, b: loss_of(m, (F.dropout(b[0], 0.2), b[1])),
    "diffusion": lambda m, b: F.mse_loss(
        m(b[0] + torch.rand(len(b[0]), 1) * 0.5), torch.randn(len(b[0]), 3)
    ),
}
BATCHES: dict[str, Program] = {f"batch {n}": Program(f) for n, f in _OF_ROWS.items()}
BATCHES |= {f"batch {n}": Program(f, tolerance=None) for n, f in _RANDOM.items()}


def _permuted(m: nn.Module, b: Any) -> Tensor:
    order = torch.randperm(len(b[0]))
    return loss_of(m, (b[0][order], b[1][order]))


Pair = namedtuple("Pair", "x y")


@dataclass
class Record:
    x: Tensor
    y: Tensor


class Rows(Dataset[Any]):
    """Examples of any form."""

    def __init__(self, form: Callable[[Tensor, int], Any]) -> None:
        x, y = classes().tensors  # type: ignore[attr-defined]
        self.rows = [form(a, int(b)) for a, b in zip(x, y, strict=True)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        return self.rows[i]


def _padded(rows: list[Any]) -> Any:
    """Sequences of different lengths, padded with zeros, and their mask."""
    x = nn.utils.rnn.pad_sequence([r[0] for r in rows], batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(r[0])) for r in rows], batch_first=True)
    return x, mask, torch.tensor([r[1] for r in rows])


def _pooled(m: nn.Module, b: Any) -> Tensor:
    x, mask, y = b
    h = m(x) * mask[..., None]
    return F.cross_entropy(h.sum(1) / mask.sum(1, keepdim=True), y)


def _dict(rows: list[Any]) -> Any:
    return {
        "input": default_collate([r[0] for r in rows]),
        "label": torch.tensor([r[1] for r in rows]),
    }


BATCHES |= {
    "batch permuted alike": Program(_permuted),
    "batch permuted alike, in parts": Program(
        _permuted, loop=LOOPS["physical batches"].loop, settings={"sampling": "truncated-poisson"}
    ),
    "batch of an object": Program(
        lambda m, b: loss_of(m, (b.x, b.y)),
        data=lambda: Rows(lambda x, y: (x, y)),
        collate=lambda rows: Record(*default_collate(rows)),
        tolerance=None,
    ),
    "batch of a dict": Program(
        lambda m, b: loss_of(m, (b["x"], b["y"])), data=lambda: Rows(lambda x, y: {"x": x, "y": y})
    ),
    "batch of a named tuple": Program(
        lambda m, b: loss_of(m, b), data=lambda: Rows(lambda x, y: Pair(x, y))
    ),
    "batch of a nested dict": Program(
        lambda m, b: loss_of(m, (b["in"]["x"], b["y"])),
        data=lambda: Rows(lambda x, y: {"in": {"x": x}, "y": y, "name": "row"}),
    ),
    "batch of another collate": Program(
        lambda m, b: loss_of(m, (b["input"], b["label"])),
        data=lambda: Rows(lambda x, y: (x, y)),
        collate=_dict,
    ),
    "batch padded, masked": Program(
        _pooled,
        data=lambda: Rows(lambda x, y: (x.repeat(1 + y, 1), y)),
        collate=_padded,
    ),
}  # fmt: skip
