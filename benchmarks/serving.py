"""Measure a server of private predictions: over-spends, lost charges, latency, and kills.

    python -m benchmarks.serving runs/digits --clients 64 --seconds 60 --kills 50

A run of `dptorch train --shards` is served on loopback from a process of its own, as it is and
without noise, ledger or budget. Clients ask for one new row at a time. Then the server is killed with
SIGKILL while they ask, again and again; after each kill what arrived is held against what was charged.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import socket
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

from dptorch.ledger import open_ledger
from dptorch.prediction import PrivatePredictor
from dptorch.prediction.ensemble import load_ensemble
from dptorch.prediction.serving.app import create_app
from dptorch.prediction.serving.keys import add_key, read_keys
from dptorch.prediction.serving.service import Service, open_service

QUERIES = 10_000_000
BUDGET = (8.0, 1e-5)


def serve(run: Path, ledger: Path, port: int, keys: Path, protected: bool) -> int:
    """Fork a server; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    import uvicorn

    torch.set_num_threads(1)
    if protected:
        opened = open_ledger(ledger)
        service = open_service(
            run, ledger=opened, budget=BUDGET, queries=QUERIES, mechanism="gnmax"
        )
    else:
        ensemble = load_ensemble(run)
        covered = {"epsilon": 0.0, "delta": 0.0, "private_randomness": True}
        mean = lambda x: torch.stack([model(x) for model in ensemble.models]).mean(0)
        service = Service(ensemble.reader, PrivatePredictor(mean, trained_with=covered), "plain")
    app = create_app(service, read_keys(keys), rate="1000000000/minute")
    uvicorn.run(app, port=port, log_level="critical", lifespan="off")
    os._exit(0)


class Clients:
    """Threads that ask for new rows until they are stopped."""

    def __init__(self, count: int, port: int, key: str, shape: tuple[int, ...], seed: int) -> None:
        self.stop, self.seconds = threading.Event(), list[float]()
        self.answered = self.refused = self.broken = 0
        self._lock = threading.Lock()
        make = lambda i: threading.Thread(target=self._ask, args=(port, key, shape, seed + i))
        self.threads = [make(i) for i in range(count)]
        for thread in self.threads:
            thread.start()

    def _ask(self, port: int, key: str, shape: tuple[int, ...], seed: int) -> None:
        chance = np.random.default_rng(seed)
        headers = {"X-API-Key": key, "Content-Type": "application/json"}
        connection = None
        while not self.stop.is_set():
            body = json.dumps({"rows": [chance.random(shape).round(4).tolist()]})
            try:
                connection = connection or http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                began = time.perf_counter()
                connection.request("POST", "/predict", body, headers)
                answer = connection.getresponse()
                answer.read()
                took = time.perf_counter() - began
            except (OSError, http.client.HTTPException):
                connection = None
                with self._lock:
                    self.broken += 1
                time.sleep(0.01)
                continue
            with self._lock:
                if answer.status == 200:
                    self.answered += 1
                    self.seconds.append(took)
                else:
                    self.refused += 1

    def end(self) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int) -> None:
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.02)


def charged(ledger: Path) -> int:
    runs = open_ledger(ledger).runs()
    return sum(run.steps for run in runs)


def end(pid: int, number: int) -> None:
    os.kill(pid, number)
    os.waitpid(pid, 0)


def measure(arguments: argparse.Namespace, folder: Path, key: str, keys: Path) -> None:
    shape = (28, 28) if arguments.images else tuple(load_ensemble(arguments.run).reader.input_shape)
    medians = {}
    for protected in (False, True):
        port, ledger = free_port(), folder / "load.db"
        pid = serve(arguments.run, ledger, port, keys, protected)
        wait_for(port)
        clients = Clients(arguments.clients, port, key, shape, seed=0)
        time.sleep(arguments.seconds)
        clients.end()
        end(pid, signal.SIGTERM)
        p50, p99 = np.quantile(clients.seconds, [0.5, 0.99]) * 1000
        medians[protected] = p50
        print(
            f"{'protected' if protected else 'plain':<10} {clients.answered} answers, "
            f"{clients.answered / arguments.seconds:.0f}/s, p50 {p50:.0f} ms, p99 {p99:.0f} ms, "
            f"{clients.refused} refused, {clients.broken} broken",
            flush=True,
        )
        if protected:
            total = charged(ledger)
            print(
                f"charged {total}, answered {clients.answered}: over-spends "
                f"{max(0, clients.answered - total)}, charged in vain {total - clients.answered}"
            )
    print(f"latency (median) {medians[True] / medians[False]:.2f} times that of the plain server")


def kill_again_and_again(arguments: argparse.Namespace, folder: Path, key: str, keys: Path) -> None:
    shape = (28, 28) if arguments.images else tuple(load_ensemble(arguments.run).reader.input_shape)
    ledger, port, chance = folder / "kills.db", free_port(), random.Random(0)
    answered = worst = 0
    for round_ in range(arguments.kills):
        pid = serve(arguments.run, ledger, port, keys, protected=True)
        wait_for(port)
        clients = Clients(8, port, key, shape, seed=1000 * (round_ + 1))
        time.sleep(chance.uniform(0.05, 0.6))
        end(pid, signal.SIGKILL)
        clients.end()
        answered += clients.answered
        worst = max(worst, answered - charged(ledger))
    total = charged(ledger)
    whole = open_ledger(ledger).verify().problems == []
    print(
        f"{arguments.kills} kills: {answered} answered, {total} charged, answered beyond what was "
        f"charged at most {max(0, worst)}, chain whole: {whole}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--images", action="store_true", help="rows are grey images of 28 x 28")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        keys = folder / "keys.json"
        key = add_key(keys, "load")
        measure(arguments, folder, key, keys)
        kill_again_and_again(arguments, folder, key, keys)


if __name__ == "__main__":
    main()
