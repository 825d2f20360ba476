"""Names of other libraries that scripts import and that no longer exist, or are not installed.

transformers 5 has removed names of transformers 4, on which the scripts of private-transformers and
fastDP were written. What stands for them here was written for this purpose, from what the scripts ask
of them, and does no more.
"""

from __future__ import annotations

import csv
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, make_dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import tqdm

__all__ = ["add_former_names", "add_names_of_transformers"]


def add_former_names() -> None:
    """Make the names of small libraries importable; what is there stays as it is."""
    _module("ml_swissknife", utils=_module("ml_swissknife.utils", **_SWISSKNIFE))
    _module("fire", Fire=fire)
    _module("IPython", display=_module("IPython.display", Image=dict))
    for imported_and_not_used in ("deepspeed", "requests"):
        _module(imported_and_not_used)
    importlib.import_module("tqdm.notebook").tqdm = tqdm.tqdm  # whose widgets need a notebook


def _module(name: str, **names: Any) -> ModuleType:
    """Return the module `name`, made if it cannot be imported, with `names` it has not."""
    try:
        __import__(name)
        found = sys.modules[name]
    except ImportError:
        found = sys.modules[name] = ModuleType(name)
        found.__path__ = []
        found.__spec__ = ModuleSpec(name, None)
        parent, _, last = name.rpartition(".")
        if parent in sys.modules:
            setattr(sys.modules[parent], last, found)
    for key, value in names.items():
        if not hasattr(found, key):
            setattr(found, key, value)
    return found


# -- transformers 4 --------------------------------------------------------------------------------


def add_names_of_transformers() -> None:
    """Make the names of transformers 4 importable; what is there stays as it is."""

    def never() -> bool:
        return False

    for name in ("file_utils", "optimization", "modeling_utils", "trainer_utils", "trainer"):
        importlib.import_module(f"transformers.{name}")
    transformers: Any = importlib.import_module("transformers")  # some imports put another in place
    conv1d = importlib.import_module("transformers.pytorch_utils").Conv1D
    trainer: Any = transformers.Trainer
    _module("transformers.file_utils", is_torch_tpu_available=never)
    _module("transformers.optimization", AdamW=torch.optim.AdamW)
    _module("transformers.modeling_utils", Conv1D=conv1d)
    _module("transformers.trainer_utils", EvaluationStrategy=transformers.IntervalStrategy)
    _module("transformers.deepspeed", deepspeed_init=None)
    _module("transformers.data.metrics", glue_compute_metrics=accuracy)
    _module("transformers.data.processors")
    _module(
        "transformers.data.processors.utils", InputFeatures=InputFeatures, InputExample=InputExample
    )
    _module(
        "transformers.data.processors.glue", os=os, DataProcessor=DataProcessor,
        InputExample=InputExample, glue_convert_examples_to_features=features_of,
    )  # fmt: skip
    if not hasattr(trainer, "prediction_loop"):
        trainer.prediction_loop = prediction_loop
    torch.serialization.add_safe_globals([InputExample])  # which scripts keep in files
    _resize_into_new_tables(transformers.PreTrainedModel)
    _begin_by_init_weights(transformers.PreTrainedModel)
    base: Any = transformers.PreTrainedTokenizerBase
    if not hasattr(base, "_convert_token_to_id"):
        base._convert_token_to_id = base.convert_tokens_to_ids
        base._convert_id_to_token = base.convert_ids_to_tokens
    globals()["TrainingArguments"] = _with_former_arguments(transformers.TrainingArguments)
    transformers.TrainingArguments = TrainingArguments
    _module(
        "transformers", MODEL_WITH_LM_HEAD_MAPPING=transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        GlueDataset=GlueDataset, GlueDataTrainingArguments=GlueDataTrainingArguments,
        is_torch_tpu_available=never, AutoModelWithLMHead=AutoModelWithLMHead,
    )  # fmt: skip


#: Set by `_with_former_arguments`; here, so that objects of it can be saved.
TrainingArguments: Any = None


def _with_former_arguments(arguments: type) -> type:
    """A subclass with arguments of transformers 4, which the scripts set and look at."""
    former: dict[str, tuple[type, Any]] = {
        "deepspeed_config": (str, None),
        "evaluation_strategy": (str, "no"),
        "logging_dir": (str, None),
        "overwrite_output_dir": (bool, False),
        "past_index": (int, -1),
        "tpu_metrics_debug": (bool, False),
    }
    missing = [
        (n, k, field(default=d)) for n, (k, d) in former.items() if not hasattr(arguments, n)
    ]
    name = "TrainingArguments"
    return make_dataclass(name, missing, bases=(arguments,), namespace={"__module__": __name__})


def prediction_loop(self: Any, dataloader: Iterable[Any], description: str) -> Any:
    """A Trainer's loop over data to evaluate on, which asks its ``compute_loss`` as in transformers 4.

    Returns:
        ``predictions``, ``label_ids`` and ``metrics`` with names that begin with "eval_".
    """
    from transformers import EvalPrediction
    from transformers.trainer_utils import PredictionOutput

    logits, labels = [], []
    self.model.eval()
    for batch in dataloader:
        inputs = self._prepare_inputs(batch)
        labels.append(inputs["labels"])
        with torch.no_grad():
            _, outputs = self.compute_loss(self.model, dict(inputs), return_outputs=True)
        logits.append(outputs[1])
    found = EvalPrediction(torch.cat(logits).numpy(), torch.cat(labels).numpy())
    metrics = {f"eval_{name}": value for name, value in self.compute_metrics(found).items()}
    return PredictionOutput(found.predictions, found.label_ids, metrics)


def _resize_into_new_tables(models: Any) -> None:
    """Let resizing make another table, as in transformers 4; scripts compare the one before with it."""
    resize = models.resize_token_embeddings

    def in_a_new_table(self: Any, size: int, *args: Any, **settings: Any) -> Any:
        table = self.get_input_embeddings()
        if size == table.num_embeddings:
            return table
        table.weight = torch.nn.Parameter(table.weight.detach().clone())
        return resize(self, size, *args, **settings)

    models.resize_token_embeddings = in_a_new_table


def _begin_by_init_weights(models: Any) -> None:
    """Let models call ``init_weights`` at the end of their constructors, which is ``post_init`` now."""
    again = models.init_weights

    def init_weights(self: Any) -> None:
        again(self) if hasattr(self, "all_tied_weights_keys") else self.post_init()

    models.init_weights = init_weights


class AutoModelWithLMHead:
    """``from_pretrained`` of a causal model, or of one with an encoder and a decoder."""

    @staticmethod
    def from_pretrained(name: str, config: Any, **settings: Any) -> Any:
        import transformers

        both = config.is_encoder_decoder
        auto = transformers.AutoModelForSeq2SeqLM if both else transformers.AutoModelForCausalLM
        return auto.from_pretrained(name, config=config, **settings)


@dataclass
class GlueDataTrainingArguments:
    """Where the files of a GLUE task are, and how long a text may be."""

    task_name: str = field(metadata={"help": "name of the task"})
    data_dir: str = field(metadata={"help": "folder of its files"})
    max_seq_length: int = field(default=128, metadata={"help": "tokens of a text"})
    overwrite_cache: bool = field(default=False, metadata={"help": "read the files again"})


@dataclass
class InputExample:
    """A text, or two, and its label."""

    guid: str
    text_a: str
    text_b: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class InputFeatures:
    """The ids of a text's tokens, and its label."""

    input_ids: list[int]
    attention_mask: list[int] | None = None
    token_type_ids: list[int] | None = None
    label: int | float | None = None


class DataProcessor:
    """Reads the files of a task; the scripts derive their own from it."""

    @classmethod
    def _read_tsv(cls, path: str) -> list[list[str]]:
        with Path(path).open(encoding="utf-8-sig") as file:
            return list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def features_of(
    examples: Sequence[InputExample], tokenizer: Any, max_length: int, label_list: Sequence[str],
    output_mode: str,
) -> list[InputFeatures]:  # fmt: skip
    """The examples as ids of `max_length` tokens, and as places of their labels in the list."""
    assert output_mode == "classification", output_mode
    both = [(e.text_a,) if e.text_b is None else (e.text_a, e.text_b) for e in examples]
    coded = [
        tokenizer(*t, truncation=True, padding="max_length", max_length=max_length) for t in both
    ]
    return [
        InputFeatures(**code, label=label_list.index(str(example.label)))
        for code, example in zip(coded, examples, strict=True)
    ]


class GlueDataset(torch.utils.data.Dataset[InputFeatures]):
    """A task with one sentence and labels "0" and "1", tokenized."""

    def __init__(self, args: Any, tokenizer: Any, mode: str = "train") -> None:
        self.args = args
        rows = DataProcessor._read_tsv(str(Path(args.data_dir) / f"{mode}.tsv"))[1:]
        examples = [InputExample(f"{mode}-{i}", row[0], label=row[1]) for i, row in enumerate(rows)]
        self.features = features_of(
            examples, tokenizer, args.max_seq_length, ["0", "1"], "classification"
        )

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> InputFeatures:
        return self.features[index]


def accuracy(task: str, predictions: Any, labels: Any) -> dict[str, float]:
    """The metric of tasks that are scored by accuracy."""
    return {"acc": float((predictions == labels).mean())}


# -- ml_swissknife and fire ------------------------------------------------------------------------


class AverageMeter:
    """The mean of the numbers given to `step`."""

    def __init__(self) -> None:
        self.numbers: list[float] = []

    def step(self, number: float) -> None:
        self.numbers.append(number)

    def item(self) -> float:
        return sum(self.numbers) / len(self.numbers)


def _parent(path: str) -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return Path(path)


def dump_json(value: Any, path: str, default: Callable[[Any], Any] | None = None) -> None:
    _parent(path).write_text(json.dumps(value, indent=4, default=default))


def save_tensors(value: Any, path: str) -> None:
    torch.save(value, _parent(path))


def split_flat(flat_tensor: torch.Tensor, shapes: Sequence[torch.Size]) -> list[torch.Tensor]:
    parts = flat_tensor.split([shape.numel() for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def zip_same_length(*parts: Iterable[Any]) -> Iterable[tuple[Any, ...]]:
    return zip(*parts, strict=True)


def count_parameters(model: torch.nn.Module, only_differentiable: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not only_differentiable)


def cifar_loaders(
    data_name: str, train_batch_size: int, test_batch_size: int, train_transform: Any,
    test_transform: Any, **_: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """Loaders of CIFAR-10 for training, shuffled, and for testing."""
    from torchvision import datasets

    assert data_name == "cifar10", data_name
    train = datasets.CIFAR10("data", train=True, transform=train_transform)
    test = datasets.CIFAR10("data", train=False, transform=test_transform)
    loader = torch.utils.data.DataLoader
    return loader(train, train_batch_size, shuffle=True), loader(test, test_batch_size)


_SWISSKNIFE: dict[str, Any] = {
    "AvgMeter": AverageMeter,
    "count_parameters": count_parameters,
    "flat_to_shape": split_flat,
    "get_loader": cifar_loaders,
    "jdump": dump_json,
    "join": os.path.join,
    "makedirs": os.makedirs,
    "tsave": save_tensors,
    "zip_": zip_same_length,
}


def fire(function: Callable[..., Any]) -> Any:
    """Call `function` with the ``--name value`` of the command line, as Python literals if they are."""
    given, known = sys.argv[1:], inspect.signature(function).parameters
    settings: dict[str, Any] = {}
    for name, value in zip(given[::2], given[1::2], strict=True):
        key = name.removeprefix("--")
        if key not in known:
            raise SystemExit(f"{name} is not known; expected one of {list(known)}")
        try:
            settings[key] = json.loads(value.lower())
        except ValueError:
            settings[key] = value
    return function(**settings)
