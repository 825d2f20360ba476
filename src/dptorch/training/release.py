"""Copy what may be published of a run: everything but exact functions of private data.

A run folder is for the owner of the data. Beside what the guarantee covers it holds values that no
noise was added to: losses, gradient norms, batch sizes, the share that was clipped (columns that begin
with `not_private_`), results on held-out examples, times (a large batch takes longer), paths, and in
an unfinished run the key of the noise. A release is made of what is listed here, so that whatever a
later version adds to the folder stays there until somebody lists it.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from dptorch.errors import ConfigurationError, DataError
from dptorch.training.claims import for_machines
from dptorch.training.pretrained_files import without_places
from dptorch.training.run_folder import PRETRAINED, SCHEMA_FILE, RunFolder
from dptorch.training.run_page import missing_packages, render

__all__ = ["COLUMNS", "TEST_COLUMNS", "check_destination", "release"]

COLUMNS: Final = ("epoch", "step", "epsilon", "delta")
TEST_COLUMNS: Final = (
    "test_accuracy",
    "test_rmse",
    "test_mae",
    "test_r2",
    "test_loss",
    "test_perplexity",
)
_JOB: Final = (
    "recipe",
    "model",
    "pretrained",
    "epochs",
    "sample_rate",
    "target_epsilon",
    "noise_multiplier",
    "target_delta",
    "max_grad_norm",
    "clipping_fn",
    "accountant",
    "learning_rate",
    "momentum",
    "task",
    "method",
    "lora_rank",
    "prefix_length",
    "template",
    "label_words",
    "prompt",
    "pool",
    "text",
    "pair",
    "max_length",
    "head_learning_rate",
    "head_first",
    "decay",
    "weight_decay",
    "image_size",
    "channels",
    "scale",
    "features",
    "optimizer",
    "warmup",
    "augment",
    "views",
    "ema",
    "tail",
    "low_pass",
    "kalman",
    "moment_scaling",
)
_DATA: Final = ("classes", "input_shape", "preparation", "train_examples")
_TESTED: Final = ("groups", "majority")
_METADATA: Final = ("format", "epsilon", "delta", "steps")
_OWN_DATA: Final = "data that is not published"


def check_destination(destination: str | Path) -> Path:
    """Raise ConfigurationError unless a release may be written there."""
    path = Path(destination)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigurationError(
            f"{path} exists and is not an empty folder, and a release is not mixed with other files. "
            "Choose another destination."
        )
    return path


def release(
    folder: RunFolder, destination: str | Path, *, with_test_results: bool = False
) -> RunFolder:
    """Write the publishable part of a run to a new folder.

    It holds `model.safetensors`, of a table `schema.json`, `plan.json`, `statement.txt`, `metrics.csv`
    (ε by step), `run.json` (settings) and, where the packages for it are installed, `report.html`.
    `dptorch.load` takes it, and finds out whether anything that predictions depend on was changed.

    Args:
        folder: of a run that finished or was interrupted.
        destination: a folder that does not exist or is empty.
        with_test_results: publish accuracy and loss on the held-out examples too. They are exact
            functions of those examples, which the guarantee does not cover.

    Guarantees:
        Nothing in the destination is a function of the training examples except the model, whose
        privacy the statement is about; the number of examples and the names of the classes, which
        the plan and the statement treat as public; what the schema says that it read off the data.
        Held by `test_no_private_value_is_in_a_release`.

    Raises:
        ConfigurationError: the destination is taken.
        DataError: the run has nothing to publish yet or was not private, or a file cannot be read or
            written.
    """
    destination = check_destination(destination)
    about = folder.read_json("run.json")
    if "shards" in about:
        raise DataError(
            f"{folder.path} holds models of disjoint shards, trained without privacy: none of them may "
            "be published. Answer queries with them under a budget: dptorch serve"
        )
    pretrained = folder.path / PRETRAINED
    if "statement" not in about or not (
        pretrained.is_dir() or (folder.path / "model.safetensors").exists()
    ):
        raise DataError(
            f"{folder.path}: this run has neither finished nor been interrupted in order, so it has "
            "no statement. Continue it with: dptorch train --resume --name " + folder.path.name
        )
    if not math.isfinite(about["statement"]["epsilon"]):
        raise DataError(
            f"{folder.path}: epsilon=infinity, so nothing protects the examples that this model was "
            "trained on, and a release is what may be published of private data. Train it with noise; "
            "of public data publish the run's own model.safetensors."
        )
    columns = COLUMNS + (TEST_COLUMNS if with_test_results else ())
    rows = [{k: row[k] for k in columns if k in row} for row in folder.read_metrics()]
    public = _public(about, columns)
    statement = (folder.path / "statement.txt").read_text(encoding="utf-8")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".release-") as made:
            part = RunFolder(Path(made) / "release")
            part.path.mkdir()
            part.write("statement.txt", statement)
            part.write_json("statement.json", for_machines(about["statement"]))
            part.write("plan.json", (folder.path / "plan.json").read_text(encoding="utf-8"))
            part.write_json("run.json", public)
            if (folder.path / SCHEMA_FILE).exists():
                part.write(SCHEMA_FILE, (folder.path / SCHEMA_FILE).read_text(encoding="utf-8"))
            part.write_metrics(rows)
            if pretrained.is_dir():
                _copy_pretrained(pretrained, part.path / PRETRAINED)
            else:
                _copy_model(folder.path / "model.safetensors", part.path / "model.safetensors")
            if not missing_packages():
                name = destination.resolve().name
                part.write("report.html", render(name, public, rows, statement))
            os.replace(part.path, destination)
    except (OSError, shutil.Error) as error:
        raise DataError(f"{destination}: the release could not be written ({error}).") from error
    return RunFolder(destination)


def _public(about: Mapping[str, Any], columns: tuple[str, ...]) -> dict[str, Any]:
    """`run.json` without what is private or tells of the machine."""
    data = {key: about["data"][key] for key in _DATA}
    if TEST_COLUMNS[-1] in columns:
        data["test_examples"] = about["data"]["test_examples"]
    recipe = about["job"]["recipe"]
    tested = {key: about[key] for key in _TESTED if key in about and TEST_COLUMNS[-1] in columns}
    # A pretrained model may have been a folder here.
    model = {"model": Path(about["job"]["model"]).name} if "task" in about["job"] else {}
    return {
        "status": about["status"],
        "job": {key: about["job"][key] for key in _JOB if key in about["job"]} | model,
        "data": {"source": about["data"]["source"] if recipe else _OWN_DATA, **data},
        "model": _without_places(about["model"]),
        "result": {k: v for k, v in about["result"].items() if k in columns},
        "statement": about["statement"],
        **tested,
    }


def _without_places(model: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of the model, without where the data of earlier runs is."""
    origin = model.get("began_from")
    if origin is None:
        return dict(model)
    lineage = [{**run, "data": None} for run in origin["lineage"]]
    return {**model, "began_from": {**origin, "lineage": lineage}}


def _copy_pretrained(source: Path, target: Path) -> None:
    """A folder of transformers: the files that are listed, without where the model lay here."""
    target.mkdir()
    for path in sorted(source.glob("*.safetensors")):
        _copy_model(path, target / path.name)
    for name, text in without_places(source):
        (target / name).write_text(text, encoding="utf-8")


def _copy_model(source: Path, target: Path) -> None:
    """The weights, with no metadata but what is listed."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(str(source), framework="pt") as file:
        metadata = {k: v for k, v in (file.metadata() or {}).items() if k in _METADATA}
        # `load_model` finds tied weights by what the file says of them.
        tied = {k: v for k, v in (file.metadata() or {}).items() if v in file.keys()}  # noqa: SIM118
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, str(target), metadata={**metadata, **tied})
