"""Every training argument of transformers and TRL has one entry, and its entry is what happens."""

from __future__ import annotations

import dataclasses
import warnings

import pytest

pytest.importorskip("trl")

from transformers import Seq2SeqTrainingArguments, TrainingArguments
from trl import SFTConfig

from dptorch.errors import ConfigurationError, PrivacyWarning
from dptorch.integrations.transformers import PrivacyArguments
from dptorch.integrations.transformers.manifest import CHANGED, IGNORED, KEPT, REFUSED, settle

PRIVACY = PrivacyArguments(noise_multiplier=1.0, target_delta=1e-5)
ARGUMENTS = (TrainingArguments, Seq2SeqTrainingArguments, SFTConfig)
TABLES = {"kept": KEPT, "changed": CHANGED, "refused": REFUSED, "ignored": IGNORED}


def unlisted(cls) -> set[str]:
    return {f.name for f in dataclasses.fields(cls)} - set().union(*TABLES.values())


@pytest.mark.parametrize("cls", ARGUMENTS)
def test_every_field_has_one_entry(cls):
    assert unlisted(cls) == set(), "a release added these: put each into a table of manifest.py"


def test_no_field_has_two_entries_or_is_gone():
    names = [name for table in TABLES.values() for name in table]
    assert len(names) == len(set(names))
    known = {f.name for cls in ARGUMENTS for f in dataclasses.fields(cls)}
    # Python 3.10 gets transformers 5.20, which does not have these two yet.
    newest = {"activation_checkpointing", "activation_checkpointing_kwargs"}
    assert set(names) - newest <= known


@dataclasses.dataclass
class Newer(TrainingArguments):
    """What the next release may look like."""

    share_gradients: bool = False


def test_a_new_field_is_seen_and_refused_where_it_is_set(tmp_path):
    """The broken twin of the first test."""
    assert unlisted(Newer) == {"share_gradients"}
    settle(Newer(str(tmp_path)), PRIVACY)
    with pytest.raises(ConfigurationError, match="newer than this version"):
        settle(Newer(str(tmp_path), share_gradients=True), PRIVACY)


#: For every refused field a value that is refused.
WRONG = {
    "fp16": True, "use_liger_kernel": True, "liger_kernel_config": {"rope": True},
    "neftune_noise_alpha": 5.0, "optim": "lomo",
    "optim_target_modules": "all-linear", "load_best_model_at_end": True, "save_strategy": "best",
    "lr_scheduler_type": "reduce_lr_on_plateau", "hub_strategy": "all_checkpoints",
    "parallelism_config": object(),
    "dataloader_in_order": False, "train_sampling_strategy": "group_by_length", "packing": True,
    "padding_free": True, "loss_type": "dft",
}  # fmt: skip


def test_the_wrong_values_cover_the_table():
    assert WRONG.keys() == REFUSED.keys()


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_value_is_named_with_a_way_out(name, tmp_path):
    args = SFTConfig(str(tmp_path), use_cpu=True)
    setattr(args, name, WRONG[name])
    with pytest.raises(ConfigurationError, match=f"^{name}=") as error:
        settle(args, PRIVACY)
    assert len(str(error.value)) > 60


PUBLIC = [name for name, refusal in REFUSED.items() if refusal.unless == "public evaluation"]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_data_may_choose(name, tmp_path):
    args = TrainingArguments(str(tmp_path))
    setattr(args, name, WRONG[name])
    public = dataclasses.replace(PRIVACY, eval_is_public=True)
    assert getattr(settle(args, public), name) == WRONG[name]


def test_the_defaults_are_settled_in_silence_and_the_callers_object_stays(tmp_path):
    args = SFTConfig(str(tmp_path), use_cpu=True)
    before = dict(vars(args))
    with warnings.catch_warnings():
        warnings.simplefilter("error", PrivacyWarning)
        settled = settle(args, PRIVACY)
    assert vars(args) == before
    assert settled.max_grad_norm == 0.0
    assert settled.gradient_accumulation_steps == 1
    assert settled.average_tokens_across_devices is False


def test_the_loss_in_chunks_that_was_the_default_is_the_loss(tmp_path):
    args = SFTConfig(str(tmp_path), use_cpu=True)
    args.loss_type = "chunked_nll"  # the default of TRL before 1.16
    assert settle(args, PRIVACY).loss_type == "nll"


def test_what_is_changed_is_said(tmp_path):
    args = TrainingArguments(str(tmp_path), max_grad_norm=0.3, include_num_input_tokens_seen="all")
    with pytest.warns(PrivacyWarning, match=r"max_grad_norm=0\.0 instead of 0\.3: .*num_input"):
        settle(args, PRIVACY)


def test_group_by_length_of_older_releases_is_refused_by_the_name_it_has_now(tmp_path):
    args = TrainingArguments(str(tmp_path), train_sampling_strategy="group_by_length")
    with pytest.raises(ConfigurationError, match="orders records by each other"):
        settle(args, PRIVACY)
