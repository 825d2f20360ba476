"""Classify texts, or pairs of texts: by a new head, or by the word that a masked model fills in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dptorch.errors import ConfigurationError, DataError
from dptorch.text.batches import Padded
from dptorch.text.models import save_trained
from dptorch.text.precision import computing, wide
from dptorch.training.run_folder import RunFolder
from dptorch.training.schedules import Schedule

__all__ = [
    "PromptedModel",
    "TextClassification",
    "logits_of",
    "prompt_tokens",
    "tokenize_rows",
    "word_tokens",
]

_BATCH: Final = 64


@dataclass(frozen=True)
class TextClassification:
    """The task of `dptorch.training.task.Task` for texts and integer classes.

    Attributes:
        tokenizer: of the model.
        schedule: of the learning rate.
        precision: of training, a name in `dptorch.text.precision.PRECISIONS`.
    """

    tokenizer: Any
    schedule: Schedule
    precision: str = "float32"

    @property
    def collate(self) -> Callable[[list[Any]], Any]:
        """Pads with the tokenizer's token."""
        return Padded({"input_ids": self.tokenizer.pad_token_id})

    def loss(self, model: nn.Module, batch: Any, device: torch.device) -> tuple[Tensor, int]:
        """Return the mean cross-entropy and the number of examples."""
        inputs = {name: value.to(device) for name, value in batch.items()}
        labels = inputs.pop("labels")
        with computing(self.precision, device):
            logits = logits_of(model(**inputs))
        return F.cross_entropy(wide(logits), labels), len(labels)

    def before_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Set the learning rates of this step."""
        self.schedule.apply(optimizer, step)

    def evaluate(
        self, model: nn.Module, test: Dataset[Any], device: torch.device
    ) -> dict[str, float]:
        """Return accuracy and mean cross-entropy."""
        was_training = model.training
        model.eval()
        correct = total = 0
        loss = 0.0
        with torch.no_grad():
            for batch in DataLoader(test, batch_size=_BATCH, collate_fn=self.collate):
                inputs = {name: value.to(device) for name, value in batch.items()}
                labels = inputs.pop("labels")
                logits = logits_of(model(**inputs))
                loss += float(F.cross_entropy(logits, labels, reduction="sum"))
                correct += int((logits.argmax(1) == labels).sum())
                total += len(labels)
        model.train(was_training)
        return {"test_accuracy": correct / total, "test_loss": round(loss / total, 6)}

    def finish(self, model: nn.Module, test: Dataset[Any], device: torch.device) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def write_model(self, folder: RunFolder, model: nn.Module, metadata: dict[str, str]) -> None:
        """Write model and tokenizer as transformers does."""
        inner = model.model if isinstance(model, PromptedModel) else model
        save_trained(folder, inner, self.tokenizer)


def logits_of(output: Any) -> Tensor:
    """The logits of what a model returned: a tensor, or an output of transformers."""
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


class PromptedModel(nn.Module):
    """A masked language model that classifies: logits [B, K] of K words at the mask.

    Args:
        model: returns logits [B, T, V].
        words: the token of each class's word, [K].
    """

    def __init__(self, model: Any, words: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("words", torch.tensor(words), persistent=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, mask_at: Tensor) -> Tensor:
        """Return logits [B, K]; `mask_at` [B] is the mask's place in each row."""
        logits_BTV = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        logits_BTK = logits_BTV[:, :, self.words]
        at = mask_at[:, None, None].expand(-1, 1, logits_BTK.shape[2])
        return logits_BTK.gather(1, at)[:, 0]


def tokenize_rows(
    texts: Sequence[tuple[str, ...]], labels: Sequence[int], tokenizer: Any, max_length: int
) -> list[dict[str, Any]]:
    """Token ids of single texts or pairs, cut to `max_length`, with their labels.

    Raises:
        DataError: a text has no token.
    """
    found = []
    columns = [list(column) for column in zip(*texts, strict=True)]
    batch = tokenizer(*columns, truncation=True, max_length=max_length)
    for number, label in enumerate(labels):
        row = {name: list(values[number]) for name, values in batch.items()}
        if not row["input_ids"]:
            raise DataError(f"row {number} has no tokens (an empty text?). Leave such rows out.")
        found.append(row | {"labels": label})
    return found


def prompt_tokens(
    texts: Sequence[tuple[str, ...]],
    labels: Sequence[int],
    tokenizer: Any,
    template: str,
    max_length: int,
) -> list[dict[str, Any]]:
    """Token ids of texts put into a template, and where the mask is in each.

    Args:
        texts: (text,) or (text, pair).
        labels: integer classes.
        tokenizer: of a masked model.
        template: such as ``"{text} It was {mask}."``; ``{pair}`` is the second text.
        max_length: texts are cut so that the whole, with its mask, is no longer.

    Raises:
        ConfigurationError: the template has no mask, or a place that the data does not fill.
    """
    pieces = list(_pieces(template))
    places = [place for _, place in pieces if place is not None]
    if places.count("mask") != 1 or "text" not in places:
        raise ConfigurationError(
            f"template={template!r}: expected {{text}} and {{mask}} once each, and {{pair}} for a "
            "second text, as in '{text} It was {mask}.'"
        )
    if tokenizer.mask_token_id is None:
        raise ConfigurationError("the tokenizer has no mask token: prompts need a masked model.")
    found = []
    for parts, label in zip(texts, labels, strict=True):
        values = dict(zip(("text", "pair"), parts, strict=False))
        missing = [p for p in places if p != "mask" and p not in values]
        if missing:
            raise ConfigurationError(
                f"template={template!r} has {{{missing[0]}}}, but rows have one text. Give --pair."
            )
        found.append(_prompt(pieces, values, tokenizer, max_length) | {"labels": label})
    return found


def _pieces(template: str) -> list[tuple[str, str | None]]:
    return [(literal, place) for literal, place, _, _ in Formatter().parse(template)]


def _prompt(
    pieces: Sequence[tuple[str, str | None]],
    values: Mapping[str, str],
    tokenizer: Any,
    max_length: int,
) -> dict[str, Any]:
    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    # What the tokenizer puts around a text, such as [CLS] and [SEP]: around the mask alone, here.
    alone = list(tokenizer(tokenizer.mask_token)["input_ids"])
    at = alone.index(tokenizer.mask_token_id)
    fixed = len(alone) + sum(len(ids(literal)) for literal, _ in pieces)
    texts = [place for _, place in pieces if place in values]
    room = max(1, (max_length - fixed) // max(1, len(texts)))
    tokens: list[int] = []
    for literal, place in pieces:
        tokens += ids(literal)
        if place == "mask":
            tokens.append(tokenizer.mask_token_id)
        elif place is not None:
            before = " " if tokens else ""  # as words within a sentence are tokenized
            tokens += ids(before + values[place])[:room]
    whole = [*alone[:at], *tokens, *alone[at + 1 :]]
    return {
        "input_ids": whole,
        "attention_mask": [1] * len(whole),
        "mask_at": whole.index(tokenizer.mask_token_id),
    }


def word_tokens(words: Sequence[str], tokenizer: Any) -> list[int]:
    """The token of each class's word, as it is written after a space.

    Raises:
        ConfigurationError: a word is more than one token, or two words are the same.
    """
    found = []
    for word in words:
        ids = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise ConfigurationError(
                f"label word {word!r} is {len(ids)} tokens of this tokenizer, or none that it knows. "
                "Choose one that is a single token."
            )
        found.append(ids[0])
    if len(set(found)) < len(found):
        raise ConfigurationError(f"label words {', '.join(words)}: each class needs its own.")
    return found
