"""What is refused when a trainer is made is refused too when it is set later."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from datasets import Dataset
from torch.utils.data import Subset
from transformers import BertConfig, BertForSequenceClassification
from transformers.trainer_pt_utils import LabelSmoother

from dptorch.errors import ConfigurationError
from dptorch.integrations.transformers import DPTrainer, PrivacyArguments
from dptorch.integrations.transformers.refusals import refuse_private_rows
from tests.integrations.transformers.setup import (
    CLASSIFIER,
    arguments,
    build,
    collator,
    data,
    tokenizer,
)

PRIVACY = {"noise_multiplier": 1.0, "target_delta": 1e-5}


def make(folder, name="gpt2", *, public=False, cls=DPTrainer, args=None, **given):
    settings = {
        "model": build(name), "train_dataset": data(name), "data_collator": collator(name),
        "args": arguments(folder, per_device_train_batch_size=4, max_steps=2, **(args or {})),
        "processing_class": tokenizer(),
    }  # fmt: skip
    privacy = PrivacyArguments(**PRIVACY, eval_is_public=public)
    return cls(**{**settings, **given}, privacy=privacy)


def changes():
    return {
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 1.0,
        "average_tokens_across_devices": True,
        "auto_find_batch_size": True,
        "load_best_model_at_end": True,
        "save_strategy": "best",
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "fp16": True,
        "neftune_noise_alpha": 5.0,
        "optim": "lomo",
    }


@pytest.mark.parametrize("name", changes())
def test_an_argument_that_is_set_later_is_refused(tmp_path, name):
    trainer = make(tmp_path)
    setattr(trainer.args, name, changes()[name])
    with pytest.raises(ConfigurationError, match=name):
        trainer.train()
    assert trainer.engine.steps_done == 0


def test_what_else_is_set_later(tmp_path):
    trainer = make(tmp_path)
    own, trainer.train_dataset = trainer.train_dataset, data("gpt2")
    with pytest.raises(ConfigurationError, match="train_dataset was replaced"):
        trainer.train()
    trainer.train_dataset = own
    trainer.label_smoother = LabelSmoother()
    with pytest.raises(ConfigurationError, match="label_smoother was set"):
        trainer.train()
    trainer.label_smoother = None
    # What a run may change between is still its own.
    trainer.args.learning_rate = 0.1
    trainer.args.max_steps = 100
    trainer.train()
    assert trainer.engine.steps_done == 2


def test_training_data_is_no_public_evaluation_data(tmp_path):
    train = data("gpt2")
    for same in (train, train.select(range(2)), {"a": data("gpt2"), "b": train}):
        with pytest.raises(ConfigurationError, match="holds rows of train_dataset"):
            make(tmp_path, public=True, train_dataset=train, eval_dataset=same)
        make(tmp_path, train_dataset=train, eval_dataset=same)  # it is not said to be public
    trainer = make(tmp_path, public=True, train_dataset=train)
    trainer.eval_dataset = train
    with pytest.raises(ConfigurationError, match="holds rows of train_dataset"):
        trainer.train()


def test_views_of_one_data_set_may_be_apart():
    rows = Dataset.from_dict({"x": list(range(20))})
    parts = rows.train_test_split(test_size=5, seed=0)
    refuse_private_rows(parts["train"], parts["test"])
    pairs = [(i, i) for i in range(20)]
    refuse_private_rows(Subset(pairs, range(10)), Subset(pairs, range(10, 20)))
    refuse_private_rows(pairs, None)
    for train, other in (
        (parts["train"], rows),
        (parts["train"].select([3, 1]), parts["train"].shuffle(seed=1)),
        (Subset(pairs, range(10)), Subset(pairs, range(9, 20))),
        (pairs, Subset(Subset(pairs, range(9)), [0, 2])),
    ):
        with pytest.raises(ConfigurationError, match="holds rows of train_dataset"):
            refuse_private_rows(train, other)


@pytest.mark.filterwarnings("ignore:Label smoothing is not compatible")
@pytest.mark.parametrize(
    ("problem", "labels"),
    [("multi_label_classification", [1.0, 0.0, 1.0]), ("regression", 0.5)],
)
def test_only_classes_are_smoothed(tmp_path, problem, labels):
    outputs = 1 if problem == "regression" else 3
    config = BertConfig(**{**CLASSIFIER, "num_labels": outputs}, problem_type=problem)
    rows = data("bert").to_dict()
    given = {
        "model": BertForSequenceClassification(config),
        "train_dataset": Dataset.from_dict({**rows, "labels": [labels] * len(rows["labels"])}),
    }
    with pytest.raises(ConfigurationError, match=r"label_smoothing_factor=0.2 .* class"):
        make(tmp_path, "bert", args={"label_smoothing_factor": 0.2}, **given)
    make(tmp_path, "bert", **given)
    make(tmp_path, "bert", args={"label_smoothing_factor": 0.2})
