"""A Trainer's model under FSDP2: accelerate shards it before the engine is made, and not in `train`."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from dptorch.errors import ConfigurationError

__all__ = ["sharded"]


def sharded(trainer: Any, *, loss_chunk: int | None) -> nn.Module:
    """Return the model of a Trainer as its engine will train it: in shards, if ``fsdp=True`` or
    ``accelerate launch`` with FSDP asked for that.

    Raises:
        ConfigurationError: for a way of sharding that is not covered.
    """
    model: nn.Module = trainer.model
    if not trainer.is_fsdp_enabled:
        if trainer.args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            raise ConfigurationError(
                "FSDP was asked for, and accelerate leaves the model whole: it shards on several GPUs "
                "only. Leave it out, with `accelerate launch --multi_gpu` in its place, which starts "
                "processes on CPUs too and keeps the model whole on each. A loop of your own shards on "
                "CPUs too: see docs/scale.md."
            )
        return model
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ConfigurationError(
            "fsdp_version=1 keeps all parameters of a module in one vector, in which those of a layer "
            "cannot be told apart. Use version 2: fsdp_config={'version': 2}, or --fsdp_version 2 of "
            "`accelerate launch`."
        )
    if plugin.activation_checkpointing:
        raise ConfigurationError(
            "FSDP's own activation_checkpointing wraps modules when the engine knows them. Leave it "
            "out of fsdp_config, and use TrainingArguments(activation_checkpointing=True)."
        )
    if loss_chunk is not None:
        raise ConfigurationError(
            f"loss_chunk={loss_chunk} reads the head's weight outside of its forward pass, where each "
            "process has a shard of it. Leave it out under FSDP."
        )
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from transformers.distributed.fsdp import update_fsdp_plugin_peft

    if hasattr(model, "peft_config"):
        update_fsdp_plugin_peft(model, trainer.accelerator)
    found: nn.Module = fsdp2_prepare_model(trainer.accelerator, model)
    return found
