"""BloGSSFTTrainer: ForgetNet's trainer on today's TRL (pip install 'dptorch[trl]').

Under the shuffle it is `SFTTrainer` with a callback. Under the Gaussian mechanism batches, loss and
step must be what the guarantee is about, so three of the Trainer's methods are replaced: its loader
gives Poisson batches, one *logical* batch at a time; its training step runs the parts of one; and the
loss of a record is the mean over the record's own tokens, as a mean over all tokens of a batch would
let the length of one record rescale the others.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from dptorch.blogs.blogs_engine import MECHANISMS, make_steps
from dptorch.blogs.index_statement import BloGSSpent, BloGSStatement
from dptorch.blogs.noisy_steps import NoisySteps
from dptorch.blogs.shuffled_steps import ShuffledSteps
from dptorch.errors import ConfigurationError, one_of
from dptorch.sampling import PhysicalBatch, PrivateLoader
from dptorch.statement import Statement

__all__ = ["BloGSSFTTrainer"]

_STATE = "dptorch_engine.pt"  # in a checkpoint's folder: steps done, and the key of the noise


class BloGSSFTTrainer(SFTTrainer):
    """TRL's `SFTTrainer` with DP-BloGS, or with noise, between the last backward and the step.

    ``mechanism="shuffle"``: the gradients that the Trainer has accumulated, and clipped to
    ``args.max_grad_norm`` (0 leaves all clipping to BloGS), are clipped tensor by tensor and their
    blocks shuffled, once for each optimizer step. **That gives no privacy guarantee**; see
    `dptorch.blogs`. Every entry of ``state.log_history`` has ``nominal_epsilon``, the BloGS index.

    ``mechanism="gaussian"``: differentially private, see `dptorch.blogs.noisy_steps`. A step draws
    ``per_device_train_batch_size * gradient_accumulation_steps`` records in the mean, at most
    ``per_device_train_batch_size`` at a time. Entries have ``epsilon`` and ``delta``.

    Loss and metrics in the log are exact functions of private data under either.

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
        config = _config(args, dataset_text_field)
        if config.fp16:
            raise ConfigurationError(
                "fp16=True scales the loss, and with it the gradients that would be clipped. Use "
                "bf16=True, or neither."
            )
        batch_size = config.train_batch_size * config.gradient_accumulation_steps
        self._records: PrivateLoader | None = None
        if mechanism == "gaussian":
            _refuse_mixed_rows(config)
            # A step takes one logical batch, whose parts the training step runs.
            config.gradient_accumulation_steps = 1
            config.max_grad_norm = 0.0
            config.ignore_data_skip = True  # the sampler knows where it is
        super().__init__(
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
            # A run resumed within an epoch would count the epochs that remain otherwise.
            self.args.max_steps = self._blogs.engine.plan.steps

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

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add what is spent so far to every entry."""
        spent = self.get_privacy_spent()
        if spent.nominal_epsilon is None:
            named = {"epsilon": float(spent), "delta": spent.delta}
        else:
            named = {"nominal_epsilon": spent.nominal_epsilon}
        super().log({**logs, **named}, *args, **kwargs)

    def get_privacy_spent(self) -> BloGSSpent:
        """What is spent so far: formats as a float, unpacks as (epsilon, delta)."""
        return self._blogs.spent()

    def privacy_statement(self) -> BloGSStatement | Statement:
        """What the run does and does not guarantee; ``print`` it."""
        return self._blogs.statement()

    # -- the Gaussian mechanism --------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        """The Trainer's own, or logical batches of a Poisson sample."""
        if not isinstance(getattr(self, "_blogs", None), NoisySteps):
            return super().get_train_dataloader()
        assert isinstance(self._blogs, NoisySteps)
        self._records = self._blogs.loader(
            self._remove_unused_columns(self.train_dataset, description="Training"),
            max_physical_batch_size=self.args.train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
        )
        return _LogicalBatches(self._records)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, attached to the engine."""
        optimizer = super().create_optimizer(*args, **kwargs)
        engine = getattr(optimizer, "privacy_engine", None)
        if isinstance(self._blogs, NoisySteps) and engine is None:
            self._blogs.attach(optimizer)
        return optimizer

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Forward and backward of one batch, or of all parts of a logical one."""
        base: Any = super()
        if not isinstance(self._blogs, NoisySteps):
            return base.training_step(model, inputs, num_items_in_batch)
        losses = []
        for part, is_last in inputs["parts"]:
            losses.append(base.training_step(model, part))
            if not is_last:
                wrapped: Any = self.optimizer
                wrapped.optimizer.virtual_step()
        return torch.stack(losses).mean()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The Trainer's, or in private training the mean over records of each one's own mean."""
        base: Any = super()
        if not (isinstance(self._blogs, NoisySteps) and model.training):
            return base.compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs.pop("labels")
        outputs = model(**inputs, use_cache=False)
        logits = outputs.logits[:, :-1].transpose(1, 2)
        loss = F.cross_entropy(logits, labels[:, 1:], ignore_index=-100)
        return (loss, outputs) if return_outputs else loss

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        base: Any = super()
        base._save_checkpoint(model, trial)
        if isinstance(self._blogs, NoisySteps):
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            torch.save(self._blogs.state_dict(), folder / _STATE)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As `SFTTrainer.train`; a resumed run goes on with the checkpoint's steps and key."""
        if resume_from_checkpoint and isinstance(self._blogs, NoisySteps):
            folder = resume_from_checkpoint
            if folder is True:
                folder = get_last_checkpoint(self.args.output_dir)
            file = Path(str(folder)) / _STATE
            if not file.is_file():
                raise ConfigurationError(
                    f"{file} is missing, so it is not known what the checkpoint's steps have spent. "
                    "Resume from a checkpoint of a BloGSSFTTrainer with mechanism='gaussian'."
                )
            self._blogs.load_state_dict(torch.load(file, weights_only=True))
        return super().train(resume_from_checkpoint, *args, **kwargs)


class _LogicalBatches:
    """A private loader by logical batches: each is ``{"parts": iterator of (inputs, is last)}``.

    The parts are drawn as the iterator is, as the engine follows which part is in the model.
    """

    def __init__(self, loader: PrivateLoader) -> None:
        self._loader = loader
        self.dataset = loader.dataset
        self._part: PhysicalBatch | None = None
        loader.on_batch(self._note)

    def _note(self, part: PhysicalBatch) -> None:
        self._part = part

    def __len__(self) -> int:
        return self._loader.steps_left

    def __iter__(self) -> Iterator[dict[str, Any]]:
        batches = iter(self._loader)
        for _ in range(len(self)):
            yield {"parts": self._parts(batches)}

    def _parts(self, batches: Iterator[Any]) -> Iterator[tuple[Any, bool]]:
        for inputs in batches:
            assert self._part is not None
            is_last = self._part.is_last
            yield inputs, is_last
            if is_last:
                return


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


def _refuse_mixed_rows(config: SFTConfig) -> None:
    """A row must be one record, and the loss the records' own.

    Raises:
        ConfigurationError: naming the setting.
    """
    for name in ("packing", "padding_free", "use_liger_kernel"):
        if getattr(config, name, False):
            raise ConfigurationError(
                f'{name}=True joins records or replaces the loss, but mechanism="gaussian" clips each '
                "record by itself. Leave it off."
            )
    if config.loss_type != "nll":
        raise ConfigurationError(
            f'loss_type={config.loss_type!r}: mechanism="gaussian" trains with "nll".'
        )


def _config(args: TrainingArguments | None, dataset_text_field: str | None) -> SFTConfig:
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
