"""`dptorch serve`: private predictions over HTTP, under one budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from dptorch.errors import ConfigurationError

if TYPE_CHECKING:
    from dptorch.ledger import Ledger

__all__ = ["serve"]


def serve(
    run: Annotated[
        Path,
        typer.Argument(
            help="Folder of a run: of [bold]dptorch train --shards[/], or of a private run, which "
            "needs no budget.",
            show_default=False,
        ),
    ],
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="EPSILON,DELTA",
            help="What all answers may cost together: [bold]8,1e-5[/].",
            show_default=False,
        ),
    ] = None,
    queries: Annotated[
        int, typer.Option(help="How many answers the budget has to pay for; the noise follows.")
    ] = 1000,
    mechanism: Annotated[
        str,
        typer.Option(help="gnmax, confident-gnmax, gaussian, laplace or noisy-max."),
    ] = "gnmax",
    clip: Annotated[
        float | None,
        typer.Option(help="Bound on the logits of one model.", show_default="1, if it needs one"),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="confident-gnmax: votes that a label needs.", show_default=False),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="Name of the budget in the ledger.", show_default="the run's own"),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    ledger: Annotated[
        str | None,
        typer.Option(
            envvar="DPTORCH_LEDGER",
            help="Where every answer is written down before it is given: a file, or "
            "[bold]postgresql://user@host/database[/].",
            show_default="ledger.db beside the run",
        ),
    ] = None,
    keys: Annotated[
        Path | None,
        typer.Option(help="File with the hashes of API keys.", show_default="api_keys.json in RUN"),
    ] = None,
    new_key: Annotated[
        str | None,
        typer.Option(
            metavar="CLIENT",
            help="Make a key for a client, print it once, and stop.",
            show_default=False,
        ),
    ] = None,
    rate: Annotated[str, typer.Option(help="Requests of one client.")] = "600/minute",
    max_body: Annotated[int, typer.Option(help="Largest request, in bytes.")] = 1_000_000,
    max_rows: Annotated[int, typer.Option(help="Most rows of a request.")] = 1000,
) -> None:
    """Answer queries over HTTP, each charged to one budget before it is answered.

    All clients, restarts and servers with this run and ledger share the budget. When it is spent,
    further questions are refused. A model that was trained privately, on a table, images or texts,
    answers without noise or budget.

    [bold]Examples[/]

    [cyan]dptorch serve runs/mnist-features-1 --new-key clinic[/]

    [cyan]dptorch serve runs/mnist-features-1 --budget 8,1e-5 --queries 1000[/]
    """
    from dptorch.prediction.serving.keys import add_key, read_keys

    console = Console(highlight=False, soft_wrap=True)
    keys = keys or run / "api_keys.json"
    if not (run / "run.json").is_file():
        raise ConfigurationError(f"{run} is not the folder of a run (it has no run.json).")
    if new_key is not None:
        console.print(f"Key of {new_key}, shown once: {add_key(keys, new_key)}", markup=False)
        return
    hashes = read_keys(keys)
    try:
        import uvicorn

        from dptorch.prediction.serving.app import create_app
    except ImportError as error:
        raise ConfigurationError(
            f"dptorch serve needs Python 3.11 and FastAPI, uvicorn, limits and prometheus-client "
            f"({error}): pip install 'dptorch[serve]'."
        ) from None
    from dptorch.prediction.serving.service import open_service

    if clip is None and mechanism in ("gaussian", "laplace", "noisy-max"):
        clip = 1.0
    service = open_service(
        run,
        ledger=None if budget is None else _open(ledger or str(run.parent / "ledger.db")),
        budget=None if budget is None else _pair(budget),
        mechanism=mechanism,
        queries=queries,
        clip=clip,
        threshold=threshold,
        name=name,
    )
    app = create_app(service, hashes, rate=rate, max_body=max_body, max_rows=max_rows)
    console.print(str(service.predictor.statement()), markup=False)
    console.print(f"Listening on http://{host}:{port}, with keys of {len(hashes)} client(s).")
    settings: dict[str, Any] = {"log_level": "warning", "access_log": False, "server_header": False}
    uvicorn.run(app, host=host, port=port, limit_concurrency=1024, **settings)


def _pair(text: str) -> tuple[float, float]:
    try:
        epsilon, delta = (float(part) for part in text.split(","))
    except ValueError:
        raise ConfigurationError(
            f"budget={text!r} must be epsilon and delta, such as 8,1e-5."
        ) from None
    return epsilon, delta


def _open(location: str) -> Ledger:
    from dptorch.cli.ledger import key_from_environment
    from dptorch.ledger import open_ledger

    # Clients do not wait long: a ledger that is locked is a 503.
    return open_ledger(location, key_file=key_from_environment(), timeout_s=5.0)
