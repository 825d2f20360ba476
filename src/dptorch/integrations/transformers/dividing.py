"""A Trainer's model under DeepSpeed: ``deepspeed.initialize`` has to come before the engine, and so
does not wait for `train`."""

from __future__ import annotations

from typing import Any

from torch import nn

from dptorch.distributed import Ranks
from dptorch.errors import ConfigurationError

__all__ = ["divided", "prepared"]


def divided(trainer: Any, *, steps: int, loss_chunk: int | None) -> nn.Module:
    """Return the model of a Trainer as ``deepspeed.initialize`` returned it, if DeepSpeed trains it.

    The Trainer then has its optimizer, and its scheduler where the configuration names one.

    Args:
        trainer: before its engine is made.
        steps: how many it will take.
        loss_chunk: of `PrivateTrainer`.

    Raises:
        ConfigurationError: for `loss_chunk` under ZeRO-3, or where accelerate knows of fewer processes.
    """
    model: nn.Module = trainer.model
    if not trainer.is_deepspeed_enabled:
        return model
    plugin = trainer.accelerator.state.deepspeed_plugin
    if trainer.args.world_size != (there := Ranks.of().size):
        raise ConfigurationError(
            f"accelerate counts {trainer.args.world_size} process, and DeepSpeed trains on {there}. "
            "Without GPUs use `accelerate launch` with a DeepSpeed configuration, and "
            'ddp_backend="gloo" in the training arguments.'
        )
    if loss_chunk is not None and plugin.zero_stage == 3:
        raise ConfigurationError(
            f"loss_chunk={loss_chunk} reads the head's weight outside of its forward pass, where each "
            "process has a part of it under ZeRO-3. Leave it out, or use stage 2."
        )
    from transformers.integrations.deepspeed import deepspeed_init

    # As the arguments are now: a step is one logical batch, whose noisy gradient is not scaled.
    config = plugin.hf_ds_config.config
    rows = trainer.args.per_device_train_batch_size
    config |= {
        "gradient_accumulation_steps": 1,
        "train_micro_batch_size_per_gpu": rows,
        "train_batch_size": rows * trainer.args.world_size,
        "gradient_clipping": 0.0,
    }
    plugin.deepspeed_config = config
    optimizer, scheduler = deepspeed_init(trainer, num_training_steps=steps)
    given = (model, optimizer) if scheduler is None else (model, optimizer, scheduler)
    found, trainer.optimizer, *made = trainer.accelerator.prepare(*given)
    trainer.accelerator.deepspeed_engine_wrapped = None  # or `train` would begin by destroying it
    trainer.lr_scheduler = made[0] if made else None
    trainer.model_wrapped = trainer.deepspeed = found
    return found


def prepared(trainer: Any, max_steps: int, loader: Any, checkpoint: Any) -> tuple[Any, Any]:
    """Do what a Trainer does before its loop, for a model that `divided` returned.

    Returns:
        model and loader.
    """
    from accelerate.utils import DeepSpeedEngineWrapper
    from transformers.integrations.deepspeed import deepspeed_load_checkpoint
    from transformers.trainer_utils import _is_peft_model

    trainer.create_scheduler(num_training_steps=max_steps)
    model = trainer.model_wrapped = trainer.deepspeed
    accelerator = trainer.accelerator  # which `train` has made forget it
    accelerator.deepspeed_engine_wrapped = DeepSpeedEngineWrapper(model)
    accelerator._models, accelerator._optimizers = [model], [trainer.optimizer]
    if checkpoint is not None:
        whole = not _is_peft_model(trainer.model)
        deepspeed_load_checkpoint(model, checkpoint, load_module_strict=whole)
        trainer._load_optimizer_and_scheduler(checkpoint)
    for name in ("model", "optimizer", "lr_scheduler"):
        setattr(trainer.callback_handler, name, getattr(trainer, name))
    trainer.callback_handler.train_dataloader = loader
    return model, loader
