"""What leaves with a model: no key, no exact loss; a card with the statement."""

from __future__ import annotations

import fnmatch
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from dptorch.errors import ConfigurationError
from dptorch.integrations.transformers.private_trainer import PRIVATE_FOLDER
from dptorch.integrations.transformers.reporting import renamed
from tests.integrations.transformers import setup
from tests.integrations.transformers.setup import build, data, trainer_of

pytestmark = setup.quiet


class Hub:
    """Stands for the hub: keeps the bytes of what is uploaded, as `huggingface_hub` chooses it."""

    def __init__(self):
        self.files = {}
        self.beside_the_upload = set()  # what there was of private files

    def upload_folder(self, *, folder_path, ignore_patterns=(), **_):
        self.beside_the_upload |= {f.name for f in Path(folder_path, PRIVATE_FOLDER).glob("*")}
        for file in Path(folder_path).rglob("*"):
            name = str(file.relative_to(folder_path))
            if file.is_file() and not any(fnmatch.fnmatch(name, p) for p in ignore_patterns):
                self.files[name] = file.read_bytes()
        return self

    def done(self):
        return True

    def result(self):
        return None


@pytest.fixture
def hub(monkeypatch):
    found = Hub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: found)

    def init_hf_repo(self, **_):
        self.hub_model_id, self.push_in_progress = "somebody/model", None

    monkeypatch.setattr("transformers.Trainer.init_hf_repo", init_hf_repo)
    return found


def run(folder, **settings):
    trainer = trainer_of(
        build("gpt2"),
        "gpt2",
        folder,
        privacy={"noise_multiplier": 1.0, "seed": None},
        given={"eval_dataset": data("gpt2").select(range(3))},
        per_device_train_batch_size=5,
        save_strategy="steps",
        save_steps=1,
        logging_strategy="steps",
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        **settings,
    )
    trainer.train()
    return trainer


@pytest.mark.slow
def test_nothing_that_is_uploaded_holds_the_key_or_a_loss(tmp_path, hub):
    trainer = run(tmp_path, push_to_hub=True)
    trainer.save_state()
    trainer.save_metrics("eval", trainer.evaluate())
    trainer.push_to_hub()
    key = trainer.engine.state_dict()["key"]
    secret = key["key"]
    assert hub.beside_the_upload >= {"checkpoint-1.pt", "checkpoint-2.pt"}
    assert not (tmp_path / PRIVATE_FOLDER).exists()  # the run is complete
    expected = "model.safetensors README.md trainer_state.json training_args.bin eval_results.json"
    assert set(expected.split()) <= hub.files.keys()
    assert not any("checkpoint" in name or "dptorch" in name for name in hub.files)
    for name, content in hub.files.items():
        assert secret.encode() not in content, name
        assert bytes.fromhex(secret) not in content, name
        if name.endswith((".json", ".md")):
            assert b'loss"' not in content, name
            assert b"not_private" not in content, name
    assert all("epsilon" in entry for entry in trainer.state.log_history)


@pytest.mark.slow
def test_the_card_carries_the_statement_once(tmp_path, hub):
    trainer = run(tmp_path, push_to_hub=True)
    trainer.create_model_card()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert card.count("## Differential privacy") == 1
    assert str(trainer.privacy_statement()) in card
    assert "library_name: transformers" in card
    assert "Training Loss" not in card


@pytest.mark.slow
def test_uploading_exact_losses_is_refused(tmp_path, hub):
    """A run that was not to be pushed keeps its losses, and is not pushed with them."""
    trainer = run(tmp_path)
    assert any("not_private_loss" in entry for entry in trainer.state.log_history)
    trainer.save_state()
    with pytest.raises(ConfigurationError, match=r"trainer_state\.json in .* would be uploaded"):
        trainer.push_to_hub()
    assert not hub.files
    (tmp_path / "trainer_state.json").unlink()
    trainer.push_to_hub()
    assert "model.safetensors" in hub.files


def test_what_is_public_keeps_its_name():
    logs = {"loss": 2.0, "grad_norm": 0.1, "learning_rate": 0.1, "epoch": 1.0, "eval_loss": 1.0}
    logs |= {"eval_runtime": 3.0, "train_loss": 2.0, "mean_token_accuracy": 0.5}
    private = renamed(logs, eval_is_public=False)
    assert {n for n in private if not n.startswith("not_private_")} == {
        "learning_rate",
        "epoch",
        "eval_runtime",
    }
    assert "eval_loss" in renamed(logs, eval_is_public=True)
    assert sorted(private.values()) == sorted(logs.values())
    assert renamed(private, eval_is_public=False) == private


def test_the_statement_says_that_the_evaluation_data_counts_as_public(tmp_path):
    for public in (True, False):
        trainer = trainer_of(build("gpt2"), "gpt2", tmp_path, privacy={"eval_is_public": public})
        trainer.train()
        assert (
            "the evaluation data counts as public" in str(trainer.privacy_statement())
        ) is public
