"""Smaller parts of a logical batch, where memory does not suffice for those that were asked for."""

from __future__ import annotations

from typing import Final

import torch

from dptorch.engine.privacy_engine import PrivacyEngine
from dptorch.errors import warn

__all__ = ["can_halve", "halve", "is_out_of_memory"]

#: How torch says so where it raises no class of its own.
_SAID: Final = ("out of memory", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that memory did not suffice.

    Example:
        >>> is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))
        True
    """
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(said in str(error) for said in _SAID)
    )


def can_halve(engine: PrivacyEngine, rows: int, error: BaseException) -> bool:
    """Whether parts of fewer than `rows` rows may help against `error`: no other rank waits for a part
    of this size."""
    return rows > 1 and engine.ranks.size == 1 and is_out_of_memory(error)


def halve(engine: PrivacyEngine, rows: int, advice: str = "") -> int:
    """Drop the logical batch that has begun, warn, and return how many rows its parts have next.

    The caller hands the batch out again: a draw is a function of the key and the step, so that it is
    the same batch. Call it outside the handler of the error, whose traceback holds the tensors of the
    part that failed.

    Args:
        rows: of the parts that did not fit.
        advice: said at the end of the warning.
    """
    engine.drop_batch()
    fewer = max(1, rows // 2)
    for device in (torch.cuda, torch.xpu, torch.mps):
        if device.device_count():
            device.empty_cache()
    warn(
        f"out of memory with {rows} examples in the model: from here on {fewer}. Logical batches, "
        f"noise and epsilon stay as planned. {advice}".strip()
    )
    return fewer
