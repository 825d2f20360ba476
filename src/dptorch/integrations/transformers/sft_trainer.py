"""DPSFTTrainer: supervised fine-tuning of TRL under differential privacy (the extra ``trl``)."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from dptorch.integrations.transformers.privacy_arguments import PrivacyArguments
from dptorch.integrations.transformers.private_trainer import PrivateTrainer

__all__ = ["DPSFTTrainer", "WholeHeadSFTTrainer", "sft_config"]


class WholeHeadSFTTrainer(SFTTrainer):
    """`SFTTrainer`, with the model's own loss where TRL's fused head would leave layers out.

    TRL multiplies the body's last hidden state by the output embeddings. BERT and RoBERTa have a dense
    layer and a normalisation between the two: they would get no gradient, and the loss would be that
    of another model. Held by `test_every_parameter_of_a_causal_bert_moves`.
    """

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """TRL's loss, or the model's own."""
        base: Any = super()
        if not _layers_before_output(self.model):
            return base.compute_loss(model, inputs, return_outputs, num_items_in_batch)
        plain: Any = Trainer.compute_loss
        return plain(self, model, inputs, return_outputs, num_items_in_batch)


def _layers_before_output(model: Any) -> bool:
    """Whether a model has parameters between its body and its output embeddings."""
    whole = getattr(model, "get_base_model", lambda: model)()
    output = whole.get_output_embeddings()
    if output is None:
        return False
    known = {id(p) for module in (whole.base_model, output) for p in module.parameters()}
    return any(id(p) not in known for p in whole.parameters())


class DPSFTTrainer(PrivateTrainer, WholeHeadSFTTrainer):
    """`trl.SFTTrainer` under differential privacy; see `PrivateTrainer`.

    The loss is the model's own and not TRL's fused head, through which gradients of single examples
    cannot be followed: the logits of a physical batch are in memory.
    """

    arguments_class = SFTConfig
    always_causal = True

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *positional: Any,
        privacy: PrivacyArguments,
        **trainer_kwargs: Any,
    ) -> None:
        super().__init__(model, sft_config(args), *positional, privacy=privacy, **trainer_kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `PrivateTrainer.log`; TRL's own metrics of the evaluation among them."""
        model: Any = self.model
        if not model.training:
            found = self._metrics["eval"]
            logs = logs | {f"eval_{name}": sum(v) / len(v) for name, v in found.items() if v}
            found.clear()
        super().log(logs, start_time)


def sft_config(args: TrainingArguments | None) -> SFTConfig:
    """`args` as an `SFTConfig`."""
    if args is None:
        return SFTConfig()
    if isinstance(args, SFTConfig):
        return args
    given: Any = args
    known = given.to_dict()
    known.update(hub_token=given.hub_token)  # to_dict hides it
    known.pop("push_to_hub_token", None)
    return SFTConfig(**known)
