"""DPTrainer and DPSeq2SeqTrainer: Hugging Face's trainers under differential privacy."""

from __future__ import annotations

from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

from dptorch.integrations.transformers.private_trainer import PrivateTrainer

__all__ = ["DPSeq2SeqTrainer", "DPTrainer"]


class DPTrainer(PrivateTrainer, Trainer):
    """`transformers.Trainer` under differential privacy; see `PrivateTrainer`.

    Example::

        trainer = DPTrainer(
            model, TrainingArguments("out", per_device_train_batch_size=16, num_train_epochs=3),
            train_dataset=dataset, processing_class=tokenizer,
            privacy=PrivacyArguments(target_epsilon=8, target_delta=1e-6))
        trainer.train()
        print(trainer.privacy_statement())
    """


class DPSeq2SeqTrainer(PrivateTrainer, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` under differential privacy; see `PrivateTrainer`."""

    arguments_class = Seq2SeqTrainingArguments
