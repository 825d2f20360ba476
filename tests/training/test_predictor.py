"""A run and its release predict, with the preprocessing they were trained with, or refuse."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tables.patients import SCHEMA, rows, write, write_schema
from typer.testing import CliRunner

import dptorch
from dptorch.cli.app import app
from dptorch.errors import ConfigurationError, DataError
from dptorch.tables import chunk_of, encode
from dptorch.tables.faults import Faults
from dptorch.training import run_folder
from dptorch.training.data import ReadOptions
from dptorch.training.export import export
from dptorch.training.job import Job, prepare
from dptorch.training.loop import train
from dptorch.training.predictor import load
from dptorch.training.recipes import get_recipe
from dptorch.training.release import release
from dptorch.training.run_folder import RunFolder


@pytest.fixture(scope="module")
def patients(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A short run on a table of patients."""
    folder = tmp_path_factory.mktemp("patients")
    data = write(folder / "patients.csv", 400)
    reading = ReadOptions(schema=str(write_schema(folder / "s.json")))
    job = Job(data=str(data), reading=reading, epochs=2, noise_multiplier=1.0, seed=0)
    run = run_folder.create(folder / "runs", "small")
    train(prepare(job), run)
    return run


def unseen(count: int = 50) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k != "outcome"} for row in rows(count, seed=9)]


@pytest.mark.slow
def test_a_release_predicts_what_its_run_does(patients: RunFolder, tmp_path: Path) -> None:
    shared = release(patients, tmp_path / "shared")
    assert (shared.path / "schema.json").exists()
    mine, theirs = dptorch.load(patients.path), dptorch.load(shared.path)
    assert mine.digest == theirs.digest
    assert np.array_equal(mine.predict_proba(unseen()), theirs.predict_proba(unseen()))
    assert mine.predict(unseen()).tolist() == theirs.predict(unseen()).tolist()
    assert set(mine.predict(unseen())) <= set(SCHEMA["label"]["classes"])
    np.testing.assert_allclose(mine.predict_proba(unseen()).sum(1), 1)
    assert f"sha256 {mine.digest}" in (shared.path / "statement.txt").read_text()


@pytest.mark.slow
def test_test_accuracy_is_that_of_the_predictor(patients: RunFolder) -> None:
    """What was measured in training is what a user of the run gets, raw rows and all."""
    model = load(patients.path)
    data = prepare(Job.from_dict(patients.read_json("run.json")["job"])).data
    inputs = torch.stack([data.test[i][0] for i in range(data.sizes[1])])
    right = [data.classes[int(data.test[i][1])] for i in range(data.sizes[1])]
    accuracy = float(np.mean(model.decide(model.outputs(inputs)) == right))
    assert accuracy == patients.read_json("run.json")["result"]["test_accuracy"]


@pytest.mark.slow
def test_rows_that_do_not_fit_are_refused(patients: RunFolder) -> None:
    model = load(patients.path)
    row = unseen(1)[0]
    assert len(model.predict([{**row, "region": "abroad"}])) == 1  # "other" is allowed
    assert len(model.predict([])) == 0
    with pytest.raises(DataError, match=r"row 0, column 'age': 'old' is not a finite number"):
        model.predict([{**row, "age": "old"}])
    with pytest.raises(DataError, match="no column 'age'"):
        model.predict([{k: v for k, v in row.items() if k != "age"}])


def edit_json(name: str, change: Callable[[Any], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        change(value)
        (folder / name).write_text(json.dumps(value))

    return edit


def flip_a_weight(folder: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    name = min(tensors)
    tensors[name].view(-1)[0] = torch.nextafter(tensors[name].view(-1)[0], torch.tensor(9.0))
    save_file(tensors, path, metadata=metadata)


CHANGES: dict[str, Callable[[Path], None]] = {
    "weight": flip_a_weight,
    "bounds": edit_json("schema.json", lambda s: s["columns"]["age"].update(bounds=[0, 101])),
    "order of classes": edit_json("run.json", lambda a: a["data"]["classes"].reverse()),
    "architecture": edit_json("run.json", lambda a: a["job"].update(model="linear")),
    "preparation": edit_json("run.json", lambda a: a["data"]["preparation"].update(kind="arrays")),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_whatever_a_prediction_depends_on_changes_the_digest(
    patients: RunFolder, tmp_path: Path, change: str
) -> None:
    shutil.copytree(patients.path, tmp_path / "run")
    assert load(tmp_path / "run").digest == load(patients.path).digest
    CHANGES[change](tmp_path / "run")
    with pytest.raises(DataError, match="the model is not the one that is stated"):
        load(tmp_path / "run")


@pytest.mark.slow
def test_a_forged_statement_is_found_by_the_digest_that_was_told(
    patients: RunFolder, tmp_path: Path
) -> None:
    shutil.copytree(patients.path, tmp_path / "run")
    flip_a_weight(tmp_path / "run")
    from dptorch.training.digest import digest_of

    told = load(patients.path).digest
    forged = digest_of(
        RunFolder(tmp_path / "run"), json.loads((tmp_path / "run/run.json").read_text())
    )
    edit_json("run.json", lambda a: a["statement"].update(model_digest=forged))(tmp_path / "run")
    with pytest.raises(DataError, match=r"statement\.txt does not state this model"):
        load(tmp_path / "run")
    text = (tmp_path / "run/statement.txt").read_text()
    (tmp_path / "run/statement.txt").write_text(text.replace(told, forged))
    assert load(tmp_path / "run").digest == forged
    with pytest.raises(DataError, match="the model is not the one that you were given"):
        load(tmp_path / "run", digest=told)


@pytest.mark.slow
def test_a_number_is_predicted_in_its_own_units(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    size = rng.uniform(20, 200, 600)
    price = 1000 * (2 * size + rng.normal(0, 10, 600))
    lines = ["size,price", *(f"{s:.1f},{p:.0f}" for s, p in zip(size, price, strict=True))]
    (tmp_path / "homes.csv").write_text("\n".join(lines))
    schema = {
        "label": {"column": "price", "bounds": [0, 500_000]},
        "columns": {"size": {"kind": "number", "bounds": [0, 250]}},
    }
    (tmp_path / "s.json").write_text(json.dumps(schema))
    job = Job(
        data=str(tmp_path / "homes.csv"), reading=ReadOptions(schema=str(tmp_path / "s.json")),
        model="linear", epochs=10, learning_rate=0.3, noise_multiplier=1.0, seed=0,
    )  # fmt: skip
    outcome = train(prepare(job), run_folder.create(tmp_path / "runs", "homes"))
    model = load(outcome.folder.path)
    found = model.predict({"size": [50.0, 100.0, 1e9]})
    np.testing.assert_allclose(found[:2], [100_000, 200_000], atol=25_000)
    assert found[2] <= 500_000
    assert outcome.last["test_r2"] > 0.9
    assert outcome.last["test_rmse"] < 40_000
    assert "test_accuracy" not in outcome.last
    with pytest.raises(ConfigurationError, match="predicts a number"):
        model.predict_proba({"size": [1.0]})
    shared = release(outcome.folder, tmp_path / "shared", with_test_results=True)
    assert load(shared.path).predict({"size": [50.0]}).tolist() == found[:1].tolist()
    assert "test_rmse" in shared.read_json("run.json")["result"]


@pytest.mark.slow
def test_arrays_and_recipes_are_prepared_as_in_training(job: Job, tmp_path: Path) -> None:
    run = run_folder.create(tmp_path / "runs", "points")
    train(prepare(job), run)
    with np.load(job.data or "") as arrays:
        model = load(run.path)
        right = (model.predict(arrays["x_test"]) == arrays["y_test"].astype(str)).mean()
    assert right == run.read_json("run.json")["result"]["test_accuracy"]
    with pytest.raises(DataError, match="rows of shape"):
        model.predict(np.zeros((2, 0)))

    recipe = get_recipe("mnist-features")
    from dptorch.training.preparation import prepare_inputs

    images = torch.rand(3, 28, 28, generator=torch.Generator().manual_seed(0))
    found = prepare_inputs({"kind": "recipe", "name": "mnist-features"}, images)
    assert torch.equal(found, recipe.transform(images))
    as_bytes = prepare_inputs(
        {"kind": "recipe", "name": "mnist-features"}, (images * 255).round().byte()
    )
    torch.testing.assert_close(as_bytes, found, atol=0.05, rtol=0)


@pytest.mark.slow
def test_an_exported_model_predicts_the_same(patients: RunFolder, tmp_path: Path) -> None:
    """In a process that cannot import dptorch, for another number of rows than it was traced with."""
    done = CliRunner().invoke(app, ["export", str(patients.path), str(tmp_path / "m.pt2")])
    assert done.exit_code == 0, done.output
    assert "sex (1): 0 f, 1 m, 2 any other; NaN if the cell is empty" in done.output
    model = load(patients.path)
    assert model.schema is not None
    raw = encode(model.schema, [chunk_of(unseen())], Faults("rows"), labelled=False).raw
    np.save(tmp_path / "raw.npy", raw)
    code = (
        "import sys; sys.modules['dptorch'] = None\n"
        "import json, numpy, torch\n"
        "extra = {'inputs.json': ''}\n"
        "program = torch.export.load('m.pt2', extra_files=extra).module()\n"
        "with torch.no_grad(): found = program(torch.from_numpy(numpy.load('raw.npy')))\n"
        "numpy.save('found.npy', found.numpy())\n"
        "print(json.loads(extra['inputs.json'])['model_sha256'])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert ran.stdout.strip() == model.digest
    np.testing.assert_allclose(
        np.load(tmp_path / "found.npy"), model.predict_proba(unseen()), atol=1e-6
    )
    with pytest.raises(ConfigurationError, match=r"ends in \.pt2"):
        export(model, tmp_path / "m.pth")


@pytest.mark.slow
def test_onnx_predicts_the_same(patients: RunFolder, tmp_path: Path) -> None:
    """By a runtime without PyTorch, for another number of rows than it was traced with."""
    import onnxruntime as runtime

    done = CliRunner().invoke(app, ["export", str(patients.path), str(tmp_path / "m.onnx")])
    assert done.exit_code == 0, done.output
    model = load(patients.path)
    assert model.schema is not None
    raw = encode(model.schema, [chunk_of(unseen())], Faults("rows"), labelled=False).raw
    session = runtime.InferenceSession(tmp_path / "m.onnx")
    (found,) = session.run(["answers"], {"rows": raw})
    np.testing.assert_allclose(found, model.predict_proba(unseen()), atol=1e-6)
    inputs = session.get_modelmeta().custom_metadata_map["inputs.json"]
    assert json.loads(inputs)["model_sha256"] == model.digest
    # Other rows give other answers: the comparison sees it.
    (wrong,) = session.run(["answers"], {"rows": raw[::-1]})
    assert np.abs(wrong - found).max() > 1e-3
