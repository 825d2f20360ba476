"""A trained classifier of texts with its tokenizer: texts in, classes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dptorch.errors import ConfigurationError, DataError
from dptorch.text.batches import Padded
from dptorch.text.classification import (
    PromptedModel,
    logits_of,
    prompt_tokens,
    tokenize_rows,
    word_tokens,
)
from dptorch.text.job import as_text
from dptorch.text.models import load_run
from dptorch.text.recipes import TASKS
from dptorch.training import predictor
from dptorch.training.digest import verify
from dptorch.training.run_folder import RunFolder

__all__ = ["TextPredictor", "load"]

_BATCH: Final = 64  # always: the last bit of a matrix product may depend on the number of rows


@dataclass(frozen=True, eq=False)
class TextPredictor:
    """A trained classifier that takes texts as they are.

    Attributes:
        network: the trained network, in evaluation mode.
        tokenizer: of the network.
        classes: their names.
        columns: of a row: the text, and the second text where the model takes pairs.
        template: what a text is put into before the network fills in a word; None for a head.
        max_length: tokens that are read.
        statement: the privacy statement, as plain values.
        digest: SHA-256 of all that predictions depend on; see `dptorch.training.digest.digest_of`.

    Example:
        >>> import dptorch
        >>> model = dptorch.load("runs/letters-1")  # doctest: +SKIP
        >>> model.predict(["The parcel has not arrived."])  # doctest: +SKIP
        array(['complaint'], dtype=object)
    """

    network: nn.Module
    tokenizer: Any
    classes: tuple[str, ...]
    columns: tuple[str, ...]
    template: str | None
    max_length: int
    statement: Mapping[str, Any]
    digest: str

    def predict(self, rows: Sequence[Any]) -> NDArray[Any]:
        """Predict the class name of each row, object [N].

        Args:
            rows: texts, tuples of a text and its second text, or mappings that have `columns`.

        Raises:
            DataError: a row has no text.
        """
        return self.decide(self.outputs(self.inputs(rows)))

    def predict_proba(self, rows: Sequence[Any]) -> NDArray[np.float64]:
        """Estimate the probability of each class, float64 [N, classes]; see `predict`."""
        return self.probabilities(self.outputs(self.inputs(rows)))

    def inputs(self, rows: Sequence[Any]) -> list[dict[str, Any]]:
        """Token ids of each row.

        Raises:
            DataError: a row has no text.
        """
        if isinstance(rows, str):
            raise DataError(f"rows={rows[:40]!r} is one text. Expected a list of texts.")
        texts = [self._texts(row, number) for number, row in enumerate(rows)]
        unknown = [0] * len(texts)  # the labels, which nothing reads
        if not texts:
            return []
        if self.template is not None:
            return prompt_tokens(texts, unknown, self.tokenizer, self.template, self.max_length)
        return tokenize_rows(texts, unknown, self.tokenizer, self.max_length)

    def outputs(self, inputs: Sequence[Mapping[str, Any]]) -> Tensor:
        """Run the network on token ids: float32 [N, classes]."""
        collate = Padded({"input_ids": self.tokenizer.pad_token_id})
        device = next(self.network.parameters()).device
        found = [torch.empty(0, len(self.classes))]
        with torch.no_grad():
            for start in range(0, len(inputs), _BATCH):
                batch = collate(inputs[start : start + _BATCH])
                del batch["labels"]
                given = {name: value.to(device) for name, value in batch.items()}
                found.append(logits_of(self.network(**given)).float().cpu())
        return torch.cat(found)

    def probabilities(self, outputs: Tensor) -> NDArray[np.float64]:
        """Turn outputs [N, classes] into probabilities, float64 [N, classes]."""
        return np.asarray(torch.softmax(outputs.double(), dim=1).numpy())

    def decide(self, outputs: Tensor) -> NDArray[Any]:
        """Turn outputs into class names, object [N]."""
        return np.asarray(np.array(self.classes, dtype=object)[outputs.argmax(1).numpy()])

    def _texts(self, row: Any, number: int) -> tuple[str, ...]:
        if isinstance(row, Mapping):
            absent = [column for column in self.columns if row.get(column) is None]
            if absent:
                raise DataError(f"row {number} has no {absent[0]!r}. Expected: {self.columns}.")
            parts = tuple(as_text(row[column]) for column in self.columns)
        else:
            parts = (row,) if isinstance(row, str) else tuple(row)
        if len(parts) != len(self.columns):
            raise DataError(
                f"row {number} has {len(parts)} texts. Expected {len(self.columns)}: "
                f"{', '.join(self.columns)}."
            )
        if not all(isinstance(part, str) and part.strip() for part in parts):
            raise DataError(f"row {number} is empty. Leave such rows out.")
        return parts


def load(folder: str | Path, *, digest: str | None = None) -> predictor.Predictor | TextPredictor:
    """Load a model with its preprocessing from a run or a release.

    Args:
        folder: such as "runs/demo", or what `dptorch release` wrote.
        digest: SHA-256 that the model must have, as its statement says; None trusts the statement in
            the folder, which finds damage, but not somebody who changed both.

    Guarantees:
        A release predicts what its run predicts, to the last bit.
        Held by `test_a_release_predicts_what_its_run_does` and
        `test_texts_are_classified_by_a_run_and_its_release`.

    Raises:
        DataError: the folder is incomplete, or its model is not the one that is stated.
        ConfigurationError: the model's factory cannot be imported any more; adapters whose pretrained
            model is not where it was; a model that writes, for which there is `dptorch generate`.
    """
    run = RunFolder(Path(folder))
    about = run.read_json("run.json")
    job = about["job"]
    if job.get("task") not in TASKS:
        return predictor.load(folder, digest=digest)
    if job["task"] != "text-classification":
        raise ConfigurationError(
            f"{folder} is a run of {job['task']}, whose model writes texts. Let it write with: "
            f"dptorch generate {folder}"
        )
    found = verify(run, about, digest)
    network, tokenizer = load_run(folder)
    prompted = bool(job["template"] and job["prompt"])
    if prompted:
        words = [word.strip() for word in job["label_words"].split(",")]
        network = PromptedModel(network, word_tokens(words, tokenizer)).eval()
    return TextPredictor(
        network=network,
        tokenizer=tokenizer,
        classes=tuple(about["data"]["classes"]),
        columns=(job["text"], *([job["pair"]] if job["pair"] else [])),
        template=job["template"] if prompted else None,
        max_length=about["data"]["input_shape"][0],
        statement=about["statement"],
        digest=found,
    )
