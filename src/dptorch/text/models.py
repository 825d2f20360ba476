"""Pretrained models and tokenizers, from folders or the hub, and the trained ones of a run."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from dptorch.errors import ConfigurationError, DataError
from dptorch.text.pooling import PooledClassifier
from dptorch.text.recipes import MINILM
from dptorch.training.packages import hide_broken_torchvision
from dptorch.training.reviews import encoder_folder
from dptorch.training.run_folder import PRETRAINED, RunFolder

__all__ = ["load_pretrained", "load_run", "save_trained"]

NEW: Final = "new.safetensors"  # beside adapters: see `_made_new`
HEAD: Final = "head.safetensors"  # of a `PooledClassifier`

#: By the name that a run's record has for it: the class of transformers.
KINDS: Final = {
    "classifier": "AutoModelForSequenceClassification",
    "masked": "AutoModelForMaskedLM",
    "causal": "AutoModelForCausalLM",
    "body": "AutoModel",
}


def load_pretrained(name: str, kind: str, **settings: Any) -> tuple[Any, Any]:
    """Return (model, tokenizer), without dropout: under privacy the noise is enough of it.

    Args:
        name: a folder that `save_pretrained` wrote, `MINILM`, or a name on the hub, which is
            downloaded.
        kind: a name in `KINDS`.
        settings: of the model's configuration.

    Raises:
        ConfigurationError: it cannot be loaded, or the tokenizer does not fit the model.
    """
    transformers = _transformers()
    place = str(encoder_folder()) if name == MINILM else name
    local = Path(place).is_dir()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, local_files_only=local)
        config = transformers.AutoConfig.from_pretrained(place, local_files_only=local, **settings)
        for field in vars(config):
            if field.endswith(("dropout", "dropout_prob", "_pdrop")):
                setattr(config, field, 0.0)
        loader = getattr(transformers, KINDS[kind])
        model, about = loader.from_pretrained(
            place, config=config, local_files_only=local, output_loading_info=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigurationError(
            f"--model {name} cannot be loaded as a {KINDS[kind]} ({_first_line(error)}). Give a folder "
            "with config.json, model.safetensors and the tokenizer's files, or a name on the hub."
        ) from error
    model.name_or_path = name  # which adapters keep, to find it again
    model.made_new = tuple(about["missing_keys"])  # which no file of the pretrained model holds
    if kind == "body" and getattr(model, "pooler", None) is not None:
        model.pooler = None  # it would give a head something else than hidden states
    _make_fit(model, tokenizer, name)
    return model, tokenizer


def _make_fit(model: Any, tokenizer: Any, name: str) -> None:
    """Give both a token for padding, and hold the tokenizer's tokens against the model's."""
    known = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > known:
        raise ConfigurationError(
            f"--model {name}: its tokenizer has {len(tokenizer)} tokens, but the model knows {known}. "
            "Use the tokenizer that the model was trained with."
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ConfigurationError(
                f"--model {name}: its tokenizer has neither a token for padding nor one for the end "
                "of a text. Set tokenizer.pad_token, and save the tokenizer again."
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id


def save_trained(folder: RunFolder, model: Any, tokenizer: Any) -> None:
    """Write model, or its adapters alone, and tokenizer into the run's folder."""
    from safetensors.torch import save_file

    path = folder.path / PRETRAINED
    path.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PooledClassifier):
        save_file(model.head.state_dict(), str(path / HEAD))
        model = model.model
    model.save_pretrained(str(path))
    tokenizer.save_pretrained(str(path))
    if hasattr(model, "get_base_model"):
        save_file(_made_new(model.get_base_model()), str(path / NEW))


def _made_new(base: Any) -> dict[str, Tensor]:
    """What was initialised at random beside the pretrained weights, and is in no adapter."""
    values = base.state_dict()
    found = {}
    for name in base.made_new:
        module, _, leaf = name.rpartition(".")
        for place in (name, f"{module}.base_layer.{leaf}"):
            if place in values:
                found[name] = values[place].contiguous()
    return found


def load_run(run: str | Path, kind: str | None = None) -> tuple[Any, Any]:
    """Return (model, tokenizer) of a run of a text task, the model in evaluation mode.

    Args:
        run: its folder, such as "runs/reviews-1".
        kind: refuse models of another kind than this name in `KINDS`.

    Raises:
        DataError: it is no such folder, or the run has not finished or been interrupted.
        ConfigurationError: adapters whose pretrained model is not where it was.
    """
    folder = RunFolder(Path(run))
    about = folder.read_json("run.json")
    path = folder.path / PRETRAINED
    job = about["job"]
    if "task" not in job:
        raise DataError(
            f"{folder.path} is no run of a task on texts. Use dptorch.training.load_model."
        )
    found = _kind_of(job)
    if kind not in (None, found):
        raise ConfigurationError(
            f"{folder.path} is a run of {job['task']}, whose model writes nothing. Give one of "
            "language-model or table-to-text."
        )
    if not path.is_dir():
        raise DataError(f"{path} does not exist: that run has not finished or been interrupted.")
    from safetensors.torch import load_file

    classes = about["data"]["classes"]
    if not (path / "adapter_config.json").exists():
        model, tokenizer = load_pretrained(str(path), found)
    else:
        transformers = _transformers()
        import peft

        adapter = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        settings = {"num_labels": len(classes)} if found == "classifier" else {}
        base, _ = load_pretrained(adapter["base_model_name_or_path"], found, **settings)
        base.load_state_dict(load_file(path / NEW), strict=False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
        model = peft.PeftModel.from_pretrained(base, str(path))
    if found == "body":
        model = PooledClassifier(model, len(classes))
        model.head.load_state_dict(load_file(path / HEAD))
    return model.eval(), tokenizer


def _kind_of(job: Mapping[str, Any]) -> str:
    """The name in `KINDS` of what a job trains."""
    if job["task"] != "text-classification":
        return "causal"
    if job["template"] and job["prompt"]:
        return "masked"
    return "body" if job.get("pool") == "mean" else "classifier"


def _transformers() -> Any:
    hide_broken_torchvision()
    try:
        import transformers
    except ImportError as error:
        raise ConfigurationError(
            f"Text tasks need the package transformers, which cannot be imported ({error}). Install "
            "it with: pip install 'dptorch[text]'."
        ) from error
    # What peft asks a model for is of no use to whoever trains one.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
