"""Functions of ``opacus.utils.per_sample_gradients_utils``: per-example gradients beside a loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from dptorch.compat.opacus.grad_sample.utils import get_gsm_class
from dptorch.compat.opacus.utils.module_utils import clone_module
from dptorch.errors import one_of
from dptorch.tape import Ragged, record
from dptorch.tape.recording.batch_dims import BatchDims

__all__ = [
    "check_per_sample_gradients_are_correct",
    "clone_module",
    "compute_grad_samples_microbatch_and_opacus",
    "compute_microbatch_grad_sample",
    "compute_opacus_grad_sample",
    "get_grad_sample_modes",
    "is_batch_empty",
    "unpack_packedsequences",
]

Batch = Any  # a tensor, a PackedSequence, or a tuple of tensors for a module with several inputs
Gradients = dict[str, Tensor]  # parameter name -> [B, *shape]


def get_grad_sample_modes(use_ew: bool = False) -> list[str]:
    """Return the modes that `check_per_sample_gradients_are_correct` takes."""
    return ["hooks", "functorch", "ew"] if use_ew else ["hooks", "functorch"]


def is_batch_empty(batch: Any) -> bool:
    """Return whether the batch, or the first tensor of a tuple, has no element."""
    first = batch if isinstance(batch, Tensor) else batch[0]
    return bool(first.numel() == 0)


def compute_microbatch_grad_sample(
    x: Batch,
    module: nn.Module,
    batch_first: bool = True,
    loss_reduction: str = "mean",
    chunk_method: Callable[[Any], Iterable[Any]] = iter,
) -> Gradients:
    """Return each example's gradient of the L1 norm of the output, by a loop over single examples.

    Args:
        x: the batch, or a list of sequences.
        module: a module; a copy of it is used.
        batch_first: whether examples are dimension 0 of `x`, or 1.
        loss_reduction: "mean" or "sum" over an example's outputs.
        chunk_method: how `x` is taken apart into examples.
    """
    module = clone_module(module)
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    found: dict[str, list[Tensor]] = {name: [] for name in named}
    if not batch_first and isinstance(x, Tensor):
        x = x.transpose(0, 1)
    for one in chunk_method(x):
        given = one if isinstance(one, tuple) else (one.unsqueeze(0 if batch_first else 1),)
        loss = _loss(module(*given), loss_reduction)
        gradients = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
        for name, g in zip(named, gradients, strict=True):
            found[name].append(g.detach())
    return {name: torch.stack(rows) for name, rows in found.items()}


def compute_opacus_grad_sample(
    x: Batch,
    module: nn.Module,
    batch_first: bool = True,
    loss_reduction: str = "mean",
    grad_sample_mode: str = "hooks",
) -> Gradients:
    """Return what `compute_microbatch_grad_sample` returns, from one backward pass of the batch.

    All modes, "hooks", "functorch" and "ew", are `dptorch.record` here.
    """
    get_gsm_class(grad_sample_mode)
    module = clone_module(module)
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    if not isinstance(x, PackedSequence) and is_batch_empty(x):
        return {name: p.new_zeros(0, *p.shape) for name, p in named.items()}
    dims: BatchDims = 0 if batch_first else 1
    if isinstance(module, nn.EmbeddingBag) and isinstance(x, tuple):
        dims = {"input": Ragged("offsets", "offsets"), "offsets": 0}
    lengths = (
        torch.tensor([len(r) for r in _in_order(x)]) if isinstance(x, PackedSequence) else None
    )
    with record(module, batch_dims=dims) as tape:
        out = module(*x) if type(x) is tuple else module(x)
        _loss(out, loss_reduction, lengths=lengths, examples=tape.batch_size).backward()
    return tape.per_example_gradients()


def compute_grad_samples_microbatch_and_opacus(
    x: Batch,
    module: nn.Module,
    batch_first: bool = True,
    loss_reduction: str = "mean",
    grad_sample_mode: str = "hooks",
    chunk_method: Callable[[Any], Iterable[Any]] = iter,
) -> tuple[Gradients, Gradients]:
    """Return (by a loop over single examples, by one backward pass of the batch).

    Raises:
        RuntimeError: the batch is empty.
    """
    if not isinstance(x, PackedSequence) and is_batch_empty(x):
        raise RuntimeError("x has no examples: give at least one to compare on.")
    rows = _in_order(x) if isinstance(x, PackedSequence) else x
    return (
        compute_microbatch_grad_sample(rows, module, batch_first, loss_reduction, chunk_method),
        compute_opacus_grad_sample(x, module, batch_first, loss_reduction, grad_sample_mode),
    )


def check_per_sample_gradients_are_correct(
    x: Batch,
    module: nn.Module,
    *,
    batch_first: bool = True,
    atol: float = 10e-6,
    rtol: float = 10e-5,
    grad_sample_mode: str = "hooks",
) -> bool:
    """Return whether every per-example gradient is that of a loop over single examples.

    `dptorch.check` does the same for a loss of your own.

    Args:
        x: a batch.
        module: any module; a copy of it is used.
        batch_first: whether examples are dimension 0 of `x`, or 1.
        atol, rtol: tolerances, as in `torch.allclose`.
        grad_sample_mode: accepted: all modes give the same gradients.

    Raises:
        RuntimeError: the batch is empty.

    Example:
        >>> check_per_sample_gradients_are_correct(torch.randn(9, 5, 4), nn.Linear(4, 6))
        True
    """
    one_of("grad_sample_mode", grad_sample_mode, get_grad_sample_modes(use_ew=True))
    for reduction in ("sum", "mean"):
        loop, batch = compute_grad_samples_microbatch_and_opacus(
            x, module, batch_first, reduction, grad_sample_mode
        )
        for name, expected in loop.items():
            if not torch.allclose(batch[name], expected, rtol=rtol, atol=atol):
                return False
    return True


def unpack_packedsequences(X: PackedSequence) -> list[Tensor]:
    """Return the sequences that `X` holds, each [T, E], the longest first."""
    rows = _in_order(X)
    return rows if X.sorted_indices is None else [rows[i] for i in X.sorted_indices.tolist()]


def _in_order(packed: PackedSequence) -> list[Tensor]:
    """The sequences, each [T, E], in the order that they were packed in."""
    padded, lengths = pad_packed_sequence(packed, batch_first=True)
    return [row[:length] for row, length in zip(padded, lengths.tolist(), strict=True)]


def _loss(out: Any, reduction: str, *, lengths: Tensor | None = None, examples: int = 1) -> Tensor:
    """The sum over examples of the L1 norm of each one's output, or of its mean."""
    if not isinstance(out, PackedSequence):
        total = F.l1_loss(out, torch.zeros_like(out), reduction="sum")
        return total if reduction == "sum" else total * (examples / out.numel())
    assert lengths is not None
    padded, _ = pad_packed_sequence(out, batch_first=True)
    each = padded.abs().sum((1, 2))
    return (each if reduction == "sum" else each / (lengths * padded.shape[2])).sum()
