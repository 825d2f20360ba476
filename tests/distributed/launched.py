"""Runs a program as a worker of `accelerate launch`, on a machine without GPUs:

    accelerate launch --config_file FILE tests/distributed/launched.py PROGRAM ARGUMENTS...

Where the configuration asks for FSDP2, which accelerate leaves out without GPUs, the program runs
twice: as it is, which is refused, and in shards.
"""

from __future__ import annotations

import os
import runpy
import sys
from typing import Any

__all__ = ["leave_out_shared_memory", "shard_on_cpus"]


def shard_on_cpus() -> None:
    """Make accelerate shard where there is no GPU, which it leaves out in silence."""
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin

    plain = Accelerator.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **more: Any) -> None:
        plain(self, *args, fsdp_plugin=fsdp_plugin, **more)
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and fsdp_plugin is None:
            fsdp_plugin = FullyShardedDataParallelPlugin()  # of what the launcher left
        if fsdp_plugin is not None:
            self.state.distributed_type, self.state.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    Accelerator.__init__ = init


def leave_out_shared_memory() -> None:
    """Keep DeepSpeed from compiling an operator for shared memory, once a machine and with a lock."""
    import deepspeed  # noqa: F401

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]


def main(program: str) -> None:
    import tests.oracles.torchvision_on_cpu  # noqa: F401

    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        leave_out_shared_memory()
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        from dptorch.errors import ConfigurationError

        try:
            runpy.run_path(program, run_name="__main__")
        except ConfigurationError as error:
            print(f"refused: {error}", flush=True)
        shard_on_cpus()
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    del sys.argv[0]
    main(sys.argv[0])
