"""LoRA fine-tuning of a language model on texts, with differential privacy, by TRL.

Run: python examples/sft_lora.py --model gpt2 --data texts.jsonl    (pip install 'dptorch[trl]')
On two processes: accelerate launch --config_file examples/accelerate/zero3.yaml examples/sft_lora.py

The file has one JSON object a line, with a "text". Without --model and --data a tiny model with random
weights is trained on made-up texts, which shows that everything is installed.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)
from trl import SFTConfig

from dptorch.integrations.transformers import DPSFTTrainer, PrivacyArguments

MADE_UP = [
    f"patient {i} slept {4 + i % 6} hours and felt {'well' if i % 3 else 'tired'}"
    for i in range(200)
]


def tiny_model() -> tuple[Any, Any]:
    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(MADE_UP, trainers.WordLevelTrainer(special_tokens=["[UNK]", "</s>"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="</s>")
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=2)
    return GPT2LMHeadModel(config), tokenizer


def main(arguments: list[str] | None = None) -> DPSFTTrainer:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="name or folder of a causal language model")
    parser.add_argument("--data", help="JSONL file with a text in each line")
    parser.add_argument("--out", default="runs/sft-lora")
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--epochs", type=float, default=3.0)
    options = parser.parse_args(arguments)

    model, tokenizer = tiny_model()
    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    texts = Dataset.from_dict({"text": MADE_UP})
    if options.data:
        texts = load_dataset("json", data_files=options.data, split="train")

    trainer = DPSFTTrainer(
        model,
        SFTConfig(
            options.out,
            per_device_train_batch_size=8,  # at most 8 texts in the model at once ...
            gradient_accumulation_steps=4,  # ... of 32 in a step, on average
            num_train_epochs=options.epochs,
            learning_rate=1e-3,
            max_length=128,
            logging_steps=5,
            save_strategy="no",
            report_to=[],
            bf16=False,
            # accelerate takes its own choice on GPUs, and under DeepSpeed makes none without.
            ddp_backend="gloo" if "RANK" in os.environ and not torch.cuda.is_available() else None,
        ),
        train_dataset=texts,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM"),
        privacy=PrivacyArguments(target_epsilon=options.epsilon, target_delta=1e-5),
    )
    print(f"noise multiplier {trainer.plan.noise_multiplier:.3f}, {trainer.plan.steps} steps")
    trainer.train()
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(trainer.privacy_statement())
        spent = trainer.get_privacy_spent()
        print(f"{trainer.plan.steps} steps, epsilon {spent.epsilon:.2f}", flush=True)
    return trainer


if __name__ == "__main__":
    main()
