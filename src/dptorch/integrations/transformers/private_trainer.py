"""PrivateTrainer: what makes a Hugging Face Trainer train under differential privacy.

A Trainer's loop stays as it is. It gets Poisson batches, one *logical* batch for each of its steps; its
training step runs the parts of one; and its optimizer is attached to the engine, which clips, adds
noise and counts. What else the loop does that would break the guarantee, or let exact values out, is
replaced here, method by method. Read from transformers 5.23.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from dptorch.accounting import Adjacency
from dptorch.distributed.wrappers import unwrapped
from dptorch.engine import checkpoint, out_of_memory
from dptorch.engine.privacy_engine import PrivacyEngine
from dptorch.errors import BudgetExhausted, ConfigurationError
from dptorch.integrations.transformers.chunked_loss import ChunkedLoss
from dptorch.integrations.transformers.data_checks import check_data, check_selection
from dptorch.integrations.transformers.dividing import divided, prepared
from dptorch.integrations.transformers.label_smoothing import SmoothLabels
from dptorch.integrations.transformers.logical_batches import LogicalBatches, parts_in
from dptorch.integrations.transformers.manifest import settle
from dptorch.integrations.transformers.privacy_arguments import PrivacyArguments
from dptorch.integrations.transformers.refusals import refuse_changes, refuse_private_rows
from dptorch.integrations.transformers.reporting import (
    NOT_PRIVATE,
    add_to_model_card,
    not_private_files,
    renamed,
    with_public_data,
)
from dptorch.integrations.transformers.sharding import sharded
from dptorch.plan import PrivacyPlan, PrivacySpent
from dptorch.sampling import Terms, Users, get_scheme
from dptorch.statement import Statement

__all__ = ["PRIVATE_FOLDER", "PrivateTrainer"]

if int(transformers.__version__.partition(".")[0]) < 5:
    raise ImportError(
        f"transformers {transformers.__version__}: what a private trainer replaces was read in version "
        "5. Upgrade with pip install 'transformers>=5'."
    )

#: Beside the checkpoints: one file for each, which holds the key of the noise. A Trainer's uploads
#: leave out what begins with an underscore.
PRIVATE_FOLDER: Final = "_dptorch_private"


class PrivateTrainer(Trainer):
    """The private part of `DPTrainer`, `DPSFTTrainer` and `DPSeq2SeqTrainer`; comes before the Trainer.

    Args:
        model, args, positional, trainer_kwargs: as the Trainer takes them.
            ``per_device_train_batch_size * gradient_accumulation_steps``, times the number of
            processes, is the expected size of a logical batch, a public number; at most
            ``per_device_train_batch_size`` examples go through a process's model at once. The run
            has ``max_steps`` steps, or those of ``num_train_epochs``.
        privacy: what is guaranteed.
        ledger: see `dptorch.PrivacyEngine`.
        loss_chunk: for a causal language model: how many tokens of every row have their logits in
            memory at once; None for all.

    Attributes:
        engine: the engine; None where the subclass trains without one.
        arguments_class: of `args` where none are given.
        always_causal: whether every model of this Trainer predicts the next token.

    Guarantees:
        Those of `PrivacyEngine` for the parameters, at the ε of `privacy_statement`; the loss of an
        example is the mean over its own tokens.
        Held by `test_a_step_is_the_clipped_sum_over_single_examples`.
        No file that the Trainer uploads holds the key or an exact loss
        (`test_nothing_that_is_uploaded_holds_the_key_or_a_loss`), and none has the key once the run is
        complete (`test_no_file_has_the_key_once_a_run_is_complete`).

    Raises:
        ConfigurationError: for arguments, data or a model that no private run can honour; before
            anything is spent.
    """

    engine: PrivacyEngine | None = None
    _user_ids: list[Any] | None = None
    _chunked: ChunkedLoss | None = None
    _batches: LogicalBatches
    arguments_class: type[TrainingArguments] = TrainingArguments
    always_causal = False

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *positional: Any,
        privacy: PrivacyArguments,
        ledger: Any = None,
        loss_chunk: int | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        if not isinstance(privacy, PrivacyArguments):
            raise ConfigurationError(
                f"privacy={type(privacy).__name__}: give PrivacyArguments(target_epsilon=8, "
                "target_delta=1e-6)."
            )
        if trainer_kwargs.get("model_init") is not None:
            raise ConfigurationError(
                "model_init=... makes a new model for every run, but the engine belongs to one. Give "
                "model=, and a new trainer for every run."
            )
        given = self.arguments_class() if args is None else args
        batch_size = given.per_device_train_batch_size * given.gradient_accumulation_steps
        self.privacy = privacy
        super().__init__(model, settle(given, privacy), *positional, **trainer_kwargs)
        batch_size *= self.args.world_size
        self._refuse_devices()
        check_selection(self)
        if privacy.eval_is_public:  # TRL makes other objects of what was given
            refuse_private_rows(*(trainer_kwargs.get(f"{x}_dataset") for x in ("train", "eval")))
        if self.train_dataset is None:
            raise ConfigurationError("train_dataset is missing: give the private data set.")
        check_data(self)
        self.model = self.model_wrapped = sharded(self, loss_chunk=loss_chunk)
        self._chunked = None if loss_chunk is None else self._chunked_loss(loss_chunk)
        settings: dict[str, Any] = {
            **privacy.plan_settings(),
            **self._length_of_run(batch_size),
            "clipping_mode": privacy.clipping_mode,
            "secure_rng": privacy.secure_rng,
            "seed": privacy.seed,
        }
        private_model: Any = self.model
        if self.is_deepspeed_enabled:
            private_model = divided(self, steps=settings["steps"], loss_chunk=loss_chunk)
        self._bind(PrivacyEngine(private_model, ledger=ledger, **settings))
        if self.is_deepspeed_enabled:
            self._attach(_unwrapped(self.optimizer))

    # -- set-up ------------------------------------------------------------------------------------

    def _length_of_run(self, batch_size: int) -> dict[str, Any]:
        """Batch size, number of records and steps, as plan settings."""
        privacy = self.privacy
        dataset: Any = self.train_dataset
        size = privacy.sample_size
        if size is None and Adjacency.of(privacy.adjacency or "zero-out") is Adjacency.ADD_REMOVE:
            raise ConfigurationError(
                f"adjacency={privacy.adjacency!r} protects the number of records, so that the sampling "
                "rate may not be computed from it. Give sample_size, a number that is public: an "
                "estimate will do."
            )
        if privacy.user_column is not None:
            self._user_ids = _column(dataset, privacy.user_column)
            size = size or len(Users.of(dataset, self._user_ids))
        size = size or len(dataset)
        steps = self.args.max_steps
        if steps <= 0:
            terms = get_scheme(privacy.sampling).settle(Terms(batch_size / size, batch_size, size))
            steps = math.ceil(self.args.num_train_epochs * terms.steps_per_epoch)
        return {"batch_size": batch_size, "sample_size": size, "steps": steps}

    def _bind(self, engine: PrivacyEngine) -> None:
        """Take loader, step and accounting from `engine`."""
        self.engine, self._made_for = engine, self.train_dataset
        self.args.max_steps = engine.plan.steps
        smoother: Any = SmoothLabels.in_place_of(self.label_smoother, causal=self.always_causal)
        self.label_smoother = smoother
        self.add_callback(_FollowEngine(engine))

    def _refuse_devices(self) -> None:
        if self.args.n_gpu > 1:
            raise ConfigurationError(
                f"{self.args.n_gpu} GPUs in one process would each get a copy of the model, whose "
                "gradients are averaged. Choose one with CUDA_VISIBLE_DEVICES=0."
            )

    def _chunked_loss(self, tokens: int) -> ChunkedLoss:
        if self.label_smoother is not None or self.compute_loss_func is not None:
            raise ConfigurationError(
                f"loss_chunk={tokens} is the plain loss of a language model. Leave it out, or label "
                "smoothing and a loss of your own."
            )
        chunked = ChunkedLoss(self.model, tokens)
        dataset, collate = self._columns_of_the_model()
        model: Any = self.model
        was_training = model.training
        model.eval()
        chunked.check(model, self._prepare_inputs(collate([dataset[0]])))
        model.train(was_training)
        return chunked

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: every trial is a release of its own.

        Raises:
            ConfigurationError: always; it says what covers a search.
        """
        raise ConfigurationError(
            "a search releases every trial, and this run's epsilon covers one. Train each with a new "
            "trainer; dptorch.accounting.tuned_epsilon says what the best of several costs."
        )

    # -- what is guaranteed ------------------------------------------------------------------------

    @property
    def plan(self) -> PrivacyPlan:
        """What the run commits to, known before it starts."""
        return self._engine.plan

    def get_privacy_spent(self) -> PrivacySpent:
        """(ε, δ) spent so far."""
        return self._engine.get_privacy_spent()

    def privacy_statement(self) -> Statement:
        """The statement of the run so far; ``print`` it."""
        return with_public_data(self._engine.statement(), self.privacy)

    @property
    def _engine(self) -> PrivacyEngine:
        assert self.engine is not None
        return self.engine

    # -- the loop's parts --------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        """Logical batches, drawn as the plan says."""
        if self.engine is None:
            return super().get_train_dataloader()
        dataset, collate = self._columns_of_the_model()
        workers = self.args.dataloader_num_workers
        of_workers: dict[str, Any] = {
            "prefetch_factor": self.args.dataloader_prefetch_factor,
            "persistent_workers": self.args.dataloader_persistent_workers,
            "multiprocessing_context": self.args.dataloader_multiprocessing_context,
        }
        make_loader = partial(
            self.engine.loader,
            dataset,
            user_ids=self._user_ids,
            collate_fn=collate,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            **(of_workers if workers else {}),
        )
        self._batches = LogicalBatches(
            lambda rows: make_loader(max_physical_batch_size=rows), self.args.train_batch_size
        )
        return self._batches

    def _columns_of_the_model(self) -> tuple[Any, Any]:
        """The data set and the collator, both without columns that the model does not take."""
        if hasattr(self.train_dataset, "remove_columns"):
            kept = self._remove_unused_columns(self.train_dataset, description="Training")
            return kept, self.data_collator
        collate = self._get_collator_with_removed_columns(
            self.data_collator, description="Training"
        )
        return self.train_dataset, collate

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, attached to the engine."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.engine is not None and not hasattr(_unwrapped(optimizer), "privacy_engine"):
            self._attach(optimizer)
        return optimizer

    def _attach(self, optimizer: Any) -> None:
        self._engine.attach(optimizer)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, checkpoint: Any) -> Any:
        if self.engine is not None and self.is_deepspeed_enabled:
            return prepared(self, max_steps, train_dataloader, checkpoint)
        base: Any = super()
        return base._prepare_for_training(max_steps, train_dataloader, checkpoint)

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward of all parts of a logical batch; returns the mean loss. Where memory
        does not suffice, the same batch goes through in smaller parts, and so do those to come."""
        base: Any = super()
        if self.engine is None:
            return base.training_step(model, inputs, num_items_in_batch)
        parts = parts_in(inputs)
        while True:
            try:
                return self._run_parts(base.training_step, model, parts)
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory.can_halve(self._engine, self._batches.rows, error):
                    raise
            # Not in the handler: its traceback holds the tensors of the part that failed.
            parts = self._in_smaller_parts()

    def _run_parts(self, one_step: Any, model: nn.Module, parts: Any) -> Tensor:
        total, rows = torch.zeros((), device=self.args.device), 0
        for inputs, part in parts:
            loss = one_step(model, inputs)
            total, rows = total + loss * part.examples, rows + part.examples
            if not part.is_last and not self.is_deepspeed_enabled:  # whose backward calls step()
                _unwrapped(self.optimizer).virtual_step()
        return total / max(rows, 1)

    def _in_smaller_parts(self) -> Any:
        self._batches.begin_again(out_of_memory.halve(self._engine, self._batches.rows))
        return self._batches.parts()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """In training the model's own loss, which the tape makes the mean over examples of each one's
        own mean; without the number of tokens of the batch, which would let one rescale the others."""
        base: Any = super()
        if self.engine is None or not model.training:
            return base.compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._chunked is not None:
            return self._chunked(unwrapped(model), inputs)
        try:
            return Trainer.compute_loss(self, model, inputs, return_outputs)
        except TypeError as error:
            if self.compute_loss_func is None or "NoneType" not in str(error):
                raise
            raise ConfigurationError(
                f"compute_loss_func raised: {error}. Its num_items_in_batch is None under privacy: "
                "the number of tokens or rows of a batch is secret, and dividing by it would let one "
                "example rescale the others. Return the mean over the examples of each one's own loss, "
                "such as F.cross_entropy(outputs.logits, labels)."
            ) from error

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        base: Any = super()
        return None if self.engine else base._get_num_items_in_batch(batch_samples, device)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        base: Any = super()
        return None if self.engine else base._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        base: Any = super()
        return None if self.engine else base._get_grad_norm(model, grad_norm=grad_norm)

    def floating_point_ops(self, inputs: Any) -> int:
        """The Trainer's count; 0 in private training, as it would tell the number of tokens."""
        return 0 if self.engine else super().floating_point_ops(inputs)

    # -- what is told ------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with ε and δ so far, and exact functions of private data under ``not_private_`` names;
        where the run is pushed to the hub, without those."""
        if self.engine is not None:
            logs = self._told(logs)
            epsilon, delta = self.get_privacy_spent()
            logs |= {"epsilon": epsilon, "delta": delta}
            for callback in self.callback_handler.callbacks:
                if getattr(callback, "training_bar", None) is not None:
                    callback.training_bar.set_postfix(epsilon=f"{epsilon:.3g}")
        super().log(logs, start_time)

    def _told(self, values: dict[str, float]) -> dict[str, float]:
        values = renamed(values, eval_is_public=self.privacy.eval_is_public)
        if not self.args.push_to_hub:
            return values
        return {name: v for name, v in values.items() if not name.startswith(NOT_PRIVATE)}

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """As the Trainer, under the names that `log` gives."""
        super().save_metrics(split, self._told(metrics) if self.engine else metrics, combined)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the Trainer's card, and the privacy statement into it."""
        super().create_model_card(*args, **kwargs)
        if self.engine is not None and self.is_world_process_zero():
            add_to_model_card(Path(str(self.args.output_dir)), self.privacy_statement())

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer, if no file in the output folder holds exact losses.

        Raises:
            ConfigurationError: one does; nothing is uploaded.
        """
        found = not_private_files(Path(str(self.args.output_dir)))
        if self.engine is not None and found and not self.args.push_to_hub:
            raise ConfigurationError(
                f"{', '.join(found)} in {self.args.output_dir} would be uploaded, and may hold exact "
                "losses of private data. Move them away, or train with push_to_hub=True, which keeps "
                "such values out of all files."
            )
        return super().push_to_hub(*args, **kwargs)

    # -- checkpoints -------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        base: Any = super()
        is_keeper = self.engine is not None and self._engine.ranks.is_first
        if is_keeper:
            # First: a checkpoint without its engine's state could not be gone on from.
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            file = _engine_file(folder)
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            checkpoint.write(file, {"engine": self._engine.state_dict()})
        base._save_checkpoint(model, trial)
        if is_keeper:
            for old in file.parent.glob("checkpoint-*.pt"):
                if not (folder.parent / old.stem).exists():
                    old.unlink()

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer. A resumed run goes on with the steps and the key of the checkpoint; once all
        steps are done, no file has the key any more.

        Raises:
            BudgetExhausted: all steps of the plan are done.
            ConfigurationError: the checkpoint has no state of an engine, or of another plan; or the
                trainer was changed since it was made in a way that it would have refused.
        """
        if self.engine is not None:
            refuse_changes(self, self._made_for)
            check_selection(self)
            if resume_from_checkpoint:
                self._load_engine(resume_from_checkpoint)
            if self.engine.exhausted:
                raise BudgetExhausted(
                    f"all {self.plan.steps} steps of the plan are done, at epsilon "
                    f"{self.get_privacy_spent().epsilon:.4g}. Make a new trainer for another run; its "
                    "epsilon adds to this one's."
                )
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.engine is not None and self.engine.exhausted and self.engine.ranks.is_first:
            self._forget_key(Path(str(self.args.output_dir)) / PRIVATE_FOLDER)
        return result

    def _forget_key(self, folder: Path) -> None:
        key = self._engine.state_dict()["key"]
        for file in folder.glob("checkpoint-*.pt"):
            if checkpoint.read(file)["engine"]["key"] == key:
                file.unlink()
        if folder.exists() and not any(folder.iterdir()):
            folder.rmdir()

    def _load_engine(self, given: Any) -> None:
        folder = get_last_checkpoint(str(self.args.output_dir)) if given is True else given
        if folder is None:
            return  # the Trainer says that there is no checkpoint
        file = _engine_file(Path(str(folder)))
        if not file.is_file():
            raise ConfigurationError(
                f"{file} is missing, so it is not known what the checkpoint's steps have spent. Resume "
                "from a checkpoint of a private trainer, with the folder "
                f"{PRIVATE_FOLDER} beside it. (A run whose steps are all done has none: its key is "
                "deleted.)"
            )
        self._engine.load_state_dict(checkpoint.read(file)["engine"])


class _FollowEngine(TrainerCallback):
    """Stops at the budget, and counts epochs as the engine does."""

    def __init__(self, engine: PrivacyEngine) -> None:
        self._engine = engine

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.epoch = self._engine.steps_done / self._engine.plan.terms.steps_per_epoch
        if self._engine.exhausted:
            control.should_training_stop = True


def _engine_file(checkpoint_folder: Path) -> Path:
    return checkpoint_folder.parent / PRIVATE_FOLDER / f"{checkpoint_folder.name}.pt"


def _unwrapped(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _column(dataset: Any, name: str) -> list[Any]:
    names = getattr(dataset, "column_names", None)
    if names is not None and name not in names:
        raise ConfigurationError(
            f"user_column={name!r} is not among the columns of the training data, {', '.join(names)}."
        )
    return list(dataset[name])
