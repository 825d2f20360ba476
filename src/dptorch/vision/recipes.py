"""Models and settings that papers trained images with, and the accuracy that they published.

Their data and weights are not on the package index, so none was run by us on its own data; the tests
run each for its shape, its ε and an overfit of a few pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from dptorch.errors import one_of

__all__ = ["RECIPES", "VisionRecipe", "defaults_of", "get_recipe"]


@dataclass(frozen=True)
class VisionRecipe:
    """One data set and how it is trained.

    Attributes:
        name: as given to ``--recipe``.
        settings: values of fields of `dptorch.vision.job.VisionJob`, where the user gives none.
        published: ε and the test accuracy in percent that its source reports.
        source: the publication.
    """

    name: str
    settings: Mapping[str, Any]
    published: tuple[tuple[float, float], ...]
    source: str

    @property
    def claim(self) -> str:
        """What was published, in words.

        Example:
            >>> get_recipe("cifar10-beit-large").claim
            '96.7 % at ε = 1 (Bu, Mao and Xu 2022)'
        """
        results = ", ".join(f"{accuracy:g} % at ε = {e:g}" for e, accuracy in self.published)
        return f"{results} ({self.source})"

    @property
    def chosen(self) -> str:
        """Who chose the settings, a note of the statement.

        Example:
            >>> get_recipe("cifar10-wrn-16-4").chosen[:58]
            "the recipe's settings are those of De et al. 2022, but for"
        """
        return (
            f"the recipe's settings are those of {self.source}, but for what was asked for otherwise. "
            "Where they were chosen by runs on the same data, no epsilon covers that choice."
        )


#: What a run has where neither the user nor a recipe says otherwise.
_DEFAULTS: Final[Mapping[str, Any]] = {
    "method": "full",
    "epochs": 10.0,
    "sample_rate": 0.05,
    "target_epsilon": 3.0,
    "max_grad_norm": 1.0,
    "clipping_fn": "abadi",
    "optimizer": "sgd",
    "momentum": 0.0,
    "weight_decay": 0.0,
    "decay": "constant",
    "warmup": 0.0,
    "augment": "none",
    "views": 1,
}
#: Adam divides by the size of its gradients, SGD does not.
_RATES: Final[Mapping[str, float]] = {"sgd": 1.0, "adam": 1e-3, "adamw": 1e-3}

_BEIT: Final = "beit_large_patch16_224"
_SCALABLE: Final = "Bu, Mao and Xu 2022"
_SMALL_COST: Final = "Bu et al., fastDP 2023"


def _pretrained(
    name: str, files: str, model: str, published: Any, source: str, **more: Any
) -> VisionRecipe:
    """The scripts of private_vision and fastDP: Adam from published weights, at C = 0.1."""
    settings = {
        "format": files,
        "model": f"timm:{model}",
        "pretrained": True,
        "optimizer": "adam",
        "learning_rate": 1e-3,
        "batch_size": 1000.0,
        "epochs": 3.0,
        "max_grad_norm": 0.1,
        "target_delta": 1e-5,
        "target_epsilon": published[0][0],
    }
    return VisionRecipe(name, settings | more, published, source)


RECIPES: Final[Mapping[str, VisionRecipe]] = {
    recipe.name: recipe
    for recipe in (
        VisionRecipe(
            "cifar10-wrn-16-4",
            {
                "format": "cifar10", "model": "wrn-16-4", "optimizer": "sgd", "learning_rate": 2.0,
                "batch_size": 4096.0, "epochs": 200.0, "max_grad_norm": 1.0, "target_delta": 1e-5,
                "target_epsilon": 8.0, "augment": "flip-crop", "views": 16, "ema": 0.9999,
            },
            ((8.0, 81.4),),
            "De et al. 2022",
        ),
        _pretrained("cifar10-beit-large", "cifar10", _BEIT, ((1.0, 96.7),), _SCALABLE),
        _pretrained("cifar100-beit-large", "cifar100", _BEIT,
                    ((1.0, 83.0), (2.0, 88.7)), f"{_SCALABLE}; {_SMALL_COST}"),
        _pretrained("cifar10-vit-large", "cifar10", "vit_large_patch16_224", ((2.0, 98.9),),
                    _SMALL_COST, learning_rate=5e-4),
        _pretrained("celeba-resnet18", "celeba", "resnet18", ((3.0, 88.2),), _SMALL_COST,
                    batch_size=500.0, epochs=10.0, target_delta=5e-6, max_grad_norm=1.0,
                    label="all", image_size=224),
        VisionRecipe(
            "cifar10-resnet18",
            {
                "format": "cifar10", "model": "torchvision:resnet18", "optimizer": "rmsprop",
                "learning_rate": 1e-3, "batch_size": 512.0, "epochs": 20.0, "max_grad_norm": 1.2,
                "target_delta": 1e-5, "target_epsilon": 50.0, "image_size": 32,
            },
            ((50.0, 61.0), (5.0, 53.0)),
            "Opacus's tutorial; without privacy 76 %",
        ),
    )
}  # fmt: skip


def get_recipe(name: str) -> VisionRecipe:
    """Return the recipe called `name`.

    Raises:
        ConfigurationError: there is none of that name.
    """
    return RECIPES[one_of("recipe", name, RECIPES)]


def defaults_of(recipe: str | None, optimizer: str | None) -> dict[str, Any]:
    """Return the settings of a run where the user gives none.

    Example:
        >>> defaults_of(None, "adamw")["learning_rate"], defaults_of(None, None)["learning_rate"]
        (0.001, 1.0)
    """
    settings = {} if recipe is None else dict(get_recipe(recipe).settings)
    if optimizer is not None and optimizer != settings.get("optimizer"):
        settings.pop("learning_rate", None)  # it was another optimizer's
    merged = {**_DEFAULTS, **settings}
    if "batch_size" in settings:
        merged["sample_rate"] = None
    chosen = optimizer or merged["optimizer"]
    merged.setdefault("learning_rate", _RATES.get(chosen, 1e-3))
    return merged
