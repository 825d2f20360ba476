"""Wrappers that average gradients over processes: an engine trains the model inside, and adds up."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from dptorch.distributed.zero import unwrapped_from_deepspeed
from dptorch.errors import ConfigurationError

__all__ = ["silence", "silence_around", "unwrapped"]


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, which then averages nothing any more, or inside
    what ``deepspeed.initialize`` returned.

    Raises:
        ConfigurationError: for a wrapper whose gradients cannot be had one example at a time.
    """
    if type(model).__module__.startswith("torch.distributed.pipelining"):
        raise ConfigurationError(
            f"{type(model).__name__}: pipeline parallelism is not covered, since no process sees an "
            "example's whole gradient. Use fully_shard (FSDP2) on the whole model, or tensor "
            "parallelism."
        )
    if isinstance(model, DataParallel):
        raise ConfigurationError(
            "the model is in DataParallel, which runs copies of it and averages their gradients. Give "
            "the engine model.module, and start one process for each GPU: "
            "torchrun --nproc_per_node=2 train.py."
        )
    if type(model).__name__ == "FullyShardedDataParallel" or any(
        type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()
    ):
        raise ConfigurationError(
            "the model is in FullyShardedDataParallel (FSDP1), which is not covered. Use "
            "torch.distributed.fsdp.fully_shard (FSDP2)."
        )
    if isinstance(model, DistributedDataParallel):
        silence(model)
        inside: nn.Module = model.module
        return inside
    return unwrapped_from_deepspeed(model)


def silence(wrapper: DistributedDataParallel) -> None:
    """Keep DistributedDataParallel from averaging gradients: clipped sums are added up, by the engine.

    Raises:
        ConfigurationError: it casts parameters, which the engine would not see.
    """
    if getattr(wrapper, "mixed_precision", None) is not None:
        raise ConfigurationError(
            "DistributedDataParallel(mixed_precision=...) exchanges the model's parameters for copies "
            "in the forward pass. Leave it out, and use torch.autocast(dtype=torch.bfloat16)."
        )
    wrapper.require_backward_grad_sync = False
    # Both look for gradients of parameters, which there are none of in the backward.
    wrapper.find_unused_parameters = wrapper.static_graph = False


def silence_around() -> None:
    """Silence the wrapper in whose forward pass this is called, if there is one.

    So a model that was wrapped after the engine was made is trained like one that was wrapped before.
    """
    active = getattr(DistributedDataParallel, "_get_active_ddp_module", lambda: None)()
    if isinstance(active, DistributedDataParallel) and active.require_backward_grad_sync:
        silence(active)
