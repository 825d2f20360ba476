"""The HTTP interface: nothing unpaid is answered, nothing unanswered is paid, and there is no 500."""

from __future__ import annotations

import logging
import socket
import sqlite3
import subprocess
import threading
from functools import partial
from http.client import HTTPException

import pytest

pytest.importorskip("fastapi", reason="FastAPI has left Python 3.10")

from fastapi.testclient import TestClient
from tests.browser import browser
from tests.ledger.processes import kill, shared, spawn, until, wait
from tests.prediction.serving.setup import (
    QUERIES,
    arrays,
    ask,
    key_of,
    listening,
    make_run,
    row,
    service_of,
)

from dptorch.errors import ConfigurationError
from dptorch.ledger import open_ledger
from dptorch.prediction.serving.app import create_app


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(run, key, hashes of keys)."""
    run = make_run(tmp_path_factory.mktemp("app"))
    return run, *key_of(run)


@pytest.fixture
def server(made, tmp_path):
    """(client that sends a key, service)."""
    run, key, keys = made
    service = service_of(run, str(tmp_path / "ledger.db"), timeout_s=0.2)
    app = create_app(service, keys, max_body=20_000, max_rows=50)
    return TestClient(app, headers={"X-API-Key": key}, raise_server_exceptions=False), service


def test_answers_and_budget(server):
    client, service = server
    found = client.post("/predict", json={"rows": [row(1), row(2), row(1)]})
    assert found.status_code == 200
    assert len(found.json().pop("labels")) == 3
    assert (found.json()["charged"], found.json()["remaining"]) == (2, QUERIES - 2)
    budget = client.get("/budget").json()
    assert budget["remaining"] == QUERIES - 2
    assert 0 < budget["epsilon_spent"] < budget["epsilon"] == 8.0
    assert client.get("/healthz").json() == {"status": "ok"}
    together = client.post("/predict", json={"rows": [row(i) for i in range(9)], "together": True})
    assert together.json()["charged"] == 7
    assert service.predictor.remaining == QUERIES - 9


def test_the_form_is_the_schemas(server):
    client, _ = server
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    assert set(schemas["Row"]["properties"]) == {"age", "sex", "smoker"}
    assert schemas["Row"]["properties"]["sex"]["enum"] == ["f", "m"]
    assert schemas["Row"]["required"] == ["age", "sex"]
    assert "Clipped to 0 .. 120" in schemas["Row"]["properties"]["age"]["description"]


ROW = '{"age": 3, "sex": "f"}'
BAD = [
    ("{", 422, "JSON"),
    ("", 422, "required"),
    ("[]", 422, "dictionary"),
    ('{"rows": []}', 422, "at least 1"),
    ('{"rows": [{"age": NaN, "sex": "f"}]}', 422, "finite"),
    ('{"rows": [{"age": Infinity, "sex": "f"}]}', 422, "finite"),
    ('{"rows": [{"age": 1e999, "sex": "f"}]}', 422, "finite"),
    ('{"rows": [{"age": "old", "sex": "f"}]}', 422, "number"),
    ('{"rows": [{"age": 3, "sex": "x"}]}', 422, "'f' or 'm'"),
    ('{"rows": [{"age": 3}]}', 422, "required"),
    ('{"rows": [{"age": 3, "sex": "f", "name": "Ann"}]}', 422, "not permitted"),
    ('{"rows": [{"age": 3, "sex": "f", "smoker": "perhaps"}]}', 422, "neither yes nor no"),
    ('{"rows": [[3, 0]]}', 422, "dictionary"),
    ('{"rows": [' + ",".join([ROW] * 51) + "]}", 422, "at most 50"),
    ('{"rows": [' + ROW + '], "more": 1}', 422, "not permitted"),
    ("x" * 30_000, 413, "too large"),
]


@pytest.mark.parametrize(("body", "status", "reason"), BAD, ids=range(len(BAD)))
def test_what_is_refused_costs_nothing(server, body, status, reason):
    client, service = server
    found = client.post("/predict", content=body, headers={"Content-Type": "application/json"})
    assert found.status_code == status
    assert reason.lower() in found.text.lower()
    assert service.predictor.account.spent == 0


def test_deep_nesting_costs_nothing(server):
    """Python 3.11 cannot parse it; 3.13 can, and then it is no row."""
    client, service = server
    body = ROW.join(["[" * 5000, "]" * 5000])
    found = client.post("/predict", content=body, headers={"Content-Type": "application/json"})
    assert found.status_code in (400, 422)
    assert service.predictor.account.spent == 0


def test_who_has_no_key_gets_nothing(server):
    client, service = server
    for key in ("", "wrong", "dpt_" + "x" * 43):
        found = client.post("/predict", json={"rows": [row(1)]}, headers={"X-API-Key": key})
        assert found.status_code == 401
    del client.headers["X-API-Key"]
    assert client.post("/predict", json={"rows": [row(1)]}).status_code == 401
    assert service.predictor.account.spent == 0


def test_a_spent_budget_refuses_and_the_work_is_the_same(server):
    client, service = server
    seen = []
    original = service.predictor._outputs
    service.predictor._outputs = lambda inputs: seen.append(len(inputs)) or original(inputs)
    status = [client.post("/predict", json={"rows": [row(i)]}).status_code for i in range(QUERIES)]
    assert set(status) == {200}
    found = client.post("/predict", json={"rows": [row(1000)]})
    assert found.status_code == 403
    assert "pays for 0 more" in found.json()["detail"]
    assert seen == [1] * (QUERIES + 1)
    assert client.post("/predict", json={"rows": [row(3)]}).json()["charged"] == 0  # a repeat
    assert client.get("/budget").json()["share_spent"] == pytest.approx(1.0)


def test_the_rate_of_a_client_is_limited(made, tmp_path):
    run, key, keys = made
    service = service_of(run, str(tmp_path / "ledger.db"))
    client = TestClient(create_app(service, keys, rate="3/hour"), headers={"X-API-Key": key})
    found = [client.post("/predict", json={"rows": [row(i)]}) for i in range(4)]
    assert [each.status_code for each in found] == [200, 200, 200, 429]
    assert "Retry-After" in found[3].headers
    assert service.predictor.remaining == QUERIES - 3
    with pytest.raises(ConfigurationError, match="rate='often'"):
        create_app(service, keys, rate="often")


def gone(location):
    location.unlink()


def locked(location):
    connection = sqlite3.connect(location, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    return connection


def closed(location):
    ledger = open_ledger(location)
    ledger.close_run(ledger.runs()[0].run)


@pytest.mark.parametrize("harm", [gone, locked, closed])
def test_a_ledger_that_cannot_be_written_is_a_503(server, tmp_path, harm):
    client, service = server
    assert client.post("/predict", json={"rows": [row(1)]}).status_code == 200
    kept = harm(tmp_path / "ledger.db")
    found = client.post("/predict", json={"rows": [row(2)]})
    assert found.status_code == 503
    assert found.json()["detail"]
    assert service.predictor.remaining == QUERIES - 1
    if harm is gone:
        assert client.get("/healthz").status_code == client.get("/metrics").status_code == 503
    if kept is not None:
        kept.close()
        assert client.post("/predict", json={"rows": [row(2)]}).status_code == 200


def test_two_servers_share_one_budget(made, tmp_path):
    run, key, keys = made
    clients = [
        TestClient(
            create_app(service_of(run, str(tmp_path / "ledger.db")), keys),
            headers={"X-API-Key": key},
        )
        for _ in range(2)
    ]
    answered = 0
    for i in range(QUERIES):
        found = clients[i % 2].post("/predict", json={"rows": [row(2 * i), row(2 * i + 1)]})
        answered += found.json().get("charged", 0)
    assert answered == QUERIES
    assert [c.get("/budget").json()["remaining"] for c in clients] == [0, 0]


@pytest.mark.slow
def test_clients_at_once_never_overspend(made, tmp_path):
    run, key, keys = made
    service = service_of(run, str(tmp_path / "ledger.db"))
    found = []
    with listening(create_app(service, keys, rate="100000/minute")) as address:

        def ask_often(first):
            for i in range(6):
                found.append(ask(address, key, [row(first + i)]))

        threads = [threading.Thread(target=ask_often, args=(100 * n,)) for n in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 96
    assert {status for status, _ in found} == {200, 403}
    assert sum(answer["charged"] for status, answer in found if status == 200) == QUERIES
    ledger = service.predictor.account._ledger.ledger
    assert ledger.runs()[0].steps == QUERIES
    assert ledger.verify().problems == []


def start_servers(run, location, keys, count=1):
    """(pids, ports) of servers in processes of their own, whose ports nobody else can take."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = tuple(each.getsockname()[1] for each in sockets)
    pids = [spawn(partial(serve, run, location, keys, sockets, i)) for i in range(count)]
    for each in sockets:
        each.close()  # a server that is killed must leave no open copy behind
    return pids, ports


def serve(run, location, keys, sockets, which):
    import uvicorn

    for i, each in enumerate(sockets):
        if i != which:
            each.close()
    app = create_app(service_of(run, location), keys, rate="100000/minute")
    config = uvicorn.Config(app, log_level="critical", lifespan="off")
    uvicorn.Server(config).run(sockets=[sockets[which]])


@pytest.mark.slow
def test_killed_servers_never_answer_more_than_was_charged(made, tmp_path):
    run, key, keys = made
    location = str(tmp_path / "ledger.db")
    service_of(run, location)  # begins the budget
    answered = shared((1,))
    for round_ in range(4):
        (server,), ports = start_servers(run, location, keys)
        client = spawn(partial(ask_until_refused, ports, key, 1000 * round_, answered))
        goal = answered[0] + 5
        until(lambda goal=goal: answered[0] >= goal, client)
        kill(server)
        kill(client)
        charged = open_ledger(location).runs()[0].steps
        assert goal <= answered[0] <= charged <= QUERIES


@pytest.mark.slow
@pytest.mark.postgres
def test_servers_on_one_database_share_one_budget_whatever_dies(made, postgres):
    """Two processes and four clients at once; one server is killed while it answers."""
    run, key, keys = made
    service_of(run, postgres)  # begins the budget
    serving, ports = start_servers(run, postgres, keys, 2)
    answered = shared((4,))
    clients = [
        spawn(partial(ask_until_refused, ports[n % 2 :] + ports[: n % 2], key, 1000 * n,
                      answered[n : n + 1]))
        for n in range(4)
    ]  # fmt: skip
    until(lambda: answered.sum() >= 10, *clients)
    kill(serving[0])
    assert [wait(client) for client in clients] == [0] * 4  # each was told that it is spent
    kill(serving[1])
    ledger = open_ledger(postgres)
    assert ledger.verify().problems == []
    assert ledger.runs()[0].steps == QUERIES
    # What the killed server had charged and not answered is lost: at most one for each client.
    assert QUERIES - 4 <= answered.sum() <= QUERIES


def ask_until_refused(ports, key, first, answered):
    """Ask for new rows until the budget is spent; count the answers that arrive."""
    for i in range(10**9):
        port = ports[i % len(ports)]
        try:
            status, _ = ask(f"http://127.0.0.1:{port}", key, [row(first + i)])
        except (OSError, HTTPException, ValueError):
            continue  # it is not up yet, or died in the middle of an answer
        if status == 403:
            return
        answered[0] += status == 200


def test_a_slow_client_is_let_go(made, tmp_path):
    run, key, keys = made
    service = service_of(run, str(tmp_path / "ledger.db"))
    with listening(create_app(service, keys, body_timeout_s=0.2)) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as slow:
            head = f"POST /predict HTTP/1.1\r\nHost: x\r\nX-API-Key: {key}\r\n"
            slow.sendall(
                (head + 'Content-Type: application/json\r\nContent-Length: 99\r\n\r\n{"r').encode()
            )
            assert slow.recv(100).startswith(b"HTTP/1.1 408")
        assert ask(address, key, [row(1)])[0] == 200
    assert service.predictor.remaining == QUERIES - 1


def test_no_input_and_no_output_is_logged_or_counted(server, caplog, capfd):
    client, service = server
    odd = row(1) | {"age": 77.123456}
    with caplog.at_level(logging.DEBUG):
        found = client.post("/predict", json={"rows": [odd]})
        client.post("/predict", json={"rows": [odd | {"sex": "x77.123456"}]})
    assert set(found.json()) == {"labels", "charged", "remaining", "source"}
    metrics = client.get("/metrics").text
    assert 'dptorch_answers_total{source="private"} 1.0' in metrics
    assert 'dptorch_refused_total{status="422"} 1.0' in metrics
    assert f"dptorch_answers_left {QUERIES - 1}" in metrics
    scores = service.predictor.predict(service.inputs([odd])).scores
    said = caplog.text + "".join(capfd.readouterr()) + metrics
    assert "77.123456" not in said
    assert all(f"{score:.4f}"[:7] not in said for score in scores.flatten().tolist())


def test_a_run_that_was_trained_privately_answers_without_a_budget(made):
    _, key, keys = made
    client = TestClient(create_app(arrays((3,)), keys), headers={"X-API-Key": key})
    found = client.post("/predict", json={"rows": [[1.0, 2.0, 3.0]]}).json()
    assert (found["source"], found["charged"], found["remaining"]) == ("covered", 0, None)
    assert client.get("/budget").json()["needed"] is False
    assert "dptorch_answers_left +Inf" in client.get("/metrics").text
    assert client.post("/predict", json={"rows": [1.0]}).status_code == 422


@pytest.mark.slow
def test_fuzzing_the_openapi_finds_no_500(server):
    import schemathesis

    client, _ = server
    schema = schemathesis.openapi.from_asgi("/openapi.json", client.app)
    statuses = set()

    for operation in schema.get_all_operations():
        test = schemathesis_test(operation.ok(), statuses, client)
        test()
    assert 200 in statuses
    assert 422 in statuses
    assert max(statuses) < 500


def schemathesis_test(operation, statuses, client):
    from hypothesis import given, settings

    @settings(max_examples=8, deadline=None, derandomize=True, database=None)
    @given(case=operation.as_strategy())
    def fuzz(case):
        case.headers = {**(case.headers or {}), "X-API-Key": client.headers["X-API-Key"]}
        found = case.call()
        statuses.add(found.status_code)
        assert found.status_code < 500, found.content

    return fuzz


@pytest.mark.slow
@pytest.mark.browser
def test_a_browser_shows_the_budget_draining(made, tmp_path):
    run, key, keys = made
    service = service_of(run, str(tmp_path / "ledger.db"))
    with listening(create_app(service, keys)) as address:
        pages = []
        for start in (0, 10, 100):
            rows = [row(start + i) for i in range(10 if start < 100 else QUERIES - 20)]
            assert ask(address, key, rows)[0] == 200
            command = [
                browser(), "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000",
                f"--user-data-dir={tmp_path}/profile", "--dump-dom", address + "/",
            ]  # fmt: skip
            pages.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert f"30 of {QUERIES} answers are left" in pages[0]
    assert 'aria-valuenow="25"' in pages[0]
    assert f"20 of {QUERIES} answers are left" in pages[1]
    assert 'aria-valuenow="50"' in pages[1]
    assert "The budget is spent" in pages[2]
    assert "gnmax, 8 models" in pages[2]


def test_the_page_loads_nothing_from_elsewhere(server):
    client, _ = server
    page = client.get("/").text
    assert page.count("http") == page.count("http-equiv") == 0
    assert 'fetch("budget")' in page
