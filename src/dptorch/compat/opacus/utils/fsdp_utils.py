"""Names of ``opacus.utils.fsdp_utils``."""

from __future__ import annotations

from dptorch.compat.stand_ins import ONE_PROCESS, stand_in

__all__ = ["FSDP2Wrapper"]

FSDP2Wrapper = stand_in("FSDP2Wrapper", ONE_PROCESS)
