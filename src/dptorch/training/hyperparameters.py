"""What recipes and own data are trained with unless the user says otherwise.

The help of `dptorch train` shows these numbers, so that nothing here loads torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

__all__ = ["SUGGESTED", "Hyperparameters", "for_own_data"]


@dataclass(frozen=True)
class Hyperparameters:
    """What a recipe suggests; every one is an option of `dptorch train`.

    Private training wants other values than ordinary training: the noise is paid per step, so few
    steps with large batches and a learning rate far above the ordinary one.

    Attributes:
        epochs: passes over the data, in expectation.
        sample_rate: probability with which each example enters a batch.
        learning_rate: of SGD on the noisy mean of clipped gradients.
        momentum: of SGD.
        tail: last share of the steps whose mean weights are the result; None for the last weights.
        max_grad_norm: clipping norm C.
        clipping_fn: name of the clipping function.
        target_epsilon: budget to calibrate the noise for.
        target_delta: None: the largest power of ten that is at most 1 / (10 N).
    """

    epochs: float = 20
    sample_rate: float = 0.25
    learning_rate: float = 3.0
    momentum: float = 0.0
    tail: float | None = None
    max_grad_norm: float = 1.0
    clipping_fn: str = "abadi"
    target_epsilon: float = 3.0
    target_delta: float | None = None


#: By the name of the recipe.
SUGGESTED: Final[Mapping[str, Hyperparameters]] = {
    # Chosen on a part of the training set that counts as public: benchmarks/mnist_ladder.py.
    "mnist": Hyperparameters(tail=0.5, target_delta=1e-5),
    "mnist-features": Hyperparameters(
        epochs=40, learning_rate=20.0, tail=0.5, clipping_fn="automatic", target_delta=1e-5
    ),
    # Chosen for its ε on other digits, made as coarse: benchmarks/digits.py.
    "digits": Hyperparameters(
        epochs=40,
        sample_rate=1.0,
        learning_rate=20.0,
        tail=0.5,
        clipping_fn="automatic",
        target_epsilon=1.0,
        target_delta=1e-5,
    ),
    "reviews": Hyperparameters(sample_rate=0.1, learning_rate=5.0, target_delta=1e-5),
}


def for_own_data(input_shape: tuple[int, ...]) -> tuple[str, Hyperparameters]:
    """Model and hyperparameters to begin with on a data set that has no recipe.

    Args:
        input_shape: three dimensions mean images, anything else is treated as tabular.

    Example:
        >>> for_own_data((3, 28, 28))[0], for_own_data((12,))[0]
        ('cnn', 'mlp')
    """
    if len(input_shape) == 3:
        return "cnn", Hyperparameters()
    return "mlp", replace(Hyperparameters(), learning_rate=2.0, momentum=0.5)
