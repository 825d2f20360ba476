"""ForgetNet's trainer (pip install 'dptorch[trl]')."""

from __future__ import annotations

from typing import Any

from dptorch.blogs import trl_trainer as trl
from dptorch.compat.forgetnet.engine import with_minimum

__all__ = ["BloGSSFTTrainer"]


class BloGSSFTTrainer(trl.BloGSSFTTrainer):
    """`dptorch.blogs.BloGSSFTTrainer` that, as ForgetNet's does, goes on where a target is below what
    blocks of one coordinate have.

    Args:
        args, kwargs: see `dptorch.blogs.BloGSSFTTrainer`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        options = with_minimum(
            kwargs.pop("mechanism_options", None) or {}, kwargs.get("mechanism", "shuffle")
        )
        super().__init__(*args, mechanism_options=options, **kwargs)
