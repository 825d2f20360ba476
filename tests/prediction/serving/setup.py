"""A small run of shards, its service, and servers that listen on a port of their own."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from dptorch.ledger import open_ledger
from dptorch.prediction import PrivatePredictor
from dptorch.prediction.ensemble import train_ensemble
from dptorch.prediction.serving.keys import add_key, read_keys
from dptorch.prediction.serving.service import Service, open_service
from dptorch.training.data import ReadOptions
from dptorch.training.job import Job
from dptorch.training.predictor import Predictor
from dptorch.training.run_folder import RunFolder

QUERIES = 40


def make_run(folder: Path) -> Path:
    """A run of 8 shards on a table with a number, a category and a yes or no; and a key."""
    rows = [f"{i % 50}.5,{'fm'[i % 2]},{'yes' if i % 3 else 'no'},{i % 2}" for i in range(200)]
    (folder / "points.csv").write_text("age,sex,smoker,sick\n" + "\n".join(rows))
    columns = {
        "age": {"kind": "number", "bounds": [0, 120]},
        "sex": {"kind": "category", "values": ["f", "m"], "other": False},
        "smoker": {"kind": "boolean", "missing": True},
    }
    schema = {
        "dptorch_schema": 1,
        "label": {"column": "sick", "classes": ["0", "1"]},
        "columns": columns,
    }
    (folder / "schema.json").write_text(json.dumps(schema))
    run = folder / "run"
    run.mkdir()
    reading = ReadOptions(label="sick", schema=str(folder / "schema.json"))
    job = Job(data=str(folder / "points.csv"), reading=reading, epochs=1, seed=0)
    train_ensemble(job, RunFolder(run), 8, dataset="points")
    return run


def key_of(run: Path, client: str = "clinic") -> tuple[str, dict[str, str]]:
    key = add_key(run / "keys.json", client)
    return key, read_keys(run / "keys.json")


def service_of(run: Path, location: str, timeout_s: float = 30.0, **terms: Any) -> Service:
    given = {"budget": (8.0, 1e-5), "queries": QUERIES, "mechanism": "gnmax"} | terms
    return open_service(run, ledger=open_ledger(location, timeout_s=timeout_s), **given)


def row(i: int) -> dict[str, Any]:
    return {"age": 20 + i / 64, "sex": "fm"[i % 2], "smoker": None}


@contextlib.contextmanager
def listening(app: Any) -> Iterator[str]:
    """A real server of the application, in a thread; gives its address."""
    import uvicorn

    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
    thread.start()
    try:
        while not server.started:
            thread.join(0.01)
            assert thread.is_alive()
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def ask(address: str, key: str, rows: list[Any]) -> tuple[int, Any]:
    """The status and the answer."""
    request = urllib.request.Request(
        address + "/predict",
        data=json.dumps({"rows": rows}).encode(),
        headers={"X-API-Key": key, "Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def arrays(shape: tuple[int, ...]) -> Service:
    """A service of a model on arrays, whose training covers it."""
    reader = Predictor(
        network=nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), 2)),
        classes=("a", "b"),
        input_shape=shape,
        preparation={"kind": "arrays", "bounds": None, "column_bounds": {}},
        schema=None,
        statement={},
        digest="",
    )
    covered = {"epsilon": 1.5, "delta": 1e-5, "private_randomness": True}
    return Service(reader, PrivatePredictor(reader.network, trained_with=covered), "arrays")
