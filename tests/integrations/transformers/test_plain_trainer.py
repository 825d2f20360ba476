"""An ordinary Trainer on the engine's loader: what it does wrong is refused, and DPTrainer named."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from transformers import Trainer

from dptorch import PrivacyEngine
from dptorch.errors import PrivacyError
from tests.integrations.transformers import setup
from tests.integrations.transformers.setup import arguments, build, collator, data

pytestmark = setup.quiet


class Plain(Trainer):
    """The obvious subclass."""

    def __init__(self, engine, **kwargs):
        self._engine = engine
        super().__init__(**kwargs)

    def get_train_dataloader(self):
        return self._engine.loader(self.train_dataset, collate_fn=self.data_collator)


def plain(folder, *, count_tokens, reduction="mean", **settings):
    model = build("gpt2")
    engine = PrivacyEngine(
        model, batch_size=5, sample_size=setup.ROWS, steps=6, target_delta=1e-3, seed=0,
        noise_multiplier=1.0, loss_reduction=reduction,
    )  # fmt: skip
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    trainer = Plain(
        engine,
        model=model,
        args=arguments(folder, per_device_train_batch_size=4, **settings),
        train_dataset=data("gpt2"),
        data_collator=collator("gpt2"),
        optimizers=(optimizer, None),
    )
    trainer.model_accepts_loss_kwargs = count_tokens
    return trainer, engine


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count_tokens", "settings"),
    [(True, {}), (True, {"reduction": "sum"}), (False, {"gradient_accumulation_steps": 2})],
)
def test_what_is_refused_names_the_private_trainer(count_tokens, settings, tmp_path):
    trainer, engine = plain(tmp_path, count_tokens=count_tokens, **settings)
    with pytest.raises(PrivacyError, match=r"dptorch\.integrations\.transformers\.DPTrainer"):
        trainer.train()
    assert engine.steps_done == 0
