"""A text job: everything that determines a run of a text task, and the objects it is run with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch

from dptorch.engine.privacy_engine import PrivacyEngine
from dptorch.errors import ConfigurationError, one_of
from dptorch.text import classification, language
from dptorch.text.batches import Tokenized, by_length
from dptorch.text.bible import SMALL_GPT, passages, small_gpt
from dptorch.text.methods import apply_method, head_parameters
from dptorch.text.models import load_pretrained
from dptorch.text.pooling import POOLS, PooledClassifier
from dptorch.text.precision import PRECISIONS, suit
from dptorch.text.recipes import PASSAGES, SNIPPETS, TASKS, defaults_of, get_recipe
from dptorch.text.rows import (
    Row,
    Split,
    movie_reviews,
    read_split,
    require_columns,
    split_rows,
)
from dptorch.training.data import CLASSES_READ, TrainTest, encode_labels
from dptorch.training.job import (
    RunSettings,
    Setup,
    device_of,
    plan_of,
    refuse_pairs,
    require_positive,
    with_rate,
)
from dptorch.training.origin import Origin, folder_of, origin_of
from dptorch.training.schedules import DECAYS, Schedule
from dptorch.training.task import Task

__all__ = ["TextJob", "prepare"]


@dataclass(frozen=True)
class TextJob(RunSettings):
    """What `dptorch train TASK` was asked for. None means: as `dptorch.text.recipes` says.

    `prepare` returns a job with every None decided that has a default, and that is what `run.json`
    records.

    Attributes:
        task: a name in `dptorch.text.recipes.TASKS`.
        recipe: a name in `dptorch.text.recipes.RECIPES`.
        data: file, directory or ``hub:NAME``; see `dptorch.text.rows`.
        test_data: a file of test rows.
        test_name: of the part of `data` that is the test set.
        test_fraction: held out where there is no test set.
        text, pair, label, target: columns: of the text (or table), of a second text, of the class, of
            the text to write.
        model: folder or name of a pretrained model.
        method: what is trained, a name in `dptorch.text.methods.METHODS`.
        lora_rank, prefix_length: of these methods.
        template, label_words: classify by the word at a mask; see `classification.prompt_tokens`.
        prompt: False: a new head in spite of the recipe's template.
        pool: what the new head of a classifier is given, a name in `dptorch.text.pooling.POOLS`.
        head_first: share of the steps in which the new head alone moves, at the run's own noise and
            sampling rate. At a head of zeros nothing below it has a gradient.
        precision: a name in `dptorch.text.precision.PRECISIONS`.
        max_length: tokens of an example that are read.
        learning_rate, head_learning_rate, weight_decay: of AdamW.
        decay: of the rates; see `dptorch.training.schedules.Schedule`.
        prompts: what samples begin with, one a line.
        generate: test tables that texts are generated for.
        new_tokens: of a generated text.

    The rest is as in `dptorch.training.job.RunSettings`.

    Example:
        >>> job = TextJob("language-model", data="texts.jsonl")
        >>> TextJob.from_dict(job.to_dict()) == job
        True
    """

    task: str
    recipe: str | None = None
    data: str | None = None
    test_data: str | None = None
    test_name: str | None = None
    test_fraction: float = 0.2
    text: str | None = None
    pair: str | None = None
    label: str | None = None
    target: str | None = None
    model: str | None = None
    method: str | None = None
    lora_rank: int = 8
    prefix_length: int = 10
    template: str | None = None
    label_words: str | None = None
    prompt: bool = True
    pool: str | None = None
    precision: str | None = None
    head_first: float | None = None
    max_length: int | None = None
    head_learning_rate: float | None = None
    decay: str | None = None
    weight_decay: float | None = None
    max_physical_batch_size: int = 16
    prompts: str = ""
    generate: int = 100
    new_tokens: int = 40


def prepare(job: TextJob) -> Setup:
    """Read and tokenize the data, load the model, build the engine; nothing is spent or written.

    Raises:
        ConfigurationError: options contradict each other or have impossible values, or the model
            cannot be loaded.
        DataError: the data cannot be read.
        PrivacyError: the model cannot be trained privately.
    """
    one_of("task", job.task, TASKS)
    _refuse_contradictions(job)
    job = _decide(job)
    device = device_of(job.device)
    if job.seed is not None:
        torch.manual_seed(job.seed)
    build = {
        "text-classification": _classification,
        "table-to-text": _table_to_text,
        "language-model": _language_model,
    }[job.task]
    origin = _origin(job)
    data, model, task_of = build(job)
    precision = job.precision or "float32"
    model = suit(model, precision, device).to(device)
    size = len(data.train)  # type: ignore[arg-type]
    job = with_rate(job, size)
    plan = plan_of(job, sample_size=size)
    if not plan.places_kept:
        # A draw is handed out in the order of the data: so its parts hold texts of like length, and
        # little padding. Whether a record is drawn does not depend on its place.
        train, test = (cast(Any, by_length(side)) for side in (data.train, data.test))
        data = replace(data, train=train, test=test)
    task = task_of(schedule=Schedule(job.decay or "linear", plan.steps), precision=precision)
    engine = PrivacyEngine(model, plan=plan, clipping_mode=job.clipping_mode, seed=job.seed)
    if isinstance(model, PooledClassifier):
        first = round((job.head_first or 0.0) * plan.steps)
        model.waits = lambda: model.training and engine.steps_done < first
    optimizer = _optimizer(model, job, plan.steps)
    engine.attach(optimizer)
    return Setup(
        job, data, model, engine, optimizer, device, task=task,
        notes=_notes(job, origin),
        began_from=None if origin is None else origin.to_dict(),
    )  # fmt: skip


def _origin(job: TextJob) -> Origin | None:
    """What is known of the weights of another run; of a published model nothing is read."""
    assert job.model is not None
    assert job.data is not None
    if folder_of(job.model) is None:
        return None
    return origin_of(job.model, None, None, None, job.data, protects=job.protects)


def _refuse_contradictions(job: TextJob) -> None:
    refuse_pairs(
        job,
        ("batch_size", "sample_rate", "one determines the other"),
        ("target_epsilon", "noise_multiplier", "one determines the other"),
    )
    require_positive(
        job, "epochs", "learning_rate", "head_learning_rate", "max_length", "new_tokens"
    )
    if job.decay is not None:
        one_of("decay", job.decay, DECAYS)
    if job.pool is not None:
        one_of("pool", job.pool, POOLS)
    if job.precision is not None:
        one_of("precision", job.precision, PRECISIONS)
    if job.head_first is not None and not 0 <= job.head_first < 1:
        raise ConfigurationError(
            f"head_first={job.head_first}: expected a share of the steps in [0, 1)."
        )
    if (job.template is None) != (job.label_words is None):
        raise ConfigurationError(
            f"template={job.template!r} and label_words={job.label_words!r} belong together: a "
            "sentence with a mask, and the word of each class."
        )


def _decide(job: TextJob) -> TextJob:
    """Fill in what was left open."""
    recipe = None if job.recipe is None else get_recipe(job.recipe, job.task)
    suggested = defaults_of(recipe, job.method)
    if job.data is not None:  # the user's own rows: the recipe's part has no meaning for them
        suggested.pop("test_name", None)
    if job.batch_size is not None or job.sample_rate is not None:
        suggested["batch_size"] = suggested["sample_rate"] = None
    if job.noise_multiplier is not None:
        suggested["target_epsilon"] = None
    columns = {"text": "text", "label": "label", "target": "target"}
    filled = {
        name: value for name, value in (columns | suggested).items() if getattr(job, name) is None
    }
    job = replace(job, **filled)
    for name, what in (("data", "rows to train on"), ("model", "a pretrained model")):
        if getattr(job, name) is None:
            raise ConfigurationError(
                f"--{name} is missing: {what}. Or give a --recipe, whose own is downloaded."
            )
    return job


def _notes(job: TextJob, origin: Origin | None) -> tuple[str, ...]:
    """What the weights began from, and what the recipe's settings owe to its own data, if that is what
    is trained on."""
    found = [] if origin is None else [origin.note]
    recipe = None if job.recipe is None else get_recipe(job.recipe, job.task)
    if recipe is not None and recipe.note and job.data == recipe.settings["data"]:
        found.append(recipe.note)
    return tuple(found)


def _optimizer(model: Any, job: TextJob, steps: int) -> torch.optim.Optimizer:
    """AdamW, with a group for a new head."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    head: set[int] = set()
    if job.task == "text-classification":
        inner = model.model if isinstance(model, classification.PromptedModel) else model
        head = {id(p) for p in head_parameters(inner, classifier=True)}
    if job.head_first and not head:
        raise ConfigurationError(
            f"head_first={job.head_first:g}: no head of {type(model).__name__} is trained. Leave it "
            "out, or the template."
        )
    groups: list[dict[str, Any]] = [
        {
            "params": [p for p in trainable if id(p) not in head],
            "first_step": round((job.head_first or 0.0) * steps),
        },
        {
            "params": [p for p in trainable if id(p) in head],
            "lr": job.head_learning_rate or job.learning_rate,
        },
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=job.learning_rate or 0.0,
        weight_decay=job.weight_decay or 0.0,
    )


# ------------------------------------------------------------------------------------------- tasks

#: Data, a model, and what makes the task of a schedule, which is known once the plan is.
Built = tuple[TrainTest, Any, Callable[..., Task]]


def _classification(job: TextJob) -> Built:
    assert job.text
    assert job.label
    assert job.model
    if job.pool == "mean" and job.template is not None and job.prompt:
        raise ConfigurationError(
            f"pool='mean' is for a new head, and template={job.template!r} has the model's own fill "
            "in a word. Leave one of them out."
        )
    columns = [job.text] + ([job.pair] if job.pair else [])
    split = _split(job, columns, [*columns, job.label])
    rows = [*split.train, *split.test]
    codes, classes = encode_labels([row[job.label] for row in rows], split.source)
    labels = codes.tolist()
    texts = [tuple(as_text(row[column]) for column in columns) for row in rows]
    length = job.max_length or 128
    model: Any
    tokens: list[dict[str, Any]]
    if job.template is not None and job.prompt:
        words = [word.strip() for word in (job.label_words or "").split(",")]
        if len(words) != len(classes):
            raise ConfigurationError(
                f"label_words={job.label_words!r} are {len(words)}, but there are {len(classes)} "
                f"classes: {', '.join(classes)}. Give one for each, in that order."
            )
        inner, tokenizer = load_pretrained(job.model, "masked")
        inner = _trainable(inner, job, "masked")
        model = classification.PromptedModel(inner, classification.word_tokens(words, tokenizer))
        tokens = classification.prompt_tokens(texts, labels, tokenizer, job.template, length)
    elif job.pool == "mean":
        model, tokenizer = load_pretrained(job.model, "body")
        model = PooledClassifier(_trainable(model, job, "body"), len(classes))
        tokens = classification.tokenize_rows(texts, labels, tokenizer, length)
    else:
        model, tokenizer = load_pretrained(job.model, "classifier", num_labels=len(classes))
        model = _trainable(model, job, "classifier")
        tokens = classification.tokenize_rows(texts, labels, tokenizer, length)
    task = partial(classification.TextClassification, tokenizer)
    return _data(split, tokens, classes, length), model, task


def _language_model(job: TextJob) -> Built:
    assert job.text
    split = _split(job, [job.text], [job.text])
    model, tokenizer = _causal(job)
    length = job.max_length or 128
    texts = [as_text(row[job.text]) for row in (*split.train, *split.test)]
    tokens = language.tokenize_texts(texts, tokenizer, length)
    task = partial(
        language.LanguageModelling,
        tokenizer,
        test_texts=texts[len(split.train) :],
        max_length=length,
        prompts=[line for line in job.prompts.splitlines() if line.strip()] or ["", "", ""],
        new_tokens=job.new_tokens,
    )
    return _data(split, tokens, (), length), model, task


def _table_to_text(job: TextJob) -> Built:
    assert job.text
    assert job.target
    split = _split(job, [job.text], [job.text, job.target])
    model, tokenizer = _causal(job)
    length = job.max_length or 128
    tables = [f"{as_text(row[job.text])} |" for row in (*split.train, *split.test)]
    texts = [as_text(row[job.target]) for row in (*split.train, *split.test)]
    references: dict[str, list[str]] = {}
    for table, text in zip(tables[len(split.train) :], texts[len(split.train) :], strict=True):
        references.setdefault(table, []).append(text)
    task = partial(
        language.TableToText,
        tokenizer,
        test_texts=(),
        max_length=length,
        new_tokens=job.new_tokens,
        references=references,
        most_generated=job.generate,
    )
    tokens = language.tokenize_pairs(tables, texts, tokenizer, length)
    return _data(split, tokens, (), length), model, task


def _trainable(model: Any, job: TextJob, kind: str) -> Any:
    return apply_method(
        model, job.method or "", kind, rank=job.lora_rank, prefix_length=job.prefix_length
    )


def _causal(job: TextJob) -> tuple[Any, Any]:
    if job.model == SMALL_GPT:
        model, tokenizer = small_gpt()
    else:
        model, tokenizer = load_pretrained(job.model or "", "causal")
    model = _trainable(model, job, "causal")
    return model, tokenizer


def _split(job: TextJob, key: Sequence[str], columns: Sequence[str]) -> Split:
    assert job.data is not None
    if job.data == PASSAGES:
        return split_rows(passages(), PASSAGES, fraction=job.test_fraction, key=key)
    if job.data == SNIPPETS:
        return movie_reviews()
    split = read_split(
        job.data,
        job.test_data,
        test_fraction=job.test_fraction,
        key=key,
        test_name=job.test_name or "",
    )
    require_columns(split.train, columns, split.source)
    require_columns(split.test, columns, split.source)
    return split


def _data(
    split: Split, tokens: Sequence[Mapping[str, Any]], classes: tuple[str, ...], length: int
) -> TrainTest:
    size = len(split.train)
    train: Any = Tokenized(tokens[:size])
    test: Any = Tokenized(tokens[size:])
    read = CLASSES_READ if classes else ()
    return TrainTest(train, test, classes, (length,), split.source, read_from_data=read)


def as_text(value: Row | Any) -> str:
    """Return a cell as text: lists of triples with ``|`` between them.

    Example:
        >>> as_text([["Alimentum", "area", "centre"], ["Alimentum", "food", "fast"]])
        'Alimentum : area : centre | Alimentum : food : fast'
    """
    if isinstance(value, list | tuple):
        return " | ".join(
            " : ".join(map(str, part)) if isinstance(part, list | tuple) else str(part)
            for part in value
        )
    return str(value)
