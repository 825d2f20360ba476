"""Runs of a private trainer: beside the ordinary one, split, stopped and gone on with."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from transformers import Trainer

from dptorch.errors import BudgetExhausted, ConfigurationError, PrivacyWarning
from dptorch.integrations.transformers.private_trainer import PRIVATE_FOLDER
from dptorch.ledger import open_ledger
from tests.integrations.transformers import setup
from tests.integrations.transformers.setup import (
    Kill,
    arguments,
    build,
    collator,
    data,
    ran,
    trainer_of,
)

pytestmark = setup.quiet
EVEN = [8] * setup.ROWS
NO_BOUND = {"max_grad_norm": 1e6}


def parameters_of(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_without_noise_and_bound_the_losses_are_the_trainers(name, tmp_path):
    """Six epochs of one step on all rows, of equal lengths, with AdamW and a schedule.

    (The Trainer's loss of a GPT-2 is smaller by (T - 1) / T: it counts the first token as a label.)
    """
    dataset = data(name, EVEN)
    if name == "t5":
        dataset = dataset.remove_columns("labels").add_column("labels", dataset["input_ids"])
    run = {"num_train_epochs": 6, "learning_rate": 1e-2, "logging_strategy": "steps"}
    run |= {"logging_steps": 1, "optim": "adamw_torch"}
    ordinary = Trainer(
        build(name),
        arguments(tmp_path, **run, max_grad_norm=0.0),
        train_dataset=dataset,
        data_collator=collator(name),
    )
    private = trainer_of(build(name), name, tmp_path, dataset=dataset, privacy=NO_BOUND, **run)
    ordinary.train()
    private.train()
    theirs = [e["loss"] for e in ordinary.state.log_history if "loss" in e]
    ours = [e["not_private_loss"] for e in private.state.log_history if "not_private_loss" in e]
    assert len(ours) == 6
    assert theirs[0] - theirs[-1] > 0.01
    assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.slow
def test_every_split_of_a_logical_batch_gives_the_same_update(tmp_path, float64):
    """64 rows at once, 16 at a time and one by one; with noise, that of the same key."""
    dataset = data("gpt2", [3 + i % 6 for i in range(64)])
    ends = [
        parameters_of(
            ran(
                trainer_of(
                    build("gpt2"),
                    "gpt2",
                    tmp_path,
                    dataset=dataset,
                    privacy={"noise_multiplier": 0.5},
                    per_device_train_batch_size=rows,
                    gradient_accumulation_steps=parts,
                    learning_rate=1e-2,
                )
            )
        )
        for rows, parts in ((64, 1), (16, 4), (1, 64))
    ]
    start = torch.cat([p.detach().flatten() for p in build("gpt2").parameters()])
    assert (ends[0] - start).abs().max() > 1e-3
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    """Killed before its sixth step, gone on from its fourth, within an epoch; with dropout."""
    torch.set_num_threads(1)
    privacy = {"target_epsilon": 8.0, "noise_multiplier": None}
    settings = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 4,
        "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2,
    }  # fmt: skip

    def make(folder, **given):
        model = build("gpt2")
        model.transformer.drop.p = 0.3
        return trainer_of(model, "gpt2", folder, privacy=privacy, given=given, **settings)

    whole = ran(make(tmp_path / "whole"))
    killed = make(tmp_path / "killed", callbacks=[Kill(5)])
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = make(tmp_path / "killed")
    resumed.train(resume_from_checkpoint=True)
    assert whole.plan.steps == resumed.engine.steps_done == resumed.state.global_step == 8
    assert torch.equal(parameters_of(whole), parameters_of(resumed))
    assert resumed.get_privacy_spent() == whole.get_privacy_spent()
    assert resumed.state.epoch == whole.state.epoch == 4.0


@pytest.mark.slow
def test_a_checkpoint_without_its_private_file_is_refused(tmp_path):
    settings = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 1}
    killed = trainer_of(build("gpt2"), "gpt2", tmp_path, given={"callbacks": [Kill(2)]}, **settings)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    private = tmp_path / PRIVATE_FOLDER
    assert sorted(f.name for f in private.iterdir()) == ["checkpoint-1.pt", "checkpoint-2.pt"]
    assert {f.stat().st_mode & 0o777 for f in private.iterdir()} == {0o600}
    (private / "checkpoint-2.pt").unlink()
    other = trainer_of(build("gpt2"), "gpt2", tmp_path, **settings)
    with pytest.raises(ConfigurationError, match="not known what the checkpoint"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert other.engine.steps_done == 0


@pytest.mark.slow
def test_private_files_go_with_their_checkpoints(tmp_path):
    settings = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 1}
    settings |= {"save_total_limit": 2}
    killed = trainer_of(build("gpt2"), "gpt2", tmp_path, given={"callbacks": [Kill(4)]}, **settings)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    kept = sorted(f.stem for f in (tmp_path / PRIVATE_FOLDER).iterdir())
    assert kept == sorted(f.name for f in tmp_path.glob("checkpoint-*"))
    assert len(kept) == 2


@pytest.mark.slow
def test_no_file_has_the_key_once_a_run_is_complete(tmp_path):
    """That of another run in the same folder stays: it can be gone on with."""
    settings = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2}
    seeds = ({"seed": 1}, {"seed": 2})
    killed, complete = (
        trainer_of(build("gpt2"), "gpt2", tmp_path, privacy=privacy, given=given, **settings)
        for privacy, given in zip(seeds, ({"callbacks": [Kill(3)]}, {}), strict=True)
    )
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    kept = tmp_path / PRIVATE_FOLDER / "checkpoint-2.pt"
    (tmp_path / "checkpoint-9").mkdir()
    kept.rename(kept.with_name("checkpoint-9.pt"))
    complete.train()
    assert complete.engine.exhausted
    assert (tmp_path / "checkpoint-4").exists()
    assert [f.name for f in kept.parent.iterdir()] == ["checkpoint-9.pt"]


@pytest.mark.slow
def test_epsilon_is_in_every_entry_and_the_statement_states_what_was_planned(tmp_path):
    trainer = trainer_of(
        build("bert"),
        "bert",
        tmp_path,
        privacy={"target_epsilon": 3.0, "noise_multiplier": None},
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        logging_strategy="steps",
        logging_steps=1,
        save_strategy="steps",
        save_steps=2,
    )
    assert (trainer.plan.target_epsilon, trainer.plan.expected_batch_size) == (3.0, 4.0)
    assert trainer.plan.steps == 4
    trainer.train()
    entries = trainer.state.log_history
    assert len(entries) == 5
    spent = [entry["epsilon"] for entry in entries]
    assert spent == sorted(spent)
    assert spent[-1] == trainer.get_privacy_spent().epsilon == pytest.approx(3.0, rel=1e-3)
    statement = trainer.privacy_statement()
    assert statement.epsilon <= 3.0
    assert statement.sampling_run == {"poisson": 4}
    assert "differentially private" in str(statement)
    saved = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert saved["log_history"][-1]["epsilon"] == pytest.approx(spent[3])


def test_it_stops_at_the_budget(tmp_path):
    trainer = trainer_of(build("bert"), "bert", tmp_path, num_train_epochs=2)
    trainer.args.max_steps = 100
    trainer.train()
    assert trainer.state.global_step == trainer.engine.steps_done == 2
    with pytest.raises(BudgetExhausted, match="all 2 steps of the plan are done"):
        trainer.train()
    assert trainer.engine.steps_done == 2


@pytest.mark.slow
def test_evaluation_within_a_run_spends_nothing(tmp_path):
    trainer = trainer_of(
        build("gpt2"),
        "gpt2",
        tmp_path,
        given={"eval_dataset": data("gpt2").select(range(3))},
        per_device_train_batch_size=5,
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer.train()
    assert trainer.engine.steps_done == 2
    names = {name for entry in trainer.state.log_history for name in entry}
    assert "not_private_eval_loss" in names
    assert not names & {"loss", "eval_loss", "grad_norm", "train_loss"}


@pytest.mark.slow
def test_the_unit_is_the_user_where_a_column_says_whose_rows_are(tmp_path):
    dataset = data("bert").add_column("uid", [f"user {i // 2}" for i in range(setup.ROWS)])
    trainer = trainer_of(
        build("bert"),
        "bert",
        tmp_path,
        dataset=dataset,
        privacy={"user_column": "uid", "max_examples_per_user": 2},
        per_device_train_batch_size=5,
    )
    assert (trainer.plan.unit, trainer.plan.sample_size, trainer.plan.sample_rate) == ("user", 5, 1)
    trainer.train()
    assert trainer.engine.steps_done == 1
    with pytest.raises(ConfigurationError, match="user_column='name' is not among the columns"):
        trainer_of(
            build("bert"),
            "bert",
            tmp_path,
            privacy={"user_column": "name", "max_examples_per_user": 2},
        )


@pytest.mark.slow
def test_a_rate_is_not_computed_from_a_number_that_is_protected(tmp_path):
    settings = {"adjacency": "add-remove", "noise_multiplier": 1.0}
    with pytest.raises(ConfigurationError, match="an estimate will do"):
        trainer_of(build("gpt2"), "gpt2", tmp_path, privacy=settings)
    settings["sample_size"] = 12
    trainer = trainer_of(
        build("gpt2"), "gpt2", tmp_path, privacy=settings, per_device_train_batch_size=6
    )
    assert (trainer.plan.sample_rate, trainer.plan.adjacency.value) == (0.5, "add-remove")
    trainer.train()
    assert trainer.engine.exhausted


@pytest.mark.slow
def test_empty_batches_and_worker_processes(tmp_path):
    """One row of ten in a step on average: a third of the batches have none."""
    trainer = trainer_of(
        build("bert"),
        "bert",
        tmp_path,
        privacy={"noise_multiplier": 1.0},
        per_device_train_batch_size=1,
        max_steps=12,
        dataloader_num_workers=2,
    )
    drawn = [len(trainer.get_train_dataloader()._loader.sampler.draw(step)) for step in range(12)]
    assert min(drawn) == 0
    assert max(drawn) > 1
    trainer.train()
    assert trainer.engine.sampling_run == {"poisson": 12}


def test_a_compiled_model_runs_as_it_is_written(tmp_path):
    trainer = trainer_of(build("gpt2"), "gpt2", tmp_path, torch_compile=True)
    trainer.train()
    assert not trainer.args.torch_compile
    assert trainer.engine.steps_done == 1


class Memory(torch.autograd.Function):
    """Fits `rows` rows, in the forward pass or in the backward."""

    @staticmethod
    def forward(ctx, x, rows, where):
        ctx.rows, ctx.where = rows, where
        if where == "forward" and len(x) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if ctx.where == "backward" and len(grad) > ctx.rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return grad.clone(), None, None


@pytest.mark.slow
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_step_that_does_not_fit_goes_through_in_smaller_parts(where, tmp_path, float64):
    """Memory for three rows: parts of ten, five and two; the run is that of parts of two."""
    settings = {"noise_multiplier": 0.5}
    arguments = {"num_train_epochs": 3, "learning_rate": 1e-2, "auto_find_batch_size": True}

    def run(rows, parts, memory):
        model = build("gpt2")
        inner = model.transformer.forward

        def forward(*args, **kwargs):
            out = inner(*args, **kwargs)
            out.last_hidden_state = Memory.apply(out.last_hidden_state, memory, where)
            return out

        model.transformer.forward = forward
        trainer = trainer_of(
            model, "gpt2", tmp_path, privacy=settings, per_device_train_batch_size=rows,
            gradient_accumulation_steps=parts, **arguments,
        )  # fmt: skip
        return ran(trainer)

    expected = run(2, 5, 100)
    with pytest.warns(PrivacyWarning, match="out of memory with 5 examples in the model"):
        found = run(10, 1, 3)
    assert found.engine.steps_done == found.state.global_step == 3
    assert found.get_privacy_spent() == expected.get_privacy_spent()
    assert found._batches.rows == 2
    torch.testing.assert_close(parameters_of(found), parameters_of(expected), rtol=0, atol=1e-9)
    with pytest.raises(torch.OutOfMemoryError):
        run(1, 10, 0)


def test_steps_are_written_down_in_a_ledger(tmp_path):
    ledger = open_ledger(tmp_path / "ledger.db").dataset("reviews")
    trainer = ran(
        trainer_of(
            build("bert"),
            "bert",
            tmp_path,
            privacy={"noise_multiplier": 1.0},
            given={"ledger": ledger},
            num_train_epochs=2,
        )
    )
    assert trainer.engine.steps_done == 2
    assert trainer.engine.ledger_run["dataset"] == "reviews"
    assert "run" in trainer.privacy_statement().ledger


@pytest.mark.slow
def test_half_precision_trains(tmp_path):
    trainer = ran(trainer_of(build("gpt2"), "gpt2", tmp_path, bf16=True))
    assert trainer.engine.steps_done == 1


@pytest.mark.slow
def test_checkpointed_activations_change_nothing(tmp_path, float64):
    ends = [
        parameters_of(
            ran(trainer_of(build("gpt2"), "gpt2", tmp_path, gradient_checkpointing=checkpointed))
        )
        for checkpointed in (False, True)
    ]
    torch.testing.assert_close(*ends)


@pytest.mark.slow
def test_the_package_loads_transformers_late():
    code = (
        "import sys, dptorch.integrations.transformers as room;"
        "room.PrivacyArguments(target_epsilon=1.0, target_delta=1e-5);"
        "print({'transformers', 'trl', 'datasets', 'peft'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "set()\n"
