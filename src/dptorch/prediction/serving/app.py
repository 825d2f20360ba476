"""The HTTP interface: what is asked, what is answered, and why it is refused.

| | |
|---|---|
| POST /predict | the class or number of each row, charged before it is answered; needs a key |
| GET /budget | what is spent and what is left |
| GET /healthz | whether the ledger can be read |
| GET /metrics | counters for Prometheus: no inputs, no outputs |
| GET / | a page that shows the budget draining |

Nothing of a request or an answer is logged, and messages hold no input but the client's own.
"""

# No postponed annotations: FastAPI reads those of its functions, which name what is local here.
import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from importlib.resources import files
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import APIKeyHeader
from limits import parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, Field

from dptorch.errors import (
    BudgetExhausted,
    ConfigurationError,
    DataError,
    LedgerError,
    PrivacyError,
)
from dptorch.prediction.serving.forms import body_of, plain
from dptorch.prediction.serving.keys import client_of
from dptorch.prediction.serving.service import Service

__all__ = ["create_app"]

_REASONS: Mapping[int, str] = {
    401: "no key, or an unknown one",
    403: "the budget is spent",
    408: "the body took too long",
    413: "the body is too large",
    422: "rows that do not fit; nothing was spent",
    429: "too many requests",
    503: "the ledger cannot be written; nothing was answered",
}


class Reason(BaseModel):
    """Why a request was refused."""

    detail: str


class Budget(BaseModel):
    """What is spent and what is left."""

    run: str
    needed: bool
    epsilon_spent: float
    delta: float
    epsilon: float | None = None
    queries: int | None = None
    remaining: int | None = None
    share_spent: float | None = None
    unit: str | None = None
    mechanism: str | None = None
    models: int | None = None


class Answer(BaseModel):
    """The answer to a request."""

    charged: int = Field(description="Rows that were charged; the others were answered before.")
    remaining: int | None = Field(description="How many more the budget pays for; null: no limit.")
    source: Literal["private", "covered", "public"]


class Classes(Answer):
    """The answer of a model of classes."""

    labels: list[str | None] = Field(description="Class of each row; null where models disagree.")


class Numbers(Answer):
    """The answer of a model of a number."""

    values: list[float] = Field(description="Of each row, in the units of the label.")


def create_app(
    service: Service,
    keys: Mapping[str, str],
    *,
    rate: str = "600/minute",
    max_body: int = 1_000_000,
    max_rows: int = 1000,
    body_timeout_s: float = 10.0,
) -> FastAPI:
    """The application of a service.

    Args:
        service: from `open_service`.
        keys: client -> hash of its key, from `read_keys`.
        rate: requests of one client, such as "600/minute".
        max_body: bytes of a request.
        max_rows: of a request.
        body_timeout_s: how long a client may take to send its body.

    Guarantees:
        - A request that is not answered with 200 has spent nothing, unless the client left or the
          process died after the charge
          (`test_what_is_refused_costs_nothing`).
        - Every answer was charged before it was computed, whatever clients do at once
          (`test_clients_at_once_never_overspend`).

    Raises:
        ConfigurationError: `rate` cannot be read.
    """
    app = FastAPI(
        title="dptorch",
        summary="Private predictions under one budget.",
        max_body_size=max_body,
        openapi_url="/openapi.json",
    )
    try:
        limit, limiter = parse(rate), MovingWindowRateLimiter(MemoryStorage())
    except ValueError:
        raise ConfigurationError(f"rate={rate!r} must be such as '600/minute'.") from None
    metrics = _Metrics()
    app.add_middleware(_Deadline, seconds=body_timeout_s)
    header = APIKeyHeader(name="X-API-Key", auto_error=False)

    def client(given: Annotated[str | None, Depends(header)]) -> str:
        found = None if given is None else client_of(keys, given)
        if found is None:
            raise HTTPException(401, _REASONS[401] + ": send it as X-API-Key.")
        if not limiter.hit(limit, found):
            raise HTTPException(429, f"more than {rate}.", headers={"Retry-After": "60"})
        return found

    Rows: Any = body_of(service.reader, max_rows)
    made_of: type[Answer] = Classes if service.reader.classes else Numbers

    @app.post(
        "/predict", response_model=made_of, responses=_responses(401, 403, 408, 413, 429, 503)
    )
    def predict(body: Rows, who: Annotated[str, Depends(client)]) -> Any:
        """Answer about rows: all of them are charged, or none is answered."""
        with metrics.seconds.time():
            reply = service.answer(plain(body.rows), together=body.together)
        metrics.answered.labels(reply.source).inc(len(reply.answers))
        metrics.charged.inc(reply.charged)
        return {
            "labels" if made_of is Classes else "values": reply.answers,
            "charged": reply.charged,
            "remaining": service.predictor.remaining,
            "source": reply.source,
        }

    @app.get("/budget", response_model=Budget, responses=_responses(503))
    def budget() -> Any:
        """What is spent and what is left, of all clients together."""
        return service.budget()

    @app.get("/healthz", responses=_responses(503))
    def healthz() -> dict[str, str]:
        """Whether the ledger can be read."""
        service.budget()
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response, responses=_responses(503))
    def read_metrics() -> Response:
        """Counters for Prometheus."""
        found = service.budget()
        metrics.epsilon.set(found["epsilon_spent"])
        metrics.remaining.set(float("inf") if not found["needed"] else found["remaining"])
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    def page() -> str:
        return (files("dptorch.prediction.serving") / "page.html").read_text(encoding="utf-8")

    def refusal(status: int) -> Callable[[Request, Exception], Awaitable[Response]]:
        async def refuse(request: Request, error: Exception) -> Response:
            metrics.refused.labels(str(status)).inc()
            return JSONResponse({"detail": str(error)}, status)

        return refuse

    for kind, status in (
        (BudgetExhausted, 403),
        (LedgerError, 503),
        (PrivacyError, 503),
        (ConfigurationError, 422),
        (DataError, 422),
    ):
        app.add_exception_handler(kind, refusal(status))

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        # Without the input: it may be no JSON (NaN), or large.
        metrics.refused.labels("422").inc()
        found = [{key: each[key] for key in ("loc", "msg", "type")} for each in error.errors()[:20]]
        return JSONResponse({"detail": found}, 422)

    return app


class _Metrics:
    """Counters of one application. None of them depends on what was asked or answered."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        made: dict[str, Any] = {"registry": self.registry}
        self.answered = Counter("dptorch_answers", "Rows answered, by source.", ["source"], **made)
        self.charged = Counter("dptorch_charged", "Rows charged to the budget.", **made)
        self.refused = Counter(
            "dptorch_refused", "Requests refused, by status.", ["status"], **made
        )
        self.seconds = Histogram("dptorch_predict_seconds", "Time of an answer.", **made)
        self.epsilon = Gauge("dptorch_epsilon_spent", "Epsilon of all answers.", **made)
        self.remaining = Gauge("dptorch_answers_left", "Answers that are left.", **made)


class _Deadline:
    """Refuse a body that does not arrive in time with 408."""

    def __init__(self, app: Any, seconds: float) -> None:
        self.app, self.seconds = app, seconds

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self.app(scope, receive, send)
            return
        loop = asyncio.get_running_loop()
        deadline, whole = loop.time() + self.seconds, False

        async def receive_in_time() -> Any:
            nonlocal whole
            if whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), deadline - loop.time())
            except asyncio.TimeoutError:
                raise HTTPException(408, f"the body took more than {self.seconds:g} s.") from None
            whole = not message.get("more_body", False)
            return message

        await self.app(scope, receive_in_time, send)


def _responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Reason, "description": _REASONS[status]} for status in statuses}
