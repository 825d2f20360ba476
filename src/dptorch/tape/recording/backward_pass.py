"""Run the backward of a followed loss: its seed, its passes, and what its tapes are told after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from dptorch.errors import PrivacyError
from dptorch.tape.gradients.tape import Tape

__all__ = ["run_backward"]

_HALF = (torch.float16, torch.bfloat16)


def run_backward(
    tapes: Sequence[Tape],
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Run ``Tensor.backward`` on a loss that `tapes` were told of.

    Args:
        tapes: all tapes that the loss may reach.
        func, args, kwargs: the call, its first argument the loss.

    Raises:
        PrivacyError: a loss whose gradient is to be multiplied by the number of rows is in half
            precision, which would round that number, and with it every example's gradient.
    """
    loss, *rest = args
    tapes = list({id(tape): tape for tape in tapes}.values())
    given = dict(zip(("gradient", "retain_graph", "create_graph", "inputs"), rest, strict=False))
    given |= kwargs
    retained = bool(given.get("retain_graph"))
    seeds = {tape.begin_backward() for tape in tapes}
    seed = seeds.pop() if len(seeds) == 1 else 1.0
    for tape in tapes:
        tape.seed = seed
    if seed != 1:
        if loss.dtype in _HALF:
            raise PrivacyError(
                f"the mean loss is a {loss.dtype} number, and dividing by the number of rows in half "
                "precision puts that number, which is secret, into every example's gradient. Take the "
                "mean in float32 and leave it there: F.cross_entropy(out, y), losses.mean() or "
                "losses.float().sum() / len(losses)."
            )
        gradient = given.get("gradient")
        given["gradient"] = torch.full_like(loss, seed) if gradient is None else gradient * seed
    if any([tape.wants_two_passes for tape in tapes]) and not _share_parameters(tapes):
        out = _in_two_passes(tapes, func, loss, given)
    else:
        out = func(loss, **given)
    for tape in tapes:
        tape.end_backward(retained=retained)
    return out


def _share_parameters(tapes: Sequence[Tape]) -> bool:
    """Whether two forward passes of one model are among them: their gradients are added up after the
    backward, so that both have to be kept until then."""
    found = [key for tape in tapes for key in tape.names]
    return len(set(found)) < len(found)


def _in_two_passes(
    tapes: Sequence[Tape], func: Callable[..., Any], loss: Tensor, given: dict[str, Any]
) -> Any:
    """Norms in the first backward; with the coefficients known, the clipped sums in the second.

    Both draw the same random numbers, where a backward draws any (a checkpoint that recomputes
    dropout); the tape compares what it sees in them.
    """
    with ExitStack() as first:
        for tape in tapes:
            first.enter_context(tape.first_of_two_passes())
        devices = [] if loss.device.type == "cpu" else [loss.device]
        with torch.random.fork_rng(devices, device_type=loss.device.type if devices else "cuda"):
            func(loss, given.get("gradient"), retain_graph=True)
    with ExitStack() as second:
        for tape in tapes:
            second.enter_context(tape.second_of_two_passes())
        return func(loss, **given)
