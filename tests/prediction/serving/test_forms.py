"""What a row is, by the kind of a run's data: a server answers what the run itself predicts."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("fastapi", reason="FastAPI has left Python 3.10")

from fastapi.testclient import TestClient
from PIL import Image
from tests.cli.commands import run
from tests.prediction.serving.setup import arrays, key_of
from torch import nn

import dptorch
from dptorch.errors import ConfigurationError
from dptorch.prediction import PrivatePredictor
from dptorch.prediction.serving.app import create_app
from dptorch.prediction.serving.forms import row_depth
from dptorch.prediction.serving.service import Service, open_service
from dptorch.tables import Schema
from dptorch.text.predictor import TextPredictor
from dptorch.training.predictor import Predictor

COVERED = {"epsilon": 1.5, "delta": 1e-5, "private_randomness": True}
NEW = ["the film was good", "bad bad bad", "it was very very not good it was it"]


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def of_pictures(folder: Path | None = None) -> Predictor:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    images = {"kind": "images", "size": 4, "channels": 3}
    return replace(arrays((3, 4, 4)).reader, network=network, preparation=images)


def of_numbers(folder: Path | None = None) -> Predictor:
    torch.manual_seed(0)
    schema = Schema.from_dict(
        {
            "dptorch_schema": 1,
            "label": {"column": "days", "bounds": [0, 30]},
            "columns": {
                "age": {"kind": "number", "bounds": [0, 120]},
                "smoker": {"kind": "boolean"},
            },
        }
    )
    return replace(
        arrays((2,)).reader,
        network=nn.Linear(2, 1),
        classes=(),
        preparation={"kind": "table"},
        schema=schema,
    )


def of_texts(folder: Path, columns: tuple[str, ...] = ("body",)) -> TextPredictor:
    from tests.text.folders import bert_folder
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    bert = bert_folder(folder / "bert")
    network = AutoModelForSequenceClassification.from_pretrained(bert).eval()
    tokenizer = AutoTokenizer.from_pretrained(bert)
    return TextPredictor(network, tokenizer, ("neg", "pos"), columns, None, 16, COVERED, "")


def of_pairs(folder: Path) -> TextPredictor:
    return of_texts(folder, ("body", "other"))


def client_of(reader: Any, folder: Path) -> TestClient:
    key, keys = key_of(folder)
    network = PrivatePredictor(reader.network, trained_with=COVERED)
    app = create_app(Service(reader, network, "run"), keys, max_body=200_000)
    return TestClient(app, headers={"X-API-Key": key}, raise_server_exceptions=False)


def in_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


PEOPLE = [{"age": 31.5, "smoker": True}, {"age": 80, "smoker": "no"}]
PAIRS = [{"body": text, "other": "the plot"} for text in NEW]


@pytest.mark.parametrize(
    ("make", "rows", "sent"),
    [
        (of_numbers, PEOPLE, PEOPLE),
        (of_pictures, [picture(i) for i in range(3)], [in_base64(picture(i)) for i in range(3)]),
        pytest.param(of_texts, NEW, NEW, marks=pytest.mark.slow),
        pytest.param(
            lambda folder: of_texts(folder, ("body", "other")), PAIRS, PAIRS, marks=pytest.mark.slow
        ),
    ],
    ids=["numbers", "pictures", "texts", "pairs of texts"],
)
def test_a_server_answers_what_the_run_predicts(make, rows, sent, tmp_path):
    reader = make(tmp_path)
    client = client_of(reader, tmp_path)
    found = client.post("/predict", json={"rows": sent})
    assert found.status_code == 200, found.text
    said = found.json()
    assert said.pop("values" if not reader.classes else "labels") == reader.predict(rows).tolist()
    assert said == {"charged": 0, "remaining": None, "source": "covered"}
    assert client.get("/openapi.json").status_code == 200


def bomb() -> str:
    """A small file of a picture of 5,000 x 5,000."""
    file = io.BytesIO()
    Image.new("1", (5_000, 5_000)).save(file, "PNG", optimize=True)
    return in_base64(file.getvalue())


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("/etc/hostname", "Base64 decoding error"),
        ("no base64!", "content of a readable image"),
        (in_base64(b"GIF89a"), "content of a readable image"),
        (in_base64(picture(0)[:60]), "content of a readable image"),
        (bomb, "Expected at most 16,777,216"),
        ("", "content of a readable image"),
        (7, "bytes"),
        ([0.5], "bytes"),
        (None, "bytes"),
    ],
)
def test_what_is_no_picture_is_refused(row, reason, tmp_path):
    client = client_of(of_pictures(), tmp_path)
    rows = [row() if callable(row) else row]
    found = client.post("/predict", json={"rows": rows})
    assert found.status_code == 422, found.text
    assert reason in found.text


def test_a_path_is_never_opened_for_a_client(tmp_path):
    """The broken twin: the run itself takes paths, so that the server has to refuse them."""
    (tmp_path / "a.png").write_bytes(picture(0))
    reader = of_pictures()
    assert reader.predict([tmp_path / "a.png"]).tolist() == reader.predict([picture(0)]).tolist()
    client = client_of(reader, tmp_path)
    found = client.post("/predict", json={"rows": [str(tmp_path / "a.png")]})
    assert found.status_code == 422
    service = Service(reader, PrivatePredictor(reader.network, trained_with=COVERED), "run")
    with pytest.raises(Exception, match="not the content of a picture"):
        service.answer([str(tmp_path / "a.png")])


@pytest.mark.slow
def test_a_run_of_numbers_is_opened(tmp_path, monkeypatch):
    """From a file to a server's answer; a run with a seed is not served."""
    monkeypatch.chdir(tmp_path)
    rows = "\n".join(f"{i % 90},{'yes' if i % 3 else 'no'},{i % 30}" for i in range(200))
    Path("stays.csv").write_text("age,smoker,days\n" + rows)
    Path("schema.json").write_text(of_numbers().schema.to_json())
    train = ("train", "--data", "stays.csv", "--schema", "schema.json", "--epochs", "1")
    assert run(*train, "--name", "stays").exit_code == 0
    service = open_service("runs/stays")
    assert service.answer(PEOPLE).answers == dptorch.load("runs/stays").predict(PEOPLE).tolist()
    assert service.budget()["needed"] is False
    about = Path("runs/stays/run.json")
    text = about.read_text().replace('"private_randomness": true', '"private_randomness": false')
    about.write_text(text)  # as of a run with --seed
    with pytest.raises(ConfigurationError, match=r"stays cannot be served.*--shards"):
        open_service("runs/stays")


@pytest.mark.slow
@pytest.mark.parametrize("rows", [["  "], [""], [7], [["a", "b"]], [{"body": "a"}], "a text"])
def test_what_is_no_text_is_refused(rows, tmp_path):
    found = client_of(of_texts(tmp_path), tmp_path).post("/predict", json={"rows": rows})
    assert found.status_code == 422, found.text


def test_the_depth_of_a_row():
    assert row_depth(arrays((3,)).reader) == 1
    recipe = {"kind": "recipe", "name": "mnist-features"}
    assert row_depth(replace(arrays((432,)).reader, preparation=recipe)) == 2
