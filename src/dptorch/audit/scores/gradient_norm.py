"""The gradient norm of an example: small for what the model has fitted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dptorch.audit.evidence import Array
from dptorch.audit.scores.signals import (
    answer,
    device_of,
    evaluating,
    labelled,
    logits_of,
    split_item,
    with_progress,
)
from dptorch.tape import record

__all__ = ["class_gradient_norm", "text_gradient_norm", "text_parameter_norms"]

_TEXTS = 8  # in one backward


def class_gradient_norm(
    model: nn.Module, data: Any, *, batch_size: int = 64, progress: bool = False
) -> Array:
    """Minus the L2 norm of each example's gradient of its cross-entropy, over all trainable
    parameters, [N]. From the tape: one forward and backward a batch.

    Args:
        model: returns logits [B, K].
        data: see `dptorch.audit.scores.signals.labelled`.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> class_gradient_norm(model, (torch.ones(5, 3), torch.zeros(5).long())).shape
        (5,)
    """
    device = device_of(model)
    found = []
    batches: DataLoader[Any] = DataLoader(labelled(data), batch_size=batch_size)
    with evaluating(model):
        for batch in with_progress(batches, progress, "Gradients"):
            x, y = split_item(batch)
            labels = torch.as_tensor(y).to(device)

            def loss(x: Any = x, labels: Tensor = labels) -> Tensor:
                # A sum: each example's gradient is that of its own loss, whatever the batch.
                return nn.functional.cross_entropy(
                    answer(model, x, device), labels, reduction="sum"
                )

            found.append(_norms(model, loss))
    return -np.concatenate(found)


def text_gradient_norm(
    model: nn.Module, ids: Sequence[Sequence[int]], *, progress: bool = False
) -> Array:
    """Minus the L2 norm of each text's gradient of its mean next-token loss, [N].

    Args:
        ids: the tokens of each text; at least two of each.
    """
    _, norms = text_parameter_norms(model, ids, progress=progress)
    return -np.sqrt((norms**2).sum(axis=1))


def text_parameter_norms(
    model: nn.Module, ids: Sequence[Sequence[int]], *, progress: bool = False
) -> tuple[list[str], Array]:
    """The L2 norm of each text's gradient of its mean next-token loss, by parameter.

    Texts of one length go together, so that no padding enters.

    Returns:
        names of the parameters that a gradient reached, and norms [N, P].
    """
    device = device_of(model)
    lengths: dict[int, list[int]] = {}
    for i, row in enumerate(ids):
        lengths.setdefault(len(row), []).append(i)
    groups = [
        chosen[at : at + _TEXTS]
        for chosen in lengths.values()
        for at in range(0, len(chosen), _TEXTS)
    ]
    found: dict[str, Array] = {}
    with evaluating(model):
        for chosen in with_progress(groups, progress, "Gradients"):
            batch = torch.tensor([list(ids[i]) for i in chosen], device=device)
            with record(model) as tape:
                logits = logits_of(model(input_ids=batch))[:, :-1]
                each = nn.functional.cross_entropy(
                    logits.transpose(1, 2), batch[:, 1:], reduction="none"
                )
                loss = each.mean(1).sum()
            loss.backward()
            for name, squared in tape.squared_norms().items():
                # Zero for texts that do not reach the parameter.
                column = found.setdefault(name, np.zeros(len(ids)))
                column[chosen] = squared.detach().double().clamp_min(0).sqrt().cpu().numpy()
            tape.close()
    return list(found), np.stack(list(found.values()), axis=1)


def _norms(model: nn.Module, loss: Callable[[], Tensor]) -> Array:
    with record(model) as tape:
        value = loss()
    value.backward()
    norms = tape.norms().detach().double().cpu().numpy()
    tape.close()
    return norms
