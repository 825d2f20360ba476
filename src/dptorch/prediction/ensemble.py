"""`dptorch train --shards m`: a run folder with the models of m disjoint shards, and how it is loaded.

shard-000.safetensors ...   the models, trained without privacy: none may be published
run.json                    settings, the data's form, and the id of the budget of its answers
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from dptorch.atomic_files import replacing
from dptorch.errors import ConfigurationError, DataError
from dptorch.prediction.bounded import votes_of
from dptorch.prediction.shards import assign_shards, draws_of, seed_of_all
from dptorch.tables import Schema
from dptorch.training import recipes
from dptorch.training.data import TrainTest
from dptorch.training.hyperparameters import for_own_data
from dptorch.training.job import Job
from dptorch.training.models import build_model
from dptorch.training.predictor import Predictor
from dptorch.training.readers import load_data
from dptorch.training.run_folder import SCHEMA_FILE, RunFolder

__all__ = ["ENSEMBLE", "Ensemble", "fit_plainly", "load_ensemble", "train_ensemble"]

ENSEMBLE: Final = "disjoint shards, not private"
_EPOCHS: Final = 30.0
_BATCH: Final = 32
_LEARNING_RATE: Final = 1e-2


@dataclass(frozen=True)
class Ensemble:
    """What a folder of shards holds.

    Attributes:
        models: in evaluation mode.
        reader: prepares rows for any of them (its `inputs`), and knows the classes and the schema.
        budget: id of the budget of its answers in a ledger; drawn when it was trained.
        dataset: name of the data set in the ledger.
        unit: "user" where no user is in two shards, else "example".
    """

    models: list[nn.Module]
    reader: Predictor
    budget: str
    dataset: str
    unit: str


def train_ensemble(
    job: Job,
    folder: RunFolder,
    shards: int,
    *,
    dataset: str,
    told: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Any]:
    """Train a model on each of `shards` parts by ordinary Adam, and write the folder.

    Args:
        job: its data, model, epochs, batch size, learning rate, device and seed are used.
        folder: where the run writes.
        shards: how many.
        dataset: name of the data set in the ledger, for the answers.
        told: is called with the number of shards done and of all.

    Returns:
        what run.json holds. `result` has exact accuracies on the test examples, which no shard saw.

    Raises:
        DataError, ConfigurationError: as `dptorch.training.job.prepare`.
    """
    data, name = _data(job)
    users = None if data.table is None else data.table.units
    parts = assign_shards(data.train, shards, users)
    device = torch.device("cpu" if job.device == "auto" else job.device)
    if job.seed is not None:
        torch.manual_seed(job.seed)
    votes, alone = np.zeros((data.sizes[1], len(data.classes))), []
    inputs, labels = _whole(data.test)
    base = seed_of_all()
    for i, part in enumerate(parts):
        with draws_of(base, i):
            model = build_model(
                name, data.input_shape, len(data.classes), pretrained=job.pretrained
            )
            fit_plainly(
                model.to(device),
                Subset(data.train, part),
                epochs=job.epochs or _EPOCHS,
                batch_size=int(job.batch_size or _BATCH),
                learning_rate=job.learning_rate or _LEARNING_RATE,
                device=device,
            )
        _write(model, folder.path / _file(i))
        with torch.no_grad():
            found = votes_of(model(inputs.to(device)).double().cpu().numpy())
        alone.append(float((found.argmax(1) == labels).mean()))
        votes += found
        told(i + 1, shards)
    about: dict[str, Any] = {
        "status": "complete",
        "kind": ENSEMBLE,
        "shards": shards,
        "unit": "example" if users is None else "user",
        "budget": f"answers-{secrets.token_hex(8)}",
        "dataset": dataset,
        "job": job.to_dict() | {"model": name},
        "data": {
            "source": data.source,
            "classes": list(data.classes),
            "input_shape": list(data.input_shape),
            "preparation": dict(data.preparation),
            "train_examples": data.sizes[0],
            "test_examples": data.sizes[1],
        },
        "result": {
            "test_accuracy_of_one": float(np.mean(alone)),
            "test_accuracy_of_votes_without_noise": float((votes.argmax(1) == labels).mean()),
        },
    }
    if data.table is not None:
        folder.write(SCHEMA_FILE, data.table.schema.to_json())
    folder.write_json("run.json", about)
    return about


def fit_plainly(
    model: nn.Module,
    part: Dataset[Any],
    *,
    epochs: float = _EPOCHS,
    batch_size: int = _BATCH,
    learning_rate: float = _LEARNING_RATE,
    device: torch.device | str = "cpu",
) -> None:
    """Train a classifier by ordinary Adam, without privacy; it ends in evaluation mode."""
    loader = DataLoader(part, batch_size=batch_size, shuffle=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    model.train()
    for _ in range(max(1, round(epochs))):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x.to(device)), y.to(device)).backward()
            optimizer.step()
    model.eval()


def load_ensemble(path: str | Path) -> Ensemble:
    """The models of a folder that `train_ensemble` wrote.

    Raises:
        DataError: it is not such a folder, or a model is missing.
    """
    from safetensors.torch import load_model as load_weights

    folder = RunFolder(Path(path))
    about = folder.read_json("run.json")
    if about.get("kind") != ENSEMBLE:
        raise DataError(
            f"{folder.path} holds no shards. Train them with: dptorch train --shards 20"
        )
    data, models = about["data"], []
    for i in range(about["shards"]):
        file = folder.path / _file(i)
        if not file.exists():
            raise DataError(f"{file} is missing: the shards are not complete. Train them anew.")
        model = build_model(about["job"]["model"], tuple(data["input_shape"]), len(data["classes"]))
        load_weights(model, str(file))
        models.append(model.eval())
    table = data["preparation"].get("kind") == "table"
    reader = Predictor(
        network=models[0],
        classes=tuple(data["classes"]),
        input_shape=tuple(data["input_shape"]),
        preparation=data["preparation"],
        schema=Schema.read(folder.path / SCHEMA_FILE) if table else None,
        statement={},
        digest="",
    )
    return Ensemble(models, reader, about["budget"], about["dataset"], about["unit"])


def _data(job: Job) -> tuple[TrainTest, str]:
    if job.canaries or job.target_epsilon is not None or job.noise_multiplier is not None:
        raise ConfigurationError(
            "--shards trains models without privacy: noise comes with their answers, by the budget of "
            "`dptorch serve`. Leave --epsilon, --noise-multiplier and --canaries out."
        )
    if job.data is None:
        recipe = recipes.get_recipe(job.recipe or "mnist-features")
        return recipe.load(), job.model or recipe.model
    data = load_data(job.data, job.reading)
    if not data.classes:
        raise ConfigurationError(
            "--shards is for classes, and the schema has a number to predict. Train privately instead: "
            "leave --shards out."
        )
    return data, job.model or for_own_data(data.input_shape)[0]


def _whole(data: Dataset[Any]) -> tuple[torch.Tensor, Any]:
    x, y = next(iter(DataLoader(data, batch_size=len(data))))  # type: ignore[arg-type]
    return x, y.numpy()


def _write(model: nn.Module, path: Path) -> None:
    from safetensors.torch import save_model

    with replacing(path) as partial:
        save_model(model, str(partial))


def _file(i: int) -> str:
    return f"shard-{i:03d}.safetensors"
