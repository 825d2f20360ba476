"""What a private run tells: names that say what is not private, and the statement in the model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from dptorch.integrations.transformers.privacy_arguments import PrivacyArguments
from dptorch.statement import Statement

__all__ = ["NOT_PRIVATE", "add_to_model_card", "not_private_files", "renamed", "with_public_data"]

NOT_PRIVATE: Final = "not_private_"

#: Public, or a function of the noisy releases alone. How long something took is not exact, and depends
#: on batch sizes; a Trainer's own names for it stay, as its callbacks look for them.
_PUBLIC: Final = frozenset({
    "learning_rate", "epoch", "step", "total_flos", "train_runtime", "train_samples_per_second",
    "train_steps_per_second", "epsilon", "delta", "nominal_epsilon",
})  # fmt: skip
_EVAL_PUBLIC: Final = (
    "_runtime",
    "_samples_per_second",
    "_steps_per_second",
    "_model_preparation_time",
)
_HEADING: Final = "\n## Differential privacy\n"
#: What a Trainer or its reporters may have written into the output folder with exact values.
_WITH_VALUES: Final = (
    "trainer_state.json",
    "all_results.json",
    "train_results.json",
    "eval_results.json",
    "predict_results.json",
    "runs",
)


def renamed(logs: Mapping[str, float], *, eval_is_public: bool) -> dict[str, float]:
    """`logs` with exact functions of private data under names that say so.

    Example:
        >>> renamed({"loss": 2.5, "learning_rate": 0.1, "eval_loss": 2.0}, eval_is_public=True)
        {'not_private_loss': 2.5, 'learning_rate': 0.1, 'eval_loss': 2.0}
    """

    def public(name: str) -> bool:
        if name.startswith(("eval_", "test_")):
            return eval_is_public or name.endswith(_EVAL_PUBLIC)
        return name in _PUBLIC or name.startswith(NOT_PRIVATE)

    return {name if public(name) else NOT_PRIVATE + name: value for name, value in logs.items()}


def with_public_data(statement: Statement, privacy: PrivacyArguments) -> Statement:
    """The statement, with what the user said of the evaluation data."""
    if not privacy.eval_is_public:
        return statement
    note = (
        "the evaluation data counts as public, as eval_is_public=True says: it may choose the model "
        "that is kept and when training stops, and nothing here protects it."
    )
    return replace(statement, notes=(*statement.notes, note))


def add_to_model_card(folder: Path, statement: Statement) -> None:
    """Write the statement at the end of the card in `folder`, in the place of an older one."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.exists() else ""
    before = text.partition(_HEADING)[0].rstrip("\n")
    card.write_text(f"{before}\n{_HEADING}\n```text\n{statement}```\n", encoding="utf-8")


def not_private_files(folder: Path) -> list[str]:
    """Names in `folder` that a Trainer would upload and that may hold exact values."""
    return [name for name in _WITH_VALUES if (folder / name).exists()]
