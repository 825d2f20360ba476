"""`dptorch train --shards`, and digits answered by 20 shards at ε = 8."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.cli.commands import refused, run

from dptorch.errors import DataError
from dptorch.prediction import PrivatePredictor
from dptorch.prediction.ensemble import load_ensemble
from dptorch.training.recipes import get_recipe


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A run of 20 shards, and the 1,000 test digits that none of them saw."""
    runs = tmp_path_factory.mktemp("runs")
    found = run(
        "train", "--shards", "20", "--epochs", "8", "--seed", "0",
        "--recipe", "mnist-features", "--runs", str(runs), "--name", "20",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    return runs, get_recipe("mnist-features").load().test


def accuracy(labels, test):
    return float((labels == test.labels).double().mean())


@pytest.mark.slow
def test_a_thousand_digits_at_epsilon_8(digits):
    runs, test = digits
    terms = {"mechanism": "gnmax", "budget": (8.0, 1e-5), "queries": 1000, "seed": 1}
    models = load_ensemble(runs / "20").models
    ensemble, single = PrivatePredictor(models, **terms), PrivatePredictor(models[0], **terms)
    together = ensemble.predict_together(test.inputs)
    assert together.charged == 1000
    assert ensemble.remaining == 0
    assert ensemble.spent().epsilon <= 8.0 * (1 + 1e-6)
    assert accuracy(together.labels, test) >= 0.85
    # One by one, from the cache and so at no further cost, and by one model: near chance.
    assert accuracy(ensemble.predict(test.inputs).labels, test) < 0.4
    assert accuracy(single.predict(test.inputs).labels, test) < 0.15


@pytest.mark.slow
def test_the_folder_of_shards(digits):
    runs, _ = digits
    about = json.loads((runs / "20" / "run.json").read_text())
    loaded = load_ensemble(runs / "20")
    assert len(loaded.models) == about["shards"] == 20
    assert loaded.reader.input_shape == (432,)
    assert loaded.reader.inputs(np.zeros((2, 28, 28))).shape == (2, 432)
    assert loaded.dataset == "recipe:mnist-features"
    assert about["result"]["test_accuracy_of_votes_without_noise"] > 0.9
    (runs / "20" / "shard-019.safetensors").rename(runs / "20" / "elsewhere")
    with pytest.raises(DataError, match="missing"):
        load_ensemble(runs / "20")
    (runs / "20" / "elsewhere").rename(runs / "20" / "shard-019.safetensors")


@pytest.mark.slow
def test_shards_are_never_released(digits):
    runs, _ = digits
    found = run("release", str(runs / "20"), str(runs / "out"))
    assert found.exit_code != 0
    assert "none of them may be published" in found.output.replace("\n", " ")
    assert not (runs / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--epsilon", "3"), "--epsilon does not go with --shards"),
        (("--canaries", "10"), "canaries"),
        (("--shards", "0"), "--shards 0"),
    ],
)
def test_what_does_not_go_with_shards(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = "\n".join(f"{i % 7}.0,{i % 3}.5,{i % 2}" for i in range(60))
    Path("points.csv").write_text("u,v,kind\n" + rows)
    found = run("train", "--data", "points.csv", "--label", "kind", "--shards", "2", *options)
    assert message in refused(found)


def test_own_data_in_shards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = "\n".join(f"{i}.25,{i % 3}.5,{i % 2}" for i in range(60))
    Path("points.csv").write_text("u,v,kind\n" + rows)
    found = run(
        "train", "--data", "points.csv", "--label", "kind", "--shards", "3", "--epochs", "1"
    )
    assert found.exit_code == 0, found.output
    loaded = load_ensemble("runs/points-1")
    assert loaded.reader.classes == ("0", "1")
    assert loaded.unit == "example"
    assert loaded.models[0](torch.zeros(1, 2)).shape == (1, 2)
    assert Path("points.csv.dptorch-id.json").exists()


def test_a_table_with_a_unit_is_split_by_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = "\n".join(f"p{i % 30},{i}.25,{i % 2}" for i in range(120))
    Path("visits.csv").write_text("patient,u,kind\n" + rows)
    found = run(
        "train", "--data", "visits.csv", "--label", "kind", "--unit-column", "patient",
        "--shards", "3", "--epochs", "1",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    assert load_ensemble("runs/visits-1").unit == "user"
