"""BloGSSFTTrainer: ForgetNet's trainer on today's TRL (pip install 'dptorch[trl]')."""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any

from transformers import TrainerCallback, TrainingArguments
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from dptorch.blogs.statement import BloGSSpent, BloGSStatement
from dptorch.blogs.steps import ShuffledSteps
from dptorch.errors import ConfigurationError, one_of

__all__ = ["BloGSSFTTrainer"]


class BloGSSFTTrainer(SFTTrainer):
    """TRL's `SFTTrainer` with DP-BloGS between the last backward and the optimizer's step.

    The gradients that the Trainer has accumulated, and clipped to ``args.max_grad_norm`` (0 leaves
    all clipping to BloGS), are clipped tensor by tensor and their blocks shuffled, once for each
    optimizer step. **The shuffle gives no privacy guarantee**; see `dptorch.blogs`.

    Every entry of ``state.log_history`` has ``nominal_epsilon``, the BloGS index so far. The loss
    and gradient norms in it are exact functions of private data.

    Args:
        model: a causal language model or its path; frozen parameters and PEFT adapters work.
        args: `SFTConfig`, or `TrainingArguments`, as they were used in 2024.
        train_dataset, eval_dataset: `datasets.Dataset`.
        tokenizer: what TRL now calls processing_class.
        dataset_text_field: the column with the text, over that of `args`.
        target_epsilon: the index at which training stops.
        delta, clip_value: see `dptorch.blogs.BloGSPrivacyEngine`.
        dataset_size: number of records, by default that of `train_dataset`.
        index, allocation, on_unattainable, seed: see `ShuffledSteps`.
        trainer_kwargs: anything else that `SFTTrainer` takes, such as peft_config.

    Raises:
        ConfigurationError: for settings that cannot be met.

    Example::

        trainer = BloGSSFTTrainer(
            model=model, args=training_args, train_dataset=train_dataset, tokenizer=tokenizer,
            dataset_text_field="text", target_epsilon=8.0, delta=1e-5, clip_value=1.0)
        trainer.train()
        print(trainer.privacy_statement())
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        tokenizer: Any = None,
        dataset_text_field: str | None = None,
        target_epsilon: float = 1.0,
        delta: float = 1e-5,
        clip_value: float = 1.0,
        *,
        dataset_size: int | None = None,
        index: str = "2024",
        allocation: str = "layer",
        on_unattainable: str = "raise",
        seed: int | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        for name in trainer_kwargs:
            one_of("argument", name, _trainer_arguments())
        if tokenizer is not None:
            trainer_kwargs["processing_class"] = tokenizer
        super().__init__(
            model=model,
            args=_config(args, dataset_text_field),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **trainer_kwargs,
        )
        if self.args.fp16:
            raise ConfigurationError(
                "fp16=True scales the loss, and the gradients that BloGS would clip with it. Use "
                "bf16=True, or neither."
            )
        trained: Any = self.model
        self._blogs = ShuffledSteps(
            trained,
            target_epsilon=target_epsilon,
            delta=delta,
            clip_value=clip_value,
            steps=self._optimizer_steps(),
            batch_size=self._train_batch_size * self.args.gradient_accumulation_steps,
            dataset_size=dataset_size or _length(self.train_dataset),
            index=index,
            allocation=allocation,
            on_unattainable=on_unattainable,
            seed=seed,
        )
        self.add_callback(_ShuffleBeforeStep(self._blogs))

    def _optimizer_steps(self) -> int:
        """Steps of the whole run, from the loader that it will use."""
        if self.args.max_steps > 0:
            return int(self.args.max_steps)
        batches = _length(self.get_train_dataloader())
        if batches is None:
            raise ConfigurationError(
                "the training data has no length, so the number of steps is not known. Set "
                "max_steps in the training arguments."
            )
        a_epoch = max(1, math.ceil(batches / self.args.gradient_accumulation_steps))
        return math.ceil(self.args.num_train_epochs * a_epoch)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add what is spent so far to every entry."""
        super().log({**logs, "nominal_epsilon": float(self.get_privacy_spent())}, *args, **kwargs)

    def get_privacy_spent(self) -> BloGSSpent:
        """What is spent so far: formats as a float, unpacks as (epsilon, delta)."""
        return self._blogs.spent()

    def privacy_statement(self) -> BloGSStatement:
        """What the run does and does not guarantee; ``print`` it."""
        return self._blogs.statement()


class _ShuffleBeforeStep(TrainerCallback):
    def __init__(self, steps: ShuffledSteps) -> None:
        self._steps = steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A run resumed from a checkpoint has had the checkpoint's steps.
        self._steps.steps_done = max(self._steps.steps_done, state.global_step)
        if self._steps.exhausted:
            raise ConfigurationError(
                f"the run stands at its target, a BloGS index of {self._steps.spent():.4f} after "
                f"{self._steps.steps_done} steps. Make a trainer with a larger target_epsilon."
            )

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        if not self._steps.shuffle(optimizer):
            optimizer.zero_grad(set_to_none=True)
            control.should_training_stop = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._steps.exhausted:
            control.should_training_stop = True


def _config(args: TrainingArguments | None, dataset_text_field: str | None) -> SFTConfig | None:
    """`args` as an `SFTConfig` with that column; the caller's object stays as it is."""
    if args is None:
        args = SFTConfig()
    elif isinstance(args, SFTConfig):
        args = copy.copy(args)
    else:
        given: Any = args
        known = given.to_dict()
        known.update(hub_token=given.hub_token)  # to_dict hides it
        known.pop("push_to_hub_token", None)
        args = SFTConfig(**known)
    if dataset_text_field is not None:
        args.dataset_text_field = dataset_text_field
    return args


def _length(sized: Any) -> int | None:
    try:
        return len(sized)
    except TypeError:
        return None


def _trainer_arguments() -> list[str]:
    """What this trainer and `SFTTrainer` take."""
    mine = inspect.signature(BloGSSFTTrainer.__init__).parameters
    theirs = inspect.signature(SFTTrainer.__init__).parameters
    return [n for n in dict.fromkeys([*theirs, *mine]) if n not in ("self", "trainer_kwargs")]
