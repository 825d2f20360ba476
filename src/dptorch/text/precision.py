"""In which floating-point numbers a model computes; its parameters stay in float32."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Final

import torch
from torch import Tensor

__all__ = ["PRECISIONS", "computing", "suit", "wide"]

#: By the name that ``--precision`` has for it.
PRECISIONS: Final = {
    "float32": "as the model's own",
    "bf16": "products in bfloat16 (torch.autocast); norms, sums, noise and steps in float32",
}


def computing(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Within it a model computes in `precision`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def suit(model: Any, precision: str, device: torch.device) -> Any:
    """Return the model with the attention that is fastest in `precision` on `device`.

    On a CPU torch's fused attention has a slow backward in bfloat16: a step of MiniLM took 2.4 times
    as long with it as with products and a softmax.
    """
    if precision == "bf16" and device.type == "cpu":
        for module in model.modules():
            if hasattr(module, "set_attn_implementation"):
                module.set_attn_implementation("eager")
                break
    return model


def wide(logits: Tensor) -> Tensor:
    """In float32 at least, as losses are computed."""
    return logits.float() if logits.dtype.itemsize < 4 else logits
