"""The folder of a run, `runs/<name>/`: its files, and how they are written and read.

    model.safetensors   weights
    schema.json         of a table: what its columns are, which the model needs to predict
    model/              instead, in a task on texts: model and tokenizer as transformers saves them
    plan.json           the privacy plan
    statement.txt       what is guaranteed, and what is not
    statement.json      the same for machines, as `dptorch/statement.schema.json` describes it
    metrics.csv         one row per epoch
    report.html         all of it on one page
    run.json            settings and versions
    canaries.npz        what the run planted in its data for an audit, if it did
    audit.*             what an audit of the run found: json, txt, html
    checkpoint.pt       only while the run is unfinished: what --resume needs

Files are replaced atomically, so a crash leaves the old file or the new one, never half of one.
The checkpoint holds the key of the run's randomness; whoever has the key can take the noise off
again. It is readable by its owner only and is deleted when the run is complete.
"""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dptorch.atomic_files import replacing
from dptorch.engine import checkpoint
from dptorch.errors import ConfigurationError, DataError

__all__ = ["RunFolder", "create", "load_model", "next_name", "reopen"]

SCHEMA_FILE = "schema.json"
PRETRAINED = "model"  # folder of a model as transformers saves it, in a run of a task on texts
NOT_PRIVATE = "not_private_"  # prefix of every column computed from private data without noise


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run.

    Attributes:
        path: the folder; it exists.
    """

    path: Path

    @property
    def checkpoint(self) -> Path:
        """Where an unfinished run's state is."""
        return self.path / "checkpoint.pt"

    def write(self, name: str, text: str) -> None:
        """Replace a text file."""
        with replacing(self.path / name) as partial:
            partial.write_text(text, encoding="utf-8")

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Replace a JSON file."""
        self.write(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def write_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replace `metrics.csv`; columns are the keys in the order in which they first appear."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        self.write("metrics.csv", text.getvalue())

    def write_model(self, model: nn.Module, metadata: Mapping[str, str]) -> None:
        """Replace `model.safetensors`; tied weights are stored once."""
        from safetensors.torch import save_model

        with replacing(self.path / "model.safetensors") as partial:
            save_model(model, str(partial), metadata=dict(metadata))

    def require_checkpoint(self) -> Path:
        """The checkpoint to go on from.

        Raises:
            DataError: there is none, or it cannot be read.
        """
        if not self.checkpoint.exists():
            done = (self.path / "report.html").exists()
            raise DataError(
                f"{self.path} has no checkpoint to resume"
                + (": that run is complete." if done else ". Train it anew with --overwrite.")
            )
        checkpoint.read(self.checkpoint)
        return self.checkpoint

    def read_json(self, name: str) -> dict[str, Any]:
        """Parse one of the folder's JSON files.

        Raises:
            DataError: it is missing or not JSON.
        """
        path = self.path / name
        try:
            value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read ({error}).") from error
        return value

    def read_metrics(self) -> list[dict[str, float]]:
        """The rows of `metrics.csv`; empty cells are left out."""
        with (self.path / "metrics.csv").open(encoding="utf-8", newline="") as file:
            return [
                {key: float(cell) for key, cell in row.items() if cell}
                for row in csv.DictReader(file)
            ]


def next_name(root: Path, stem: str) -> str:
    """The first of stem-1, stem-2, ... that `root` does not hold.

    Example:
        >>> next_name(Path("/no/such/folder"), "mnist")
        'mnist-1'
    """
    number = 1
    while (root / f"{stem}-{number}").exists():
        number += 1
    return f"{stem}-{number}"


def check_free(root: Path, name: str, *, overwrite: bool) -> None:
    """Raise unless a run called `name` may be created under `root`.

    Raises:
        ConfigurationError: the name cannot be a folder's, the folder exists, or it is to be
            overwritten and is not the folder of a run.
    """
    if not re.fullmatch(r"[\w][\w.\-]*", name):
        raise ConfigurationError(
            f"--name {name!r} cannot name a run: expected letters, digits, '-', '_' and '.', "
            f"not beginning with '.' or '-'."
        )
    path = root / name
    if not path.exists():
        return
    if not overwrite:
        raise ConfigurationError(
            f"The run folder {path} exists. Pass --resume to continue it, --overwrite to replace "
            f"it, or another --name."
        )
    if not path.is_dir() or (any(path.iterdir()) and not (path / "run.json").exists()):
        raise ConfigurationError(
            f"{path} is not the folder of a run (it has no run.json), so --overwrite leaves it "
            f"alone. Choose another --name."
        )


def create(root: Path, name: str, *, overwrite: bool = False) -> RunFolder:
    """Make the folder of a new run.

    Args:
        root: parent folder, made if missing.
        name: of the run.
        overwrite: replace the folder of an earlier run.

    Raises:
        ConfigurationError: as in `check_free`.
    """
    check_free(root, name, overwrite=overwrite)
    path = root / name
    try:
        if path.exists():
            shutil.rmtree(path)
        path.mkdir(parents=True)
    except OSError as error:
        raise ConfigurationError(
            f"The run folder {path} cannot be made ({error}). Choose another --runs folder."
        ) from error
    return RunFolder(path)


def reopen(root: Path, name: str) -> RunFolder:
    """The folder of an earlier run.

    Raises:
        ConfigurationError: there is none of that name; lists those there are.
    """
    path = root / name
    if not (path / "run.json").is_file():
        known = sorted(p.parent.name for p in root.glob("*/run.json"))
        raise ConfigurationError(
            f"{path} is not the folder of a run. Runs in {root}: {', '.join(known) or 'none'}."
        )
    return RunFolder(path)


def load_model(folder: str | Path) -> nn.Module:
    """Build the model of a run and load its trained weights.

    Args:
        folder: such as "runs/demo".

    Returns:
        the model in evaluation mode.

    Raises:
        DataError: the folder lacks `run.json` or `model.safetensors`.
        ConfigurationError: the model's factory cannot be imported any more.
    """
    from safetensors.torch import load_model as load_weights

    from dptorch.training.models import build_model

    run = RunFolder(Path(folder))
    about = run.read_json("run.json")
    weights = run.path / "model.safetensors"
    if not weights.exists():
        raise DataError(f"{weights} does not exist: that run has not finished or been interrupted.")
    model = build_model(
        about["job"]["model"],
        tuple(about["data"]["input_shape"]),
        len(about["data"]["classes"]) or 1,
    )
    load_weights(model, str(weights))
    return model.eval()
