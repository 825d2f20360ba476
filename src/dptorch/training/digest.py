"""One number for a model with its preprocessing, by which a recipient knows it is the one stated."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from dptorch.errors import DataError
from dptorch.training.pretrained_files import without_places
from dptorch.training.run_folder import PRETRAINED, SCHEMA_FILE, RunFolder

__all__ = ["digest_of", "verify"]

#: What of a job says how a text becomes tokens.
_OF_TEXTS: Final = (
    "task",
    "text",
    "pair",
    "template",
    "label_words",
    "prompt",
    "pool",
    "max_length",
)


def digest_of(folder: RunFolder, about: Mapping[str, Any]) -> str:
    """SHA-256 of all that a prediction depends on: weights, architecture, classes, preprocessing.

    Of adapters, the weights are the adapters': not those of the pretrained model that they adapt.

    Args:
        folder: holds the weights, of a table `schema.json`, of texts the tokenizer.
        about: what `run.json` says.

    Guarantees:
        A run and its release have the same digest, and a change of any weight, of the schema, the
        classes or the preprocessing changes it.
        Held by `test_whatever_a_prediction_depends_on_changes_the_digest`.
    """
    data, job = about["data"], about["job"]
    pretrained = folder.path / PRETRAINED
    described = {
        # A pretrained model may have been a folder here, which is not told to others.
        "model": Path(job["model"]).name if pretrained.is_dir() else job["model"],
        "classes": data["classes"],
        "input_shape": data["input_shape"],
        "preparation": data["preparation"],
    }
    if (folder.path / SCHEMA_FILE).exists():
        described["schema"] = folder.read_json(SCHEMA_FILE)
    if pretrained.is_dir():
        described |= {name: job[name] for name in _OF_TEXTS if name in job}
        described["files"] = dict(without_places(pretrained))
    digest = hashlib.sha256(b"dptorch model 1\n")
    digest.update(json.dumps(described, sort_keys=True).encode() + b"\n")
    for path in sorted(folder.path.rglob("*.safetensors")):
        digest.update(path.relative_to(folder.path).as_posix().encode() + b"\n")
        _add_weights(digest, path)
    return digest.hexdigest()


def _add_weights(digest: hashlib._Hash, path: Path) -> None:
    """Hash tensors, and how tied ones are named; other metadata is not part of a model."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        names = sorted(file.keys())
        tied = {k: v for k, v in (file.metadata() or {}).items() if v in names}
        digest.update(json.dumps(tied, sort_keys=True).encode() + b"\n")
        for name in names:
            tensor = file.get_tensor(name).contiguous()
            head = [name, str(tensor.dtype), list(tensor.shape)]
            digest.update(json.dumps(head).encode() + b"\n")
            # As bytes: numpy has no bfloat16.
            flat = tensor.reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")


def verify(folder: RunFolder, about: Mapping[str, Any], expected: str | None = None) -> str:
    """The digest of a run or release, if it is the stated one.

    Args:
        expected: what the recipient was told; None compares with the folder's own statement.

    Raises:
        DataError: it is another, or none was stated.
    """
    stated = about.get("statement", {}).get("model_digest")
    if stated is None:
        raise DataError(
            f"{folder.path} states no digest of its model: that run has not finished, or is of an "
            "older version. Its weights alone: dptorch.training.load_model."
        )
    found = digest_of(folder, about)
    text = (folder.path / "statement.txt").read_text(encoding="utf-8")
    for where, digest in (("you were given", expected), ("is stated", stated)):
        if digest is not None and digest != found:
            raise DataError(
                f"{folder.path}: the model is not the one that {where}: its SHA-256 is {found}, not "
                f"{digest}. Weights, schema or classes were changed or damaged. Get it again."
            )
    if found not in text:
        raise DataError(
            f"{folder.path}: statement.txt does not state this model (SHA-256 {found}). It was "
            "changed, or belongs to another model. Get it again."
        )
    return found
