"""BloGSSFTTrainer: ForgetNet's trainer on today's TRL (pip install 'dptorch[trl]').

Under the shuffle it is `SFTTrainer` with a callback. Under the Gaussian mechanism batches, loss and
step must be what the guarantee is about: `PrivateTrainer` takes them from the engine of `NoisySteps`.
"""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any

from transformers import TrainerCallback, TrainingArguments
from trl.trainer.sft_trainer import SFTTrainer

from dptorch.blogs.blogs_engine import MECHANISMS, make_steps
from dptorch.blogs.index_statement import BloGSSpent, BloGSStatement
from dptorch.blogs.noisy_steps import NoisySteps
from dptorch.blogs.shuffled_steps import ShuffledSteps
from dptorch.errors import ConfigurationError, one_of
from dptorch.integrations.transformers.manifest import settle
from dptorch.integrations.transformers.privacy_arguments import PrivacyArguments
from dptorch.integrations.transformers.private_trainer import PrivateTrainer
from dptorch.integrations.transformers.sft_trainer import WholeHeadSFTTrainer, sft_config
from dptorch.statement import Statement

__all__ = ["BloGSSFTTrainer"]


class BloGSSFTTrainer(PrivateTrainer, WholeHeadSFTTrainer):
    """TRL's `SFTTrainer` with DP-BloGS, or with noise, between the last backward and the step.

    ``mechanism="shuffle"``: the gradients that the Trainer has accumulated, and clipped to
    ``args.max_grad_norm`` (0 leaves all clipping to BloGS), are clipped tensor by tensor and their
    blocks shuffled, once for each optimizer step. **That gives no privacy guarantee**; see
    `dptorch.blogs`. Every entry of ``state.log_history`` has ``nominal_epsilon``, the BloGS index.

    ``mechanism="gaussian"``: differentially private, see `dptorch.blogs.noisy_steps`. A step draws
    ``per_device_train_batch_size * gradient_accumulation_steps`` records in the mean, at most
    ``per_device_train_batch_size`` at a time. Entries have ``epsilon`` and ``delta``.

    Loss and metrics in the log are exact functions of private data under either; under "gaussian" their
    names begin with ``not_private_``.

    Args:
        model: a causal language model or its path; frozen parameters and PEFT adapters work.
        args: `SFTConfig`, or `TrainingArguments`, as they were used in 2024.
        train_dataset, eval_dataset: `datasets.Dataset`.
        tokenizer: what TRL now calls processing_class.
        dataset_text_field: the column with the text, over that of `args`.
        target_epsilon: the index, or ε, at which training stops.
        delta, clip_value: see `dptorch.blogs.BloGSPrivacyEngine`.
        dataset_size: number of records, by default that of `train_dataset`.
        mechanism: "shuffle" or "gaussian".
        mechanism_options: for "shuffle" index, allocation, on_unattainable, see `ShuffledSteps`; for
            "gaussian" allocation, weights, shuffle_blocks, see `NoisySteps`.
        seed: for tests: randomness from a number.
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
        mechanism: str = "shuffle",
        mechanism_options: dict[str, Any] | None = None,
        seed: int | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        for name in trainer_kwargs:
            one_of("argument", name, _trainer_arguments())
        one_of("mechanism", mechanism, MECHANISMS)
        if tokenizer is not None:
            trainer_kwargs["processing_class"] = tokenizer
        config = copy.copy(sft_config(args))
        if dataset_text_field is not None:
            config.dataset_text_field = dataset_text_field
        if config.fp16:
            raise ConfigurationError(
                "fp16=True scales the loss, and with it the gradients that would be clipped. Use "
                "bf16=True, or neither."
            )
        batch_size = config.train_batch_size * config.gradient_accumulation_steps
        self.privacy = PrivacyArguments(target_epsilon=target_epsilon, target_delta=delta)
        if mechanism == "gaussian":
            config = settle(config, self.privacy)
        SFTTrainer.__init__(
            self,
            model=model,
            args=config,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **trainer_kwargs,
        )
        size = dataset_size or _length(self.train_dataset)
        self._blogs = make_steps(
            self.model,  # type: ignore[arg-type]
            mechanism,
            target_epsilon=target_epsilon,
            delta=delta,
            clip_value=clip_value,
            steps=self._optimizer_steps(batch_size, size if mechanism == "gaussian" else None),
            batch_size=batch_size,
            dataset_size=size,
            seed=seed,
            **(mechanism_options or {}),
        )
        if isinstance(self._blogs, ShuffledSteps):
            self.add_callback(_ShuffleBeforeStep(self._blogs))
        else:
            self._bind(self._blogs.engine)

    def _optimizer_steps(self, batch_size: int, sampled_from: int | None) -> int:
        """Steps of the whole run, from the loader that it will use."""
        if self.args.max_steps > 0:
            return int(self.args.max_steps)
        if sampled_from is not None:
            a_epoch = max(1, round(sampled_from / min(batch_size, sampled_from)))
            return math.ceil(self.args.num_train_epochs * a_epoch)
        batches = _length(self.get_train_dataloader())
        if batches is None:
            raise ConfigurationError(
                "the training data has no length, so the number of steps is not known. Set "
                "max_steps in the training arguments."
            )
        a_epoch = max(1, math.ceil(batches / self.args.gradient_accumulation_steps))
        return math.ceil(self.args.num_train_epochs * a_epoch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what is spent so far to every entry."""
        nominal = self._blogs.spent().nominal_epsilon
        super().log(logs if nominal is None else logs | {"nominal_epsilon": nominal}, start_time)

    def get_privacy_spent(self) -> BloGSSpent:  # type: ignore[override]
        """What is spent so far: formats as a float, unpacks as (epsilon, delta)."""
        return self._blogs.spent()

    def privacy_statement(self) -> BloGSStatement | Statement:  # type: ignore[override]
        """What the run does and does not guarantee; ``print`` it."""
        return self._blogs.statement()

    def _attach(self, optimizer: Any) -> None:
        assert isinstance(self._blogs, NoisySteps)
        self._blogs.attach(optimizer)


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
