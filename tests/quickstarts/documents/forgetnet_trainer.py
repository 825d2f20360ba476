# ForgetNet's quick start with the trainer, as it stands there: only `forgetnet` has become
# `dptorch.compat.forgetnet`. training_args and the data sets are given. Run by test_forgetnet.py.

from dptorch.compat.forgetnet import BloGSSFTTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("gpt2")
tokenizer = AutoTokenizer.from_pretrained("gpt2")

trainer = BloGSSFTTrainer(
    model=model,
    args=training_args,
    train_dataset=train_dataset,
    eval_dataset=eval_dataset,
    tokenizer=tokenizer,
    dataset_text_field="text",
    target_epsilon=1.0,
    delta=1e-5,
    clip_value=1.0
)

trainer.train()
