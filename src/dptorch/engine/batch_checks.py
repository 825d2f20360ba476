"""Checks of one physical batch: its rows are the loader's, and its loss is reduced as planned."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dptorch.errors import PrivacyError
from dptorch.sampling import PhysicalBatch
from dptorch.tape.provenance.tags import ONE_EXAMPLE, PER_EXAMPLE, Reduced
from dptorch.tape.recording.places import way_out_of_a_trainer

__all__ = ["check_factors", "check_rows", "gradient_scale", "planned_factors"]


def check_rows(rows: int, part: PhysicalBatch | None) -> None:
    """Check that the model was given rows, as many as the loader handed out if it is the engine's.

    Raises:
        PrivacyError: it was not.
    """
    if rows == 0:
        raise PrivacyError(
            "no argument of the model was a tensor of examples, so that its rows are not known. "
            "Call it with the batch's tensors, or with a list, tuple or dict of them."
        )
    if part is None:
        return
    expected = part.examples + part.padding
    if rows != expected:
        raise PrivacyError(
            f"the model was given {rows} rows where the loader handed out {expected} examples. Each "
            "row must be one example: augmented views of an example go on an axis of their "
            "own, so that its gradients are clipped together, and examples may not be paired, "
            "selected or mixed after the loader."
        )


def planned_factors(
    losses: Sequence[Reduced | None], rows: int, reduction: str, expected: float
) -> tuple[float, ...]:
    """Return what the terms of the losses are multiplied by, beside the planned reduction.

    Args:
        losses: how the loss of each backward was reduced, None if it was not followed.
        rows: number of examples B in the physical batch.
        reduction: the planned reduction, "mean" or "sum".
        expected: the public expected batch size.

    Returns:
        One factor for each term; none where the model returned the loss of its one row.

    Raises:
        PrivacyError: a loss was not followed, or is reduced otherwise than planned.
    """
    return tuple(
        f for loss in losses or [None] for f in _factors_of(loss, rows, reduction, expected)
    )


def gradient_scale(loss: Reduced | None, rows: int, reduction: str, expected: float) -> float:
    """Return what turns the gradients of a loss into those of each example's own loss.

    Under a mean that is the number of rows, which the loss was divided by, or, for a sum that the
    loop divided by the expected batch size itself, that number. Arguments as of `planned_factors`.
    """
    if loss is None or reduction == "sum":
        return 1.0
    if _is_over_expected(loss, rows, expected):
        return expected
    mean = loss.kind not in (PER_EXAMPLE, ONE_EXAMPLE) or _is_over_rows(loss, rows)
    return float(rows) if mean else 1.0


def _is_over_expected(loss: Reduced, rows: int, expected: float) -> bool:
    """Whether a loss is a sum that was divided by the expected batch size.

    The loss of one example is not reduced, and may be such a sum like that of the other parts.
    """
    summed = loss.kind in ("sum", ONE_EXAMPLE) or (loss.kind == PER_EXAMPLE and rows == 1)
    return summed and _has_a_one(loss.factors, expected)


def _is_over_rows(loss: Reduced, rows: int) -> bool:
    """Whether a loss of one example was divided by the number of rows: a mean in which the others have
    no terms. `gradient_scale` undoes what the factors that are compared leave out."""
    return loss.kind == ONE_EXAMPLE and _has_a_one(loss.factors, rows)


def _has_a_one(factors: Sequence[float], times: float) -> bool:
    """Whether a term is multiplied by 1 / times and so, whatever the others have, by one."""
    return any(math.isclose(f * times, 1.0, rel_tol=1e-6) for f in factors)


def _factors_of(
    loss: Reduced | None, rows: int, reduction: str, expected: float
) -> tuple[float, ...]:
    if loss is None:
        raise PrivacyError(
            "the loss could not be followed from the model's outputs to backward(), so it may "
            "mix examples. Compute it from what the model returns (tensors in tuples, lists, "
            "dicts or dataclasses) with torch functions, and call loss.backward()."
        )
    kind, factors = loss.kind, loss.factors
    if reduction == "mean" and _is_over_expected(loss, rows, expected):
        return tuple(f * expected for f in factors)
    of_one = kind == ONE_EXAMPLE and not (reduction == "mean" and _is_over_rows(loss, rows))
    if kind in (PER_EXAMPLE, reduction) or rows == 1 or of_one:
        return factors
    # A sum divided by the number of rows is a mean, and a mean times it a sum.
    scale = rows if reduction == "mean" else 1 / rows
    if not _has_a_one(factors, scale):
        raise PrivacyError(
            f"the loss is a {kind} over the examples, but the engine was told "
            f"loss_reduction={reduction!r}: gradients would be off by the "
            f"batch size. Use loss_reduction={kind!r}, without dividing by anything that "
            f"depends on the batch; a sum divided by the expected batch size, {expected:g}, is a mean."
            + way_out_of_a_trainer()
        )
    return tuple(f * scale for f in factors)


def check_factors(factors: tuple[float, ...], before: tuple[float, ...]) -> None:
    """Check that the terms of the loss are multiplied by what they were multiplied by before.

    Raises:
        PrivacyError: a factor changed, so it may depend on the batch.
    """
    if len(before) != len(factors) or not all(
        math.isclose(f, g, rel_tol=1e-6) for f, g in zip(factors, before, strict=True)
    ):
        raise PrivacyError(
            f"the terms of the loss are multiplied by {_list(factors)}, before by "
            f"{_list(before)}. A factor that depends on the batch (a number of tokens, a sum of "
            "weights) lets one example rescale all others. Use public constants, and the "
            "learning rate for a schedule of the whole loss. A weight of one term that follows a "
            "public schedule is said to: dptorch.tape.public_number(weight) * term."
            + way_out_of_a_trainer()
        )


def _list(factors: tuple[float, ...]) -> str:
    return ", ".join(f"{f:.6g}" for f in factors)
