"""What is wrong with the data, found before the first step.

Rows are looked at here, as a run without privacy would do in its first epoch: an error names the place
of a row, and is for whoever runs the training. Nothing of it is released.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import EarlyStoppingCallback

from dptorch.errors import ConfigurationError, DataError, warn
from dptorch.integrations.transformers.refusals import refuse_private_rows

__all__ = ["check_data", "check_selection"]

_BLOCK = 10_000


def check_data(trainer: Any) -> None:
    """Look at the training data of a trainer whose `__init__` is done.

    Raises:
        ConfigurationError: the data cannot be drawn from or put into a batch, or its batches have no
            labels.
        DataError: a row has no token, or tokens that the model does not know.
    """
    dataset = trainer.train_dataset
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise ConfigurationError(
            f"train_dataset={type(dataset).__name__} is a stream, from which records cannot be drawn "
            "at random. Give a data set with a length, such as datasets.Dataset."
        )
    if not len(dataset):
        raise DataError("the training data has no rows.")
    _check_padding(trainer)
    _check_rows(trainer)
    _check_batch(trainer)


def check_selection(trainer: Any) -> None:
    """Look at what may choose a model or the end of a run by the evaluation data.

    Raises:
        ConfigurationError: a callback does though that data is not public, or what is said to be public
            is the private data.
    """
    public = trainer.privacy.eval_is_public
    stops = [c for c in trainer.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]
    if stops and not public:
        raise ConfigurationError(
            "EarlyStoppingCallback chooses when to stop by looking at the evaluation data, which "
            "no epsilon here covers. Leave it out, or say PrivacyArguments(eval_is_public=True) if "
            "that data is public."
        )
    if public:
        refuse_private_rows(trainer.train_dataset, trainer.eval_dataset)


def _check_padding(trainer: Any) -> None:
    tokenizer = trainer.processing_class
    if tokenizer is None or not hasattr(tokenizer, "pad_token"):
        return
    if tokenizer.pad_token is None:
        raise ConfigurationError(
            "the tokenizer has no pad token, and the texts of a batch have different lengths. Set "
            "tokenizer.pad_token = tokenizer.eos_token, and model.config.pad_token_id = "
            "tokenizer.pad_token_id."
        )
    model = _base(trainer)
    config = getattr(model, "config", None)
    if (
        config is not None
        and type(model).__name__.endswith("ForSequenceClassification")
        and not getattr(config, "is_encoder_decoder", False)
        and getattr(config, "pad_token_id", None) is None
        and hasattr(model, "score")  # decoders: they read the last token that is not padding
    ):
        raise ConfigurationError(
            "the model's config has no pad_token_id, so that it does not know where a text ends. Set "
            f"model.config.pad_token_id = {tokenizer.pad_token_id}."
        )


def _check_rows(trainer: Any) -> None:
    """Lengths, tokens and labels of all rows, where the data set holds them as columns."""
    dataset = trainer.train_dataset
    columns = getattr(dataset, "column_names", None) or []
    if not hasattr(dataset, "with_format") or "input_ids" not in columns:
        return
    model = _base(trainer)
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    known = getattr(embeddings, "num_embeddings", None)
    start, masked = 0, 0
    wanted = [c for c in ("input_ids", "labels") if c in columns]
    for table in dataset.select_columns(wanted).with_format("arrow").iter(batch_size=_BLOCK):
        tokens, lengths = _values(table["input_ids"])
        if lengths is None:
            return
        if (lengths == 0).any():
            row = start + int(np.argmin(lengths))
            raise DataError(
                f"row {row} of the training data has no tokens (an empty text?). Leave such rows out: "
                "dataset.filter(lambda row: len(row['input_ids']) > 0)."
            )
        if known is not None and len(tokens) and int(tokens.max()) >= known:
            raise DataError(
                f"a row of the training data has token {int(tokens.max())}, but the model knows "
                f"{known} tokens. Use the model's own tokenizer, or "
                "model.resize_token_embeddings(len(tokenizer))."
            )
        if "labels" in wanted:
            labels, counts = _values(table["labels"])
            if counts is not None and len(counts):
                counted = np.add.reduceat(np.append(labels != -100, False), _starts(counts))
                masked += int(((counted * (counts > 0)) == 0).sum())
        start += len(lengths)
    if masked:
        warn(
            f"{masked} of {start} rows have no label that counts: all are -100. They add nothing to a "
            "sum, as if they were not drawn."
        )


def _values(column: Any) -> tuple[Any, Any]:
    """The values of an arrow column of lists, one after another, and how many each row has."""
    import pyarrow
    import pyarrow.compute

    if not pyarrow.types.is_list(column.type) and not pyarrow.types.is_large_list(column.type):
        return None, None
    lengths = pyarrow.compute.fill_null(pyarrow.compute.list_value_length(column), 0)
    flat = pyarrow.compute.list_flatten(column)
    return flat.to_numpy(), lengths.to_numpy()


def _starts(counts: Any) -> Any:
    return np.concatenate([[0], np.cumsum(counts)[:-1]])


def _check_batch(trainer: Any) -> None:
    """Put the first two rows into a batch, as the loader will."""
    dataset, collate = trainer._columns_of_the_model()
    try:
        batch = collate([dataset[i] for i in range(min(2, len(dataset)))])
    except Exception as error:
        raise ConfigurationError(
            f"the first rows of the training data cannot be put into a batch by "
            f"{type(trainer.data_collator).__name__} ({error}). Give a data_collator that pads them, "
            "and leave out columns that are no numbers."
        ) from error
    labels = list(trainer.label_names or ["labels"])
    found = list(batch) if hasattr(batch, "keys") else []
    if found and not set(labels) & set(found) and "loss" not in found:
        given = getattr(trainer.train_dataset, "column_names", None) or found
        raise ConfigurationError(
            f"a batch has no labels: it holds {', '.join(found)}, and the model's labels are "
            f"{', '.join(labels)} (columns of the data: {', '.join(given)}). Name the column so, or "
            "use a data_collator that makes labels, such as DataCollatorForLanguageModeling(tokenizer, "
            "mlm=False)."
        )
    _check_smoothing(trainer, batch)
    own_loss = trainer.label_smoother is not None or trainer.compute_loss_func is not None
    config = getattr(_base(trainer), "config", None)
    if (
        own_loss
        and getattr(config, "is_encoder_decoder", False)
        and "decoder_input_ids" not in found
    ):
        raise ConfigurationError(
            "label smoothing, or a loss of your own, takes the labels from the model, which then needs "
            "decoder_input_ids: use DataCollatorForSeq2Seq(tokenizer, model=model)."
        )


def _check_smoothing(trainer: Any, batch: Any) -> None:
    """Refuse label smoothing of labels that are no classes."""
    label = (trainer.label_names or ["labels"])[0]
    labels = batch[label] if hasattr(batch, "keys") and label in batch else None
    # Of the arguments: the Trainer drops its smoother where a row has several labels.
    smoothing = trainer.args.label_smoothing_factor
    if smoothing and getattr(labels, "is_floating_point", bool)():
        problem = getattr(getattr(_base(trainer), "config", None), "problem_type", None)
        raise ConfigurationError(
            f"label_smoothing_factor={smoothing} spreads the label of one "
            f"class over all, and these labels are floating-point numbers (problem_type={problem!r}). "
            "Leave it out, or give class numbers; several labels of a row may be smoothed in the data."
        )


def _base(trainer: Any) -> Any:
    """The model itself, inside adapters."""
    model = trainer.model
    return model.get_base_model() if hasattr(model, "get_base_model") else model
