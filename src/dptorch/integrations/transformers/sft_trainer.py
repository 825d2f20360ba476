"""DPSFTTrainer: supervised fine-tuning of TRL under differential privacy (the extra ``trl``)."""

from __future__ import annotations

from typing import Any

from transformers import TrainingArguments
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from dptorch.integrations.transformers.privacy_arguments import PrivacyArguments
from dptorch.integrations.transformers.private_trainer import PrivateTrainer

__all__ = ["DPSFTTrainer", "sft_config"]


class DPSFTTrainer(PrivateTrainer, SFTTrainer):
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
