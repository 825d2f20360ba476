"""What a step of `DPTrainer` costs beside the `Trainer`'s, in processor time and memory.

    python -m benchmarks.trainer_step

Both run their own loops on the same random model and batch, a few steps in turns; the ratio is of
medians of processor time. Memory is the most that torch's allocator held during two steps, counted,
above the model and the data. The third column is a Trainer whose model is Opacus's `GradSampleModule`,
as dp-transformers' `OpacusDPTrainer` is, for its memory alone.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from typing import Any

import torch
from torch import nn

from dptorch.bench.memory import allocator_peak
from dptorch.training.packages import hide_broken_torchvision

hide_broken_torchvision()

from transformers import (  # noqa: E402
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from dptorch.integrations.transformers import DPTrainer, PrivacyArguments  # noqa: E402

WORDS, ROWS, TOKENS = 4096, 16, 64
STEPS, TURNS = 3, 3


def bert() -> tuple[nn.Module, list[dict[str, Any]]]:
    """A classifier of MiniLM's size, and its rows."""
    config = BertConfig(
        vocab_size=WORDS, hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
        intermediate_size=1536, max_position_embeddings=TOKENS, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config), rows(classes=True)


def llama() -> tuple[nn.Module, list[dict[str, Any]]]:
    """A causal language model, and its rows."""
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=256, intermediate_size=688, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=TOKENS,
    )  # fmt: skip
    return LlamaForCausalLM(config), rows(classes=False)


def rows(*, classes: bool) -> list[dict[str, Any]]:
    """Random tokens with positions for each row, which Opacus needs."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, WORDS, (ROWS, TOKENS), generator=generator)
    positions = torch.arange(TOKENS)
    return [
        {"input_ids": row, "position_ids": positions, "attention_mask": torch.ones_like(row),
         **({"labels": i % 2, "token_type_ids": torch.zeros_like(row)} if classes else
            {"labels": row})}
        for i, row in enumerate(ids)
    ]  # fmt: skip


class OpacusTrainer(Trainer):
    """A Trainer on per-sample gradients."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, inside Opacus's."""
        from opacus.optimizers import DPOptimizer

        inner = super().create_optimizer(*args, **kwargs)
        if not isinstance(inner, DPOptimizer):
            self.optimizer = DPOptimizer(
                inner, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=ROWS
            )
        return self.optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Opacus wants to be told by its optimizer, where a Trainer tells the model."""
        self.optimizer.zero_grad()
        return super().training_step(*args, **kwargs)


class Clock(TrainerCallback):
    """Processor time of every step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start."""
        self.began = time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop."""
        self.seconds.append(time.process_time() - self.began)


def trainer_of(kind: str, model: nn.Module, data: list[dict[str, Any]], steps: int) -> Any:
    """A trainer whose every step takes all rows at once."""
    arguments = TrainingArguments(
        tempfile.mkdtemp(), max_steps=steps, per_device_train_batch_size=ROWS, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
        remove_unused_columns=False,
        max_grad_norm=1.0 if kind == "Trainer" else 0.0, optim="adamw_torch",
    )  # fmt: skip
    given: dict[str, Any] = {"train_dataset": data, "data_collator": default_data_collator}
    model = copy.deepcopy(model)
    if kind == "DPTrainer":
        privacy = PrivacyArguments(noise_multiplier=1.0, target_delta=1e-5, max_grad_norm=1.0)
        return DPTrainer(model, arguments, privacy=privacy, **given)
    if kind == "Opacus":
        from opacus import GradSampleModule

        trainer = OpacusTrainer(GradSampleModule(model.train()), arguments, **given)
        trainer.can_return_loss = True
        return trainer
    return Trainer(model, arguments, **given)


def main() -> None:
    """Print a line for each model."""
    torch.set_num_threads(1)
    print("| model | processor time | peak, Trainer | peak, DPTrainer | peak, Opacus |")
    print("|---|---|---|---|---|")
    for make in (bert, llama):
        model, data = make()
        clocks = {"Trainer": Clock(), "DPTrainer": Clock()}
        for _ in range(TURNS):
            for kind, clock in clocks.items():
                trainer = trainer_of(kind, model, data, STEPS)
                trainer.add_callback(clock)
                trainer.train()
                clock.seconds = clock.seconds[:-STEPS] + clock.seconds[1 - STEPS :]
        medians = [statistics.median(clock.seconds) for clock in clocks.values()]
        print(f"| {make.__name__} | {medians[1] / medians[0]:.2f} |", end="", flush=True)
        for kind in (*clocks, "Opacus"):
            peak = allocator_peak(trainer_of(kind, model, data, 2).train, torch.device("cpu"))
            print(f" {peak / 2**20:.0f} MiB |", end="", flush=True)
        print()


if __name__ == "__main__":
    main()
