"""Membership inference inside a Hugging Face evaluation."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback

from dptorch.audit.membership import ImageMIA, LanguageMIA
from dptorch.errors import ConfigurationError

__all__ = ["MembershipCallback"]

# Of the result, what a log can hold.
_LOGGED = ("roc_auc", "precision_recall_auc", "null_auc", "blind_baseline_auc")


class MembershipCallback(TrainerCallback):
    """Attacks the model after each evaluation and logs how well members are told apart.

    What it logs is an exact function of the training data, and no guarantee covers it. So the names
    begin with `not_private_`: keep them out of what you publish.

    Args:
        train_dataset, test_dataset: members and non-members, see `LanguageMIA.attack`. A few hundred
            of each are enough to see a trend.
        tokenizer: by default the trainer's.
        mia: the attack; by default a `LanguageMIA` without gradients and permutations.
        every: attack after every so many evaluations.
        prefix: of the logged names.

    Attributes:
        results: (step, whole result) of each attack so far.

    Example:
        trainer.add_callback(MembershipCallback(train_dataset, test_dataset))
    """

    def __init__(
        self,
        train_dataset: Any,
        test_dataset: Any,
        tokenizer: Any = None,
        *,
        mia: LanguageMIA | ImageMIA | None = None,
        every: int = 1,
        prefix: str = "not_private_mia_",
    ) -> None:
        if every < 1:
            raise ConfigurationError(f"every={every!r} must be at least 1.")
        self.train_dataset = train_dataset
        self.test_dataset = test_dataset
        self.tokenizer = tokenizer
        self.mia = mia or LanguageMIA(
            gradients=False, permutations=0, models=("Logistic Regression", "Random Forest")
        )
        self.every = every
        self.prefix = prefix
        self.results: list[tuple[int, dict[str, Any]]] = []
        self._evaluations = 0

    def on_evaluate(
        self,
        args: Any,
        state: Any,
        control: Any,
        *,
        model: Any = None,
        metrics: dict[str, float] | None = None,
        processing_class: Any = None,
        **_: Any,
    ) -> None:
        """Called by the trainer after an evaluation."""
        self._evaluations += 1
        if self._evaluations % self.every or not state.is_world_process_zero:
            return
        result = self.mia.attack(
            self.train_dataset, self.test_dataset, model, self.tokenizer or processing_class
        )
        self.results.append((state.global_step, result))
        logged = {f"{self.prefix}{k}": result[k] for k in _LOGGED if math.isfinite(result[k])}
        logged[f"{self.prefix}tpr_at_1_percent_fpr"] = result["tpr_at_fpr"][0.01]
        if metrics is not None:
            metrics.update(logged)
        state.log_history.append({"step": state.global_step, **logged})
