"""The oracle for per-example gradients: run the model on one example at a time."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

Loss = Callable[..., Tensor]


def one_example_loop(
    model: nn.Module, batch: Sequence[Tensor], loss: Loss, dim: int = 0
) -> dict[str, Tensor]:
    """Per-example gradients {name: [B, *shape]} of ``loss(model, *batch)``, by brute force."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    rows: dict[str, list[Tensor]] = {n: [] for n in parameters}
    for i in range(batch[0].shape[dim]):
        single = [t.narrow(dim, i, 1) for t in batch]
        value = loss(model, *single).sum()
        grads = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
        for (name, p), g in zip(parameters.items(), grads, strict=True):
            rows[name].append(torch.zeros_like(p) if g is None else g)
    return {name: torch.stack(r) for name, r in rows.items()}


def norms_of(gradients: Mapping[str, Tensor]) -> Tensor:
    """Norm [B] of each example's gradient over all parameters, from {name: [B, *shape]}."""
    squared = [g.reshape(len(g), -1).square().sum(1) for g in gradients.values()]
    return torch.stack(squared).sum(0).sqrt()


def norm_of(values: Mapping[str, Tensor]) -> float:
    """Norm over all parameters of one sum or gradient {name: *shape}, in float64."""
    return math.sqrt(sum(v.double().square().sum().item() for v in values.values()))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Relative L2 error; absolute where the expected value is zero to working precision."""
    size = expected.norm().item()
    return (found - expected).norm().item() / (size if size > 1e-10 else 1.0)
