"""Label smoothing example by example."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from dptorch.errors import ConfigurationError

__all__ = ["SmoothLabels"]


class SmoothLabels:
    """Cross-entropy with smoothed labels, the mean over an example's own tokens.

    It is called in the place of `transformers.trainer_pt_utils.LabelSmoother`, which divides by the
    number of tokens of the whole batch.

    Args:
        epsilon: share of each label that is spread over all classes.
        ignore_index: label of tokens that do not count.
        causal: whether the model predicts the next token, whoever calls; a Trainer knows that of the
            models that transformers lists.
    """

    def __init__(self, epsilon: float, ignore_index: int = -100, causal: bool = False) -> None:
        self.epsilon = epsilon
        self.ignore_index = ignore_index
        self.causal = causal

    @classmethod
    def in_place_of(cls, smoother: Any, *, causal: bool = False) -> SmoothLabels | None:
        """The same smoothing as a Trainer's own, or None where it has none."""
        return None if smoother is None else cls(smoother.epsilon, smoother.ignore_index, causal)

    def __call__(
        self,
        outputs: Any,
        labels: Tensor,
        shift_labels: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """Return the loss of a batch.

        Raises:
            ConfigurationError: its labels are no classes.
        """
        if labels.is_floating_point():
            raise ConfigurationError(
                f"label_smoothing_factor={self.epsilon:g}: the labels are numbers or several classes "
                "at once, of which none is smoothed. Set it to 0."
            )
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        if shift_labels or self.causal:
            logits, labels = logits[..., :-1, :], labels[..., 1:]
        if logits.dim() == 3:
            logits = logits.transpose(1, 2)
        # The tape makes this mean the one over examples of each one's own mean.
        return F.cross_entropy(
            logits.float() if logits.dtype.itemsize < 4 else logits,
            labels,
            ignore_index=self.ignore_index,
            label_smoothing=self.epsilon,
        )
