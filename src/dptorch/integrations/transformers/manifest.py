"""What becomes of every training argument of transformers and TRL under differential privacy.

Each field of `TrainingArguments`, `Seq2SeqTrainingArguments` and `SFTConfig` is in exactly one of four
tables: kept as it is; changed (by `settle`, which says so); refused, with the reason and the way out;
or ignored. `test_every_field_has_one_entry` fails when a release adds a field, and `settle` refuses a
field that it does not know where it has another value than its default.

Read from transformers 5.23 and TRL 1.16.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from dptorch.errors import ConfigurationError, warn
from dptorch.integrations.transformers.privacy_arguments import PrivacyArguments

__all__ = ["CHANGED", "IGNORED", "KEPT", "REFUSED", "Change", "Refusal", "settle"]


@dataclass(frozen=True)
class Change:
    """An argument that is given another value.

    Attributes:
        value: what it is set to.
        why: said where the user had chosen a value; empty where what was chosen still holds.
    """

    value: Any
    why: str


@dataclass(frozen=True)
class Refusal:
    """An argument of which only some values are honoured.

    Attributes:
        allowed: the values, or a function that says whether a value is one.
        why: the reason, and the way out.
        unless: "public evaluation" or "packed sequence" where that makes every value sound.
    """

    allowed: tuple[Any, ...] | Callable[[Any], bool]
    why: str
    unless: str = ""

    def honours(self, value: Any) -> bool:
        """Whether a run can honour `value`."""
        return self.allowed(value) if callable(self.allowed) else value in self.allowed


_OFF: Final = (None, False, "", "no", 0)

#: What does not touch the guarantee: post-processing of noisy gradients, names, places, evaluation.
KEPT: Final = frozenset({
    "output_dir", "per_device_train_batch_size", "num_train_epochs", "max_steps", "learning_rate",
    "lr_scheduler_kwargs", "warmup_steps", "optim_args", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon", "label_smoothing_factor", "bf16", "bf16_full_eval", "fp16_full_eval", "tf32",
    "activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "use_cache", "torch_empty_cache_steps", "logging_strategy", "logging_steps",
    "logging_first_step", "log_on_each_node", "logging_nan_inf_filter", "log_level",
    "log_level_replica", "disable_tqdm", "report_to", "run_name", "project", "trackio_space_id",
    "trackio_bucket_id", "trackio_static_space_id", "eval_strategy", "eval_steps", "eval_delay",
    "per_device_eval_batch_size", "prediction_loss_only", "eval_on_start", "eval_do_concat_batches",
    "eval_use_gather_object", "eval_accumulation_steps", "include_for_metrics",
    "batch_eval_metrics", "save_only_model", "save_steps", "save_on_each_node", "save_total_limit",
    "enable_jit_checkpoint", "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id",
    "hub_always_push", "hub_revision", "metric_for_best_model", "greater_is_better",
    "restore_callback_states_from_checkpoint", "full_determinism", "use_cpu",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
    "dataloader_prefetch_factor", "dataloader_multiprocessing_context", "remove_unused_columns",
    "label_names", "debug", "skip_memory_metrics", "do_train", "do_eval", "do_predict",
    "resume_from_checkpoint", "predict_with_generate", "generation_max_length",
    "generation_num_beams", "generation_config", "model_init_kwargs", "trust_remote_code",
    "chat_template_path", "dataset_text_field", "dataset_kwargs", "dataset_num_proc", "eos_token",
    "max_length", "truncation_mode", "shuffle_dataset", "pad_to_multiple_of", "eval_packing",
    "fsdp", "fsdp_config",  # accelerate's FSDP2: see `sharding`
    "deepspeed",  # ZeRO: see `dividing`
    "completion_only_loss", "assistant_only_loss", "activation_offloading", "pad_token",
})  # fmt: skip

CHANGED: Final = {
    # per_device_train_batch_size * gradient_accumulation_steps is the expected logical batch: the union
    # of several draws would not be the draw that is accounted.
    "gradient_accumulation_steps": Change(1, ""),
    "average_tokens_across_devices": Change(
        False, "a count of all examples' tokens would let one rescale the others"
    ),
    "max_grad_norm": Change(
        0.0,
        "it would clip the noisy sum once more; the bound on a record's gradient is "
        "PrivacyArguments.max_grad_norm",
    ),
    # It would train again after steps were released. `PrivateTrainer.training_step` halves parts.
    "auto_find_batch_size": Change(False, ""),
    "torch_compile": Change(
        False, "every operation is looked at, so that a compiled model would run as it is written"
    ),
    "torch_compile_backend": Change(None, ""),
    "torch_compile_mode": Change(None, ""),
    "ignore_data_skip": Change(True, ""),  # the sampler knows the step that is due
    "include_num_input_tokens_seen": Change("no", "the number of tokens is not private"),
    "dataloader_drop_last": Change(False, "a drawn batch is never cut"),
    # Batch statistic of mixtures of experts; where it stays on, the tape refuses the loss.
    "router_aux_loss_coef": Change(0.0, "the auxiliary loss is a statistic of the whole batch"),
}

#: Learning rates by the step alone.
_SCHEDULES: Final = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
    "inverse_sqrt", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay",
)  # fmt: skip

_WHOLE_MODEL: Final = (
    "is not covered: its gradients would be averaged before they are clipped one by one. Leave it out: "
    "torchrun or `accelerate launch` trains on several processes, each with the whole model, or with a "
    "part of it under fsdp=True or deepspeed=.... gradient_accumulation_steps makes large batches fit."
)
_SELECTS: Final = (
    "chooses by looking at the evaluation data, which no epsilon here covers. Leave it out, or say "
    "PrivacyArguments(eval_is_public=True) if that data is public."
)
_JOINS: Final = "joins records in one row, whose gradients could not be told apart. Leave it off."
_NO_STEP: Final = (
    "updates parameters inside the backward, or looks at each gradient before noise is added. Use "
    "'adamw_torch' or another optimizer that steps after the backward."
)

REFUSED: Final = {
    "fp16": Refusal(
        _OFF,
        "scales the loss, and with it the gradients that are clipped. Use bf16=True, or neither.",
    ),
    "use_liger_kernel": Refusal(
        _OFF, "its kernels use parameters where gradients of single examples cannot be followed."
    ),
    "liger_kernel_config": Refusal(_OFF, "belongs to use_liger_kernel, which is refused."),
    "neftune_noise_alpha": Refusal(
        _OFF,
        "scales its noise by the padded length of the batch, so by the longest of the other records. "
        "Leave it out.",
    ),
    "optim": Refusal(
        lambda name: not any(part in name for part in ("lomo", "galore", "apollo")), _NO_STEP
    ),
    "optim_target_modules": Refusal(_OFF, _NO_STEP),
    "load_best_model_at_end": Refusal(_OFF, _SELECTS, "public evaluation"),
    "save_strategy": Refusal(("no", "steps", "epoch"), _SELECTS, "public evaluation"),
    "lr_scheduler_type": Refusal(
        _SCHEDULES,
        _SELECTS,
        "public evaluation",
    ),
    "hub_strategy": Refusal(
        ("end", "every_save"),
        "uploads checkpoints, with the exact losses in trainer_state.json. Use 'every_save' or 'end'.",
    ),
    "parallelism_config": Refusal(_OFF, _WHOLE_MODEL),
    "dataloader_in_order": Refusal(
        (True,), "parts of different batches would arrive mixed. Leave it True."
    ),
    "train_sampling_strategy": Refusal(
        ("random",),
        "orders records by each other, but batches are drawn at random, as the accounting says. Leave "
        "it 'random'; PrivacyArguments.sampling names the schemes that are accounted.",
    ),
    "packing": Refusal(
        _OFF,
        "packs texts of several records into one row, and adding one record moves the others. Leave it "
        "off, or say PrivacyArguments(unit='packed sequence') if protecting one packed row is what is "
        "wanted, with packing_strategy='wrapped', which keeps rows apart.",
        "packed sequence",
    ),
    "padding_free": Refusal(_OFF, _JOINS),
    "loss_type": Refusal(
        ("nll", "chunked_nll"),
        "takes TRL's fused head, which gradients cannot be followed through. Use 'nll'.",
    ),
}

#: What has no effect, and why that is right.
IGNORED: Final = {
    "seed": "shuffles nothing: the sampler and the noise draw from the run's own key",
    "data_seed": "as seed",
    "accelerator_config": "batches come from the engine's loader, which accelerate does not re-shard",
    "sortish_sampler": "lengths order nothing",
    "length_column_name": "lengths order nothing",
    "packing_strategy": "packing is refused, or the packed row is the unit",
    "ddp_find_unused_parameters": "DistributedDataParallel averages nothing: the engine adds up",
    "ddp_bucket_cap_mb": "DistributedDataParallel averages nothing: the engine adds up",
    "ddp_broadcast_buffers": "DistributedDataParallel averages nothing: the engine adds up",
    "ddp_static_graph": "DistributedDataParallel averages nothing: the engine adds up",
    "ddp_backend": "DistributedDataParallel averages nothing: the engine adds up",
    "ddp_timeout": "DistributedDataParallel averages nothing: the engine adds up",
    "local_rank": "set by the launcher",
}


def settle(args: Any, privacy: PrivacyArguments) -> Any:
    """A copy of training arguments that is sound under `privacy`; the caller's object stays as it is.

    Warns once of all changes that the user may not expect.

    Raises:
        ConfigurationError: an argument has a value that is refused.
    """
    settled = copy.copy(args)
    sound = {"public evaluation": privacy.eval_is_public}
    sound["packed sequence"] = (
        privacy.unit == "packed sequence" and getattr(args, "packing_strategy", "") == "wrapped"
    )
    said = []
    for field in dataclasses.fields(args):
        name = field.name
        value = _plain(getattr(args, name))
        if name in REFUSED:
            refusal = REFUSED[name]
            if not refusal.honours(value) and not sound.get(refusal.unless, False):
                raise ConfigurationError(f"{name}={value!r}: {refusal.why}")
        elif name in CHANGED:
            change = CHANGED[name]
            if value != change.value and value != _default(field) and change.why:
                said.append(f"{name}={change.value!r} instead of {value!r}: {change.why}")
            setattr(settled, name, change.value)
        elif name not in KEPT and name not in IGNORED and value != _default(field):
            raise ConfigurationError(
                f"{name}={value!r}: this argument is newer than this version of dptorch, so it is not "
                "known whether it keeps the guarantee. Leave it at its default."
            )
    if getattr(settled, "loss_type", None) == "chunked_nll":
        settled.loss_type = "nll"  # the same loss; before TRL 1.16 the default, by a fused head
    if said:
        warn("training arguments changed for privacy: " + "; ".join(said) + ".")
    return settled


def _plain(value: Any) -> Any:
    """The string of an enumeration's member; anything else as it is."""
    return getattr(value, "value", value)


def _default(field: dataclasses.Field[Any]) -> Any:
    return None if field.default is dataclasses.MISSING else _plain(field.default)
