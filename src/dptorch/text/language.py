"""Predict words: language modelling, and table-to-text, where only the text after the table counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dptorch.errors import DataError
from dptorch.integrations.perplexity import perplexity
from dptorch.text.batches import IGNORED, Padded
from dptorch.text.generation import generate
from dptorch.text.models import save_trained
from dptorch.text.precision import computing, wide
from dptorch.text.scores import text_scores
from dptorch.training.run_folder import RunFolder
from dptorch.training.schedules import Schedule

__all__ = ["LanguageModelling", "TableToText", "tokenize_pairs", "tokenize_texts"]

_BATCH: Final = 16
_LARGEST: Final = 700.0


@dataclass(frozen=True)
class LanguageModelling:
    """The task of `dptorch.training.task.Task` for texts whose every word is predicted.

    Attributes:
        tokenizer: of the model.
        schedule: of the learning rate.
        test_texts: what perplexity is measured on.
        max_length: tokens of a text that are read.
        precision: of training, a name in `dptorch.text.precision.PRECISIONS`.
        prompts: what samples begin with; public.
        new_tokens: of a sample.
    """

    tokenizer: Any
    schedule: Schedule
    test_texts: Sequence[str]
    max_length: int
    precision: str = "float32"
    prompts: Sequence[str] = ()
    new_tokens: int = 40

    @property
    def collate(self) -> Callable[[list[Any]], Any]:
        """Pads with the tokenizer's token, and labels with what does not count."""
        return Padded({"input_ids": self.tokenizer.pad_token_id, "labels": IGNORED})

    def loss(self, model: nn.Module, batch: Any, device: torch.device) -> tuple[Tensor, int]:
        """Return the mean over examples of each one's mean over its tokens."""
        inputs = {name: value.to(device) for name, value in batch.items()}
        labels_BT = inputs.pop("labels")
        with computing(self.precision, device):
            logits_BTV = model(**inputs).logits
        return mean_of_means(wide(logits_BTV[:, :-1]), labels_BT[:, 1:]), len(labels_BT)

    def before_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Set the learning rates of this step."""
        self.schedule.apply(optimizer, step)

    def evaluate(
        self, model: nn.Module, test: Dataset[Any], device: torch.device
    ) -> dict[str, float]:
        """Return the perplexity of the test texts."""
        value = perplexity(model, list(self.test_texts), self.tokenizer, max_length=self.max_length)
        return {"test_perplexity": round(value, 4)}

    def finish(self, model: nn.Module, test: Dataset[Any], device: torch.device) -> dict[str, Any]:
        """Return samples that begin with the prompts."""
        texts = generate(
            model, self.tokenizer, list(self.prompts), new_tokens=self.new_tokens, greedy=False
        )
        samples = [{"prompt": p, "text": t} for p, t in zip(self.prompts, texts, strict=True)]
        return {"samples": samples}

    def write_model(self, folder: RunFolder, model: nn.Module, metadata: dict[str, str]) -> None:
        """Write model and tokenizer as transformers does."""
        save_trained(folder, model, self.tokenizer)


def mean_of_means(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """The mean over examples of each one's mean cross-entropy over the labels that count, [].

    Written out, because a run to compare with has no tape, and ``F.cross_entropy`` would give every
    token of the rows that are in memory together the same weight.
    """
    losses_BT = F.cross_entropy(
        logits_BTV.transpose(1, 2), labels_BT, ignore_index=IGNORED, reduction="none"
    )
    count_B = (labels_BT != IGNORED).sum(1).clamp(min=1)
    return (losses_BT.sum(1) / count_B).mean()


@dataclass(frozen=True)
class TableToText(LanguageModelling):
    """The same for pairs (table, text), of which the text counts.

    Attributes:
        references: test tables, as they are given to the model, and the texts that people wrote for
            each.
        most_generated: how many of them texts are generated for when the run is done.
    """

    references: Mapping[str, Sequence[str]] = field(default_factory=dict)
    most_generated: int = 100

    def evaluate(
        self, model: nn.Module, test: Dataset[Any], device: torch.device
    ) -> dict[str, float]:
        """Return e to the mean loss of a token of the test texts, given their tables."""
        was_training = model.training
        model.eval()
        loss, tokens = 0.0, 0
        with torch.no_grad():
            for batch in DataLoader(test, batch_size=_BATCH, collate_fn=self.collate):
                inputs = {name: value.to(device) for name, value in batch.items()}
                labels = inputs.pop("labels")[:, 1:]
                logits = wide(model(**inputs).logits[:, :-1])
                loss += float(
                    F.cross_entropy(
                        logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="sum"
                    )
                )
                tokens += int((labels != IGNORED).sum())
        model.train(was_training)
        return {"test_perplexity": round(math.exp(min(loss / tokens, _LARGEST)), 4)}

    def finish(self, model: nn.Module, test: Dataset[Any], device: torch.device) -> dict[str, Any]:
        """Return scores of generated texts against the references, and some of them."""
        tables = list(self.references)[: self.most_generated]
        texts = generate(model, self.tokenizer, tables, new_tokens=self.new_tokens, greedy=True)
        written = [self.references[table] for table in tables]
        samples = [
            {"prompt": table, "text": text, "reference": references[0]}
            for table, text, references in zip(tables[:8], texts[:8], written[:8], strict=True)
        ]
        return {
            "scores": text_scores(texts, written),
            "scored": len(tables),
            "samples": samples,
        }


def tokenize_texts(
    texts: Sequence[str], tokenizer: Any, max_length: int
) -> list[dict[str, list[int]]]:
    """Token ids of texts, with the token for the end, cut to `max_length`; every token is a label.

    Raises:
        DataError: a text has fewer than two tokens, so that none is predicted.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    found = []
    # All at once: tokenizers work on many texts in parallel.
    for number, tokens in enumerate(tokenizer(list(texts), add_special_tokens=False)["input_ids"]):
        ids = [*tokens, *end][:max_length]
        if len(ids) < 2:
            raise DataError(f"row {number} has no word to predict. Leave such rows out.")
        found.append(_example(ids, list(ids)))
    return found


def tokenize_pairs(
    tables: Sequence[str], texts: Sequence[str], tokenizer: Any, max_length: int
) -> list[dict[str, list[int]]]:
    """Token ids of each table and its text, of which the text's tokens are labels.

    Tables are cut to leave room for the text, and texts to `max_length` less one.

    Raises:
        DataError: a text has no token.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    found = []
    befores = tokenizer(list(tables), add_special_tokens=False)["input_ids"]
    afters = tokenizer([f" {text}" for text in texts], add_special_tokens=False)["input_ids"]
    for number, (before, after) in enumerate(zip(befores, afters, strict=True)):
        if not after:
            raise DataError(f"row {number} has no word to predict. Leave such rows out.")
        after = [*after, *end][: max_length - 1]
        before = before[: max_length - len(after)]
        found.append(_example([*before, *after], [IGNORED] * len(before) + after))
    return found


def _example(ids: list[int], labels: list[int]) -> dict[str, list[int]]:
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
