"""Weights that training begins from, and what the statement says of their data."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dptorch.errors import ConfigurationError, DataError
from dptorch.ledger import beside
from dptorch.training import run_folder
from dptorch.training.loop import train
from dptorch.training.models import build_model
from dptorch.training.release import release
from dptorch.vision.job import VisionJob, prepare
from dptorch.vision.weights import load_weights
from tests.training.json_schema import faults
from tests.vision.files import write_cifar10

FAST: dict[str, Any] = {"epochs": 1, "sample_rate": 0.5, "noise_multiplier": 1.0, "seed": 0}


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_cifar10(tmp_path_factory.mktemp("cifar")))


def cnn(classes: int) -> torch.nn.Module:
    torch.manual_seed(classes)
    return build_model("cnn", (3, 32, 32), classes)


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_all_but_another_last_layer_is_loaded(ending: str, tmp_path: Path) -> None:
    before = {f"module.{n}": v for n, v in cnn(100).state_dict().items()}
    path = tmp_path / f"weights{ending}"
    if ending == ".pt":
        torch.save({"epoch": 3, "state_dict": before}, path)
    else:
        save_file(before, path)
    network = cnn(10)
    new = {n: v.clone() for n, v in network.state_dict().items()}
    assert load_weights(network, str(path)) == ["head.weight", "head.bias"]
    for name, value in network.state_dict().items():
        expected = new[name] if name.startswith("head") else before[f"module.{name}"]
        assert torch.equal(value, expected)


@pytest.mark.slow
def test_the_statement_carries_the_guarantee_of_the_weights(cifar: str, tmp_path: Path) -> None:
    path = tmp_path / "foundation.pt"
    torch.save(cnn(100).state_dict(), path)
    job = VisionJob(data=cifar, init=str(path), init_data="ImageNet-1k", init_epsilon=2.0,
                    init_delta=1e-7, method="last-layer", **FAST | {"seed": None})  # fmt: skip
    first = run_folder.create(tmp_path, "first")
    train(prepare(job), first)
    text = (first.path / "statement.txt").read_text()
    assert (
        "weights of foundation.pt, which were trained on ImageNet-1k with (2, 1e-07)-diff" in text
    )
    assert str(tmp_path) not in text
    about = first.read_json("run.json")
    assert about["model"]["began_from"]["epsilon"] == 2.0
    claims = json.loads((first.path / "statement.json").read_text())
    schema = json.loads(resources.files("dptorch").joinpath("statement.schema.json").read_text())
    assert list(faults(claims, schema)) == []
    assert len(claims["notes"]) == 1

    # A linear probe, and then everything: two runs on the same data.
    second = prepare(VisionJob(data=cifar, init=str(first.path), **FAST))
    assert torch.equal(second.model.state_dict()["head.bias"], _head(first))
    assert "the same data as this run's. The two guarantees add up" in second.notes[0]
    third = prepare(VisionJob(data=str(write_cifar10(tmp_path)), init=str(first.path), **FAST))
    assert "That guarantee is for that data; for what of it is in this run's data" in third.notes[0]
    assert "Of those weights: training began from the weights of foundation.pt" in third.notes[0]
    assert f"with ({about['result']['epsilon']:g}, " in third.notes[0]
    seeded = run_folder.create(tmp_path, "seeded")
    train(prepare(VisionJob(data=cifar, **FAST)), seeded)
    note = prepare(VisionJob(data=str(tmp_path), init=str(seeded.path), **FAST)).notes[0]
    assert "without privacy" in note
    assert "differential privacy" not in note


def _head(folder: run_folder.RunFolder) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(folder.path / "model.safetensors")["head.bias"]


@pytest.mark.slow
def test_a_run_without_privacy_makes_its_data_public(cifar: str, tmp_path: Path) -> None:
    job = VisionJob(data=cifar, clipping_mode="non-private", epochs=1, sample_rate=0.5, seed=0)
    folder = run_folder.create(tmp_path, "public")
    with pytest.warns(UserWarning, match="neither clipped nor noised"):
        train(prepare(job), folder)
    other = str(write_cifar10(tmp_path))
    private = FAST | {"seed": None}
    note = prepare(VisionJob(data=other, init=str(folder.path), **private)).notes[0]
    assert "the run public, which were trained on cifar10 pictures" in note
    assert "without privacy. That data counts as public" in note
    with pytest.raises(ConfigurationError, match="on the data of this run, and nothing"):
        prepare(VisionJob(data=cifar, init=str(folder.path), **private))
    # By the identity of the data too, where no path is known, as in a release.
    about = folder.read_json("run.json")
    del about["job"]["data"]
    about["statement"]["ledger"] = {"run": "r", "dataset": beside(other)}
    folder.write_json("run.json", about)
    with pytest.raises(ConfigurationError, match="on the data of this run, and nothing"):
        prepare(VisionJob(data=other, init=str(folder.path), **private))


@pytest.mark.slow
def test_runs_that_weights_came_through_are_known_too(cifar: str, tmp_path: Path) -> None:
    """One without privacy on this data is refused behind a private one on other data, and as a file."""
    other, private = str(write_cifar10(tmp_path)), FAST | {"seed": None}
    plain = VisionJob(data=cifar, clipping_mode="non-private", epochs=1, sample_rate=0.5, seed=0)
    first, second = (run_folder.create(tmp_path / "runs", name) for name in ("plain", "second"))
    with pytest.warns(UserWarning, match="neither clipped nor noised"):
        train(prepare(plain), first)
    train(prepare(VisionJob(data=other, init=str(first.path), **private)), second)
    for begun, words in (
        (first.path / "model.safetensors", "was trained without privacy"),
        (second.path, "began from the run plain, which was trained without privacy"),
        (second.path / "model.safetensors", "began from the run plain"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            prepare(VisionJob(data=cifar, init=str(begun), **private))
    # What was private on this data before adds up, and the statement says so.
    third = run_folder.create(tmp_path / "runs", "third")
    kept = {**private, "data": str(write_cifar10(tmp_path / "third")), "init": str(second.path)}
    train(prepare(VisionJob(**kept)), third)
    note = prepare(VisionJob(data=other, init=str(third.path), **private)).notes[0]
    assert note.endswith(
        "the run second, of which those weights came, was on the same data as this run's: what it cost "
        "adds up too."
    )
    # A release does not say where the data is.
    released = release(second, tmp_path / "released").read_json("run.json")
    assert [run["run"] for run in released["model"]["began_from"]["lineage"]] == ["plain"]
    assert all(run["data"] is None for run in released["model"]["began_from"]["lineage"])


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"init": "none.pt"}, DataError, "none.pt: weights cannot be read"),
        ({"init": "none.safetensors"}, DataError, "none.safetensors: weights cannot be read"),
        ({"init_data": "photos"}, ConfigurationError, "Give those too"),
        ({"init": "other.pt"}, DataError, "weights of another model: conv1.weight"),
        ({"init": "list.pt"}, DataError, "not a state dict"),
        ({"init": "other.pt", "init_delta": 0.1}, ConfigurationError, "without init_epsilon"),
        ({"init": "other.pt", "pretrained": True}, ConfigurationError, "exclude each other"),
    ],
)
def test_mistakes_are_named(
    settings: dict[str, Any], error: type[Exception], message: str, cifar: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    torch.save({"layer.weight": torch.zeros(2, 2)}, "other.pt")
    torch.save([1, 2], "list.pt")
    with pytest.raises(error, match=message):
        prepare(VisionJob(data=cifar, **FAST | settings))
