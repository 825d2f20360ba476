"""A run on texts and its release classify texts as they are, or refuse."""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("peft")

from typer.testing import CliRunner

import dptorch
from dptorch.cli.app import app
from dptorch.errors import ConfigurationError, DataError
from dptorch.text.job import TextJob, prepare
from dptorch.text.predictor import TextPredictor
from dptorch.training import run_folder
from dptorch.training.loop import train
from dptorch.training.release import release
from dptorch.training.run_folder import RunFolder
from tests.text.folders import bert_folder, write_jsonl

NEW = ["the film was good", "bad bad bad", "it was very very not good it was it"]
PROMPT = {"template": "{text} it was {mask} .", "label_words": "bad,good"}


def rows(pairs: bool) -> list[dict[str, str]]:
    return [
        {"body": f"the film {'very ' * (i % 3)}{'good' if i % 2 else 'bad'} " + "it " * (i // 6),
         "label": "pos" if i % 2 else "neg"} | ({"other": "the plot"} if pairs else {})
        for i in range(40)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunFolder]:
    """A short run of a small BERT."""
    folder = tmp_path_factory.mktemp("texts")
    model = bert_folder(folder / "bert")

    def make(name: str, **settings: Any) -> RunFolder:
        data = write_jsonl(folder / f"{name}.jsonl", rows("pair" in settings))
        wanted = {"epochs": 1, "sample_rate": 0.25, "noise_multiplier": 0.5, "seed": 0}
        job = TextJob(
            "text-classification", data=data, text="body", model=model, **(wanted | settings)
        )
        run = run_folder.create(Path(tempfile.mkdtemp(dir=folder)), name)
        train(prepare(job), run)
        return run

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{"method": "full"}, {"method": "lora", "pool": "mean"},
     {"method": "bias-only", "pair": "other", "pool": "mean"}, {"method": "full", **PROMPT}],
    ids=["head", "adapters", "pairs", "prompt"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")
def test_texts_are_classified_by_a_run_and_its_release(
    trained: Callable[..., RunFolder], settings: dict[str, str], tmp_path: Path
) -> None:
    """As the training's own test did, to the bit, and by the columns' names as well as by place."""
    run = trained("-".join(settings), **settings)
    model = dptorch.load(run.path)
    assert isinstance(model, TextPredictor)
    pairs = "pair" in settings
    given = [(text, "the plot") for text in NEW] if pairs else NEW
    named = [{"body": text, "other": "the plot", "id": 7} for text in NEW]
    chances = model.predict_proba(given)
    assert np.array_equal(chances, model.predict_proba(named))
    assert set(model.predict(given)) <= {"neg", "pos"}
    np.testing.assert_allclose(chances.sum(1), 1)
    # What the run's own report says of its test rows.
    setup = prepare(TextJob.from_dict(run.read_json("run.json")["job"]))
    test = [setup.data.test[i] for i in range(setup.data.sizes[1])]
    right = model.outputs(test).argmax(1).tolist() == np.array([row["labels"] for row in test])
    assert float(right.mean()) == pytest.approx(run.read_metrics()[-1]["test_accuracy"])
    if settings["method"] == "lora":
        return  # a release has adapters alone; what they adapt is by name
    shared = release(run, tmp_path / "shared")
    theirs = dptorch.load(shared.path, digest=model.digest)
    assert np.array_equal(theirs.predict_proba(given), chances)
    # The broken twin: a tokenizer that reads words otherwise is another model.
    tokens = json.loads((shared.path / "model/tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    vocabulary["good"], vocabulary["bad"] = vocabulary["bad"], vocabulary["good"]
    (shared.path / "model/tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(DataError, match="the model is not the one that is stated"):
        dptorch.load(shared.path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")
def test_the_command_classifies_a_file(
    trained: Callable[..., RunFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained("command", method="last-layer")
    monkeypatch.chdir(tmp_path)

    def predict(*options: str) -> Any:
        return CliRunner().invoke(app, ["predict", str(run.path), "new.csv", *options])

    Path("new.csv").write_text("id,body\na,the film was good\nb,\nc,bad plot\n")
    done = predict("--keep", "id")
    assert done.exit_code == 2
    assert "new.csv: row 1 is empty" in done.stderr
    done = predict("--keep", "id", "--on-bad-row", "skip", "--out", "found.csv", "--probabilities")
    assert done.exit_code == 0, done.output
    assert "Skipped 1 rows" in done.stderr
    found = list(csv.DictReader(Path("found.csv").read_text().splitlines()))
    assert [(row["row"], row["id"]) for row in found] == [("0", "a"), ("2", "c")]
    model = dptorch.load(run.path)
    expected = model.predict(["the film was good", "bad plot"]).tolist()
    assert [row["prediction"] for row in found] == expected
    assert (
        "has no column 'name' to keep. Found: id, body"
        in predict("--keep", "name", "--on-bad-row", "skip").stderr
    )
    Path("new.csv").write_text("text\nthe film\n")
    assert "row 0 has no 'body'" in predict().stderr
    exported = CliRunner().invoke(app, ["export", str(run.path), "model.onnx"])
    assert exported.exit_code == 2
    assert "in transformers' own format" in exported.stderr
    for bad in (["", "good"], [("a", "b")]):
        with pytest.raises(DataError, match="row 0"):
            model.predict(bad)
    with pytest.raises(DataError, match="Expected a list of texts"):
        model.predict("the film")
    assert model.predict([]).tolist() == []


def test_a_model_that_writes_is_sent_to_generate(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"job": {"task": "language-model"}}))
    with pytest.raises(ConfigurationError, match="dptorch generate"):
        dptorch.load(tmp_path)
