"""Compare an engine's clipped gradient with a loop over examples."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor

from dptorch.bench.engines import Engine, Settings, start
from dptorch.bench.workloads import Recipe, Workload

__all__ = ["WRONG", "gradient_error"]

#: An error above this is no rounding in float32.
WRONG = 1e-3


def gradient_error(engine: Engine, recipe: Recipe, device: torch.device | str = "cpu") -> float:
    """Relative L2 error of one noiseless step against a loop over single examples.

    The workload is its tiny self in float32, by default on the CPU; the clipping norm is half the
    median norm, so that most examples are clipped, by different factors.

    Raises:
        Unavailable: if the engine cannot run it.
    """
    work = recipe.make(recipe.tiny, device=device)
    expected, bound = _loop(replace(work, model=copy.deepcopy(work.model)))
    before = {n: p.detach().clone() for n, p in work.model.named_parameters() if p.requires_grad}
    now = dict(work.model.named_parameters())
    start(engine, work, Settings(noise_multiplier=0.0, max_grad_norm=bound, lr=1.0))
    found = torch.cat([(before[n] - now[n].detach()).flatten() for n in before])
    return ((found - expected).norm() / expected.norm()).item()


def _loop(work: Workload) -> tuple[Tensor, float]:
    """(clipped mean gradient, the clipping norm)."""
    parameters = [p for p in work.model.parameters() if p.requires_grad]
    rows = []
    for i in range(work.batch_size):
        loss = work.losses(work.model, *(x[i : i + 1] for x in work.inputs)).sum()
        gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in gradients]))
    matrix = torch.stack(rows)
    norms = matrix.norm(dim=1)
    bound = norms.median().item() / 2
    return ((bound / norms).clamp(max=1)[:, None] * matrix).mean(0), bound
