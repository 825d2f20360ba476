"""What is run of the text scripts that private-transformers and fastDP share."""

from __future__ import annotations

__all__ = ["CLASSIFICATION", "GENERATION"]

_COMMON = (
    "--overwrite_output_dir --do_train --do_eval --non_private no --num_train_epochs 1 "
    "--target_epsilon 8 --per_device_train_batch_size 4 --gradient_accumulation_steps 2 "
    "--per_example_max_grad_norm 0.1 --attention_only no --static_lm_head no --static_embedding no "
)
#: SST-2 by prompts or by a head, as the scripts' wrappers call them; {output} is a folder.
CLASSIFICATION = _COMMON + (
    "--task_name sst-2 --data_dir {data}/sst2 --output_dir {output} --num_k 1 --num_sample 1 --seed 42 "
    "--template *cls**sent_0*_It_was*mask*.*sep+* --per_device_eval_batch_size 8 "
    "--learning_rate 5e-4 --lr_decay yes --adam_epsilon 1e-08 --weight_decay 0 --max_seq_len 256 "
    "--evaluation_strategy steps --eval_steps 2 --evaluate_before_training True "
    "--first_sent_limit 200 --other_sent_limit 200 --truncate_head yes --randomly_initialize no "
)
#: E2E by a causal model, as the scripts' ``run.sh`` calls them.
GENERATION = _COMMON + (
    "--data_folder {data}/e2e/data/prefix-tuning/e2e_data --output_dir {output} --task_mode e2e "
    "--line_by_line --save_steps 100 --save_total_limit 1 --save_at_last no --logging_dir {output} "
    "--logging_steps -1 --seed 0 --eval_steps 100 --eval_epochs 1 --max_eval_batches 100 "
    "--evaluation_strategy epoch --evaluate_before_training no --evaluate_during_training yes "
    "--per_device_eval_batch_size 10 --max_generations 2 --max_generations_train 2 "
    "--max_generations_valid 2 --max_train_examples 1000 --max_valid_examples 1000 "
    "--max_eval_examples 1000 --max_seq_len 100 --format_mode cat --target_delta 8e-6 "
    "--learning_rate 2e-3 --lr_decay yes "
)
