"""Routes, errors and the edge of the web; the only module that knows the framework.

Every answer is JSON and every error a problem (RFC 9457) whose ``detail`` is a string; `STATUS_OF` says which
status an error becomes. Routes that compute do so in the bounded `WorkPool`, so that health never waits.

From the outside in: `edge.Observer`, `edge.Shortcut`, cross-origin headers, `edge.Guard`, the routes.
"""

import asyncio
import http
import logging
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import anyio
from fastapi import APIRouter, FastAPI, Header, Query, Request, Response
from fastapi import Path as PathParameter
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import HTTPException, RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from pydantic import ValidationError
from pydantic.json_schema import models_json_schema
from sse_starlette import EventSourceResponse
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from data.data_fetcher import SampleSource
from service import edge
from service import schemas as wire
from service.backtest_service import posted_backtest, posted_forward_sim
from service.model_registry import ModelRegistry
from service.prediction_chart import is_finite_number
from service.prediction_service import PredictionService
from service.training_service import TrainingService
from utils import base as errors
from utils.base import AIStocksError, without_paths

T = TypeVar("T")
logger = logging.getLogger(__name__)

VERSION, ERRORS_IN_DETAIL, TRAINING = "0.1.0", 5, r"(`python -m training\.[^`]+)`"
# Seconds after which asking again may help.
RETRY_AFTER_S: Mapping[type[AIStocksError], int] = {errors.UpstreamError: 30, errors.OverloadError: 2}
# A stream of events asks the database twice a second, and sleeps between: its end takes longer than that.
MAX_STREAMS, STREAM_END_S = 32, 2.0

PREFLIGHT = {"origin", "access-control-request-method"}
WHO_MAY_ASK = "GET, POST and DELETE are served, to the origins that PYTHON_API_ALLOW_ORIGINS names"
# The nearest ancestor of an error decides.
STATUS_OF: Mapping[type[AIStocksError], int] = {
    **dict.fromkeys((errors.JobMissingError, errors.UnknownSymbolError, errors.ModelMissingError), 404),
    **dict.fromkeys((errors.ConflictError, errors.GateRefusedError), 409),
    **dict.fromkeys((errors.UsageError, errors.DataError), 422),
    AIStocksError: 500,
    **dict.fromkeys((errors.UpstreamError, errors.ModelError, errors.OverloadError), 503),
    errors.DeadlineError: 504,
    errors.StorageError: 507,
}

# What any request may meet, and what one with a body or one that writes may meet besides.
ERRORS_OF_ALL = (422, 429, 500, 503)
ERRORS_OF = {"post": (400, 401, 403, 408, 409, 413, 504), "delete": (401, 403, 409), "get": (504,)}
REF = "#/components/schemas/{model}"
DOCS = Path(__file__).with_name("docs.html.j2")
DOCS_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"

Days = Annotated[int, Query(ge=1, le=wire.MAX_CHART_BARS)]
VersionInQuery = Annotated[str | None, Query(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
_SYMBOL = {"pattern": wire.SYMBOL_PATTERN, "maxLength": 64}
SymbolInPath = Annotated[str, PathParameter(json_schema_extra=_SYMBOL)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """What the routes answer with; ``gauges`` are further figures of ``/metrics``: words, and how to ask."""

    registry: ModelRegistry
    predictions: PredictionService
    training: TrainingService
    track_record: Callable[[str, int], wire.TrackRecord]
    source_name: str
    origins: tuple[str, ...]
    on_start: Callable[[], None]
    on_stop: Callable[[], None] = lambda: None
    rules: edge.EdgeRules = field(default_factory=edge.EdgeRules)
    stopping: Callable[[], bool] = lambda: False
    gauges: Mapping[str, tuple[str, Callable[[], float]]] = field(default_factory=dict)


class TextConvertor(StringConvertor):
    """Matches anything, slashes and newlines included, so that the symbol's own check refuses it."""

    regex = r"(?s:.*)"


class CrossOrigin(CORSMiddleware):
    """Cross-origin headers, and no changes by pages from elsewhere: not all of them are asked for before.

    What answers a preflight is empty, or a problem: the stock answers are text.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope.get("method") == "OPTIONS" and set(given := Headers(scope=scope)) >= PREFLIGHT:
            stock = self.preflight_response(given)
            status, refused = stock.status_code, bytes(stock.body).decode().removeprefix("Disallowed CORS ")
            kept = {name: stock.headers[name] for name in stock.headers if not name.startswith("content-")}
        elif edge.changes_something(scope) and edge.is_from_elsewhere(scope, self.is_allowed_origin):
            status, refused, kept = 403, "origin", {"Vary": "Origin"}
        else:
            await super().__call__(scope, receive, send)
            return
        detail = f"the browser may not ask this ({refused}): {WHO_MAY_ASK}"
        answers = Response(headers=kept) if status == 200 else problem(scope, status, detail, kept)
        await answers(scope, receive, send)


class EventStream(EventSourceResponse):
    """A stream of events, one of at most `MAX_STREAMS` at a time."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events, or raise `OverloadError` before anything is sent."""
        streams: set[EventStream] = scope["app"].state.streams
        if len(streams) >= MAX_STREAMS:
            raise errors.OverloadError(f"{MAX_STREAMS} streams of events are open: try again when one ends")
        streams.add(self)
        try:
            await super().__call__(scope, receive, send)
        finally:
            streams.discard(self)


class Api(FastAPI):
    """The framework behind the edge: what the edge answers costs none of the framework's own layers."""

    outermost: edge.Application

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        await self.outermost(scope, receive, send)


def create_api(services: Services) -> FastAPI:
    """Build the application around its services."""
    register_url_convertor("text", TextConvertor())
    rules = services.rules
    pool = edge.WorkPool(threads=rules.work_threads, queue=rules.work_queue, deadline_s=rules.deadline_s)
    pending = ("Requests that compute or wait to", lambda: float(pool.pending))
    metrics = edge.Metrics({"work_pending": pending, **services.gauges})
    api = Api(
        title="AI-Stocks",
        version=VERSION,
        lifespan=partial(_running, services, pool),
        # A redirect has no JSON body.
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
        responses={"default": {"model": wire.Problem, "description": "Every error"}},
    )
    api.exception_handler(AIStocksError)(_on_our_error)
    api.exception_handler(RequestValidationError)(_on_invalid)
    api.exception_handler(StarletteHTTPException)(_on_http_error)
    api.state.source, api.state.streams, api.state.ready = services.source_name, set(), False
    stock_openapi = api.openapi
    api.openapi = lambda: api.openapi_schema or document_errors(stock_openapi())  # type: ignore[method-assign]
    routers = {name: APIRouter(tags=[name]) for name in ("health", "models", "prices", "training", "judging")}
    _add_health(routers["health"], services, metrics)
    _add_models(routers["models"], services, pool)
    _add_prices(routers["prices"], services.predictions, pool)
    _add_training(routers["training"], services.training)
    _add_judging(routers["judging"], services, pool)
    for router in routers.values():
        api.include_router(router)
    api.outermost = _outermost(api, services, metrics)
    return api


def _outermost(api: FastAPI, services: Services, metrics: edge.Metrics) -> edge.Application:
    """Return the application from the outside in."""
    rate = edge.RateLimit(services.rules.rate_per_s, services.rules.rate_burst)
    # Not around the framework, which has an answer of its own to what nobody caught.
    api.add_middleware(edge.Guard, rules=services.rules, rate=rate)
    # What the guard answers carries cross-origin headers too.
    cors = CrossOrigin(
        partial(FastAPI.__call__, api),
        allow_origins=services.origins,
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"],
        expose_headers=["X-Request-ID", "Content-Disposition", "Retry-After"],
    )

    @lru_cache(maxsize=100)
    def cross_origin(origin: bytes) -> list[tuple[bytes, bytes]]:
        headers = MutableHeaders(cors.simple_headers if origin else {})
        if origin and cors.is_allowed_origin(origin.decode("latin-1")):
            cors.allow_explicit_origin(headers, origin.decode("latin-1"))
        else:
            headers["Vary"] = "Origin"
        return headers.raw

    ready = services.predictions.ready_answer
    shortcut = edge.Shortcut(cors, rules=services.rules, rate=rate, ready=ready, cross_origin=cross_origin)
    paths, stopping = lambda: api.openapi()["paths"], services.stopping
    return edge.Observer(shortcut, metrics=metrics, stopping=stopping, known_paths=paths)


def document_errors(schema: dict[str, Any]) -> dict[str, Any]:
    """Say in an OpenAPI document what every error looks like, and which ones there are."""
    problems = {edge.PROBLEM_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    _, posted = models_json_schema([(wire.BacktestRequest, "validation")], ref_template=REF)
    # As the framework writes its own: generated types would require a field of `"default": null`.
    schema["components"]["schemas"] |= jsonable_encoder(posted["$defs"], exclude_none=True)
    for path, item in schema["paths"].items():
        for method, operation in item.items():
            told = operation["responses"]
            for status in sorted({*ERRORS_OF_ALL, *ERRORS_OF[method], *([404] if "{" in path else ())}):
                told.setdefault(str(status), {"description": http.HTTPStatus(status).phrase})
            for status, response in told.items():
                if not status.startswith("2"):
                    response["content"] = problems
    return schema


@asynccontextmanager
async def _running(services: Services, pool: edge.WorkPool, api: FastAPI) -> AsyncIterator[None]:
    services.on_start()
    services.training.open()
    services.predictions.bars.start()
    api.state.ready = True
    yield
    api.state.ready = False
    services.predictions.bars.stop()
    pool.close()
    await asyncio.to_thread(services.training.close)
    await asyncio.to_thread(services.on_stop)


def _add_health(router: APIRouter, services: Services, metrics: edge.Metrics) -> None:
    @router.get("/", response_model=wire.Welcome)
    def welcome() -> Response:
        """Say what this is."""
        return answer(wire.Welcome(message="AI-Stocks: POST /api/predict, see /docs"))

    @router.get("/api/health", response_model=wire.StatusAnswer)
    async def health() -> Response:
        """Say that the service answers, and from which prices."""
        return answer(wire.StatusAnswer(status="ok", version=VERSION, source=services.source_name))

    @router.get("/api/health/live", response_model=wire.StatusAnswer)
    async def live() -> Response:
        """Say that the process runs."""
        return answer(wire.StatusAnswer(status="ok"))

    @router.get("/api/health/ready", response_model=wire.StatusAnswer)
    def ready(request: Request) -> Response:
        """Say whether requests are welcome: not before the start has ended, nor once it stops."""
        if services.stopping() or not request.app.state.ready:
            raise HTTPException(503, "the service is starting or stopping", {"Retry-After": "1"})
        return answer(wire.StatusAnswer(status="ok", models=len(services.registry.list())))

    # For people and machines beside the page: no part of the contract.
    @router.get("/metrics", include_in_schema=False)
    def figures() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/docs", include_in_schema=False)
    def docs(request: Request) -> Response:
        # Only who reads it pays for the template's library; nothing on the page comes from elsewhere.
        import jinja2  # noqa: PLC0415

        template = jinja2.Environment(autoescape=True).from_string(DOCS.read_text(encoding="utf-8"))
        said = template.render(api=request.app.openapi())
        return Response(said, headers={"Content-Security-Policy": DOCS_POLICY}, media_type="text/html")


def _unless_training(services: Services, model_id: str, change: Callable[[str], T]) -> T:
    # A job is known before its process holds the lock that the registry looks at.
    services.training.refuse_busy(services.registry.parse(model_id)[0])
    return change(model_id)


def _add_models(router: APIRouter, services: Services, pool: edge.WorkPool) -> None:
    registry = services.registry

    @router.get("/api/models", response_model=list[wire.ModelMeta])
    def models() -> Response:
        """List the saved models."""
        return answer(registry.list())

    @router.get("/api/models/{model_id}", response_model=wire.ModelMeta)
    def model(model_id: str) -> Response:
        """Describe one saved model."""
        return answer(registry.find(model_id))

    @router.delete("/api/models/{model_id}", response_model=wire.StatusAnswer)
    async def delete(model_id: str) -> Response:
        """Move a model to the trash, from where `restore` brings it back."""
        await pool.run(lambda: _unless_training(services, model_id, registry.delete))
        return answer(wire.StatusAnswer(status="deleted"))

    @router.post("/api/models/{model_id}/restore", response_model=wire.ModelMeta)
    async def restore(model_id: str) -> Response:
        """Undo the last deletion of a model."""
        return await pool.run(lambda: answer(registry.restore(model_id)))

    @router.post("/api/models/{model_id}/rollback", response_model=wire.ModelMeta)
    async def roll_back(model_id: str, to: VersionInQuery = None) -> Response:
        """Let the newest earlier version that loads serve again, or ``to``, which may be a newer one."""
        back = partial(registry.roll_back, to=to)
        return await pool.run(lambda: answer(_unless_training(services, model_id, back)))

    @router.get("/api/models/{model_id}/versions", response_model=list[wire.ModelVersion])
    async def versions(model_id: str) -> Response:
        """List the kept versions of a model, the newest first."""
        return await pool.run(lambda: answer(registry.versions(model_id)))

    @router.get(
        "/api/models/{model_id}/download",
        response_class=Response,
        responses={200: {"content": {"application/zip": {"schema": {"type": "string", "format": "binary"}}}}},
    )
    async def download(model_id: str) -> Response:
        """Return a zip of what the manifest of the serving version lists."""
        name, content = await pool.run(lambda: registry.archive(model_id))
        headers = {"Content-Disposition": f"attachment; filename={name}"}
        return Response(content, media_type="application/zip", headers=headers)


def _add_prices(router: APIRouter, predictions: PredictionService, pool: edge.WorkPool) -> None:
    @router.get("/api/historical/{symbol:text}", response_model=wire.HistoricalResponse)
    async def historical(symbol: SymbolInPath, days: Days = 90) -> Response:
        """Return the last sessions, adjusted for splits and dividends."""
        return await pool.run(lambda: answer(predictions.history(symbol, days)))

    @router.get("/api/realtime/{symbol:text}", response_model=wire.RealtimeQuote)
    async def realtime(symbol: SymbolInPath) -> Response:
        """Return the last closed session; it says from when it is, and whether a later one has closed."""
        return await pool.run(lambda: answer(predictions.quote(symbol)))

    @router.post(edge.PREDICT, response_model=wire.PredictionResult)
    async def predict(request: wire.PredictionRequest) -> Response:
        """Return history, positions and forecast of one symbol."""
        return answer(await pool.run(lambda: predictions.answer(request)))


def _add_training(router: APIRouter, training: TrainingService) -> None:
    @router.post("/api/training/start", response_model=wire.TrainingStarted)
    def start(params: wire.TrainingParams) -> Response:
        """Queue a training."""
        return answer(wire.TrainingStarted(job_id=training.start(params).id))

    @router.post("/api/models/train", status_code=501, response_model=wire.Problem)
    def train() -> None:
        """Not served; the detail names what to use instead."""
        raise HTTPException(501, "not served: use POST /api/training/start instead")

    @router.get("/api/training", response_model=list[wire.TrainingJob])
    def jobs() -> Response:
        """List the trainings, newest first."""
        return answer(training.list())

    @router.get("/api/training/{job_id}", response_model=wire.TrainingJob)
    def job(job_id: str) -> Response:
        """Describe one training."""
        return answer(training.get(job_id))

    @router.delete("/api/training/{job_id}", response_model=wire.StatusAnswer)
    def cancel(job_id: str) -> Response:
        """End a training that waits or runs; one that had ended before stays what it was."""
        return answer(wire.StatusAnswer(status=training.cancel(job_id).status))

    @router.get("/api/training/{job_id}/events", response_class=EventSourceResponse)
    @router.get("/api/jobs/{job_id}/events", response_class=EventSourceResponse)
    def events(job_id: str, last_event_id: Annotated[str, Header()] = "0") -> Response:
        """Stream what a training has told and tells, each a `TrainingEvent`, to its end."""
        training.get(job_id)
        known = int(last_event_id) if re.fullmatch(r"[0-9]{1,9}", last_event_id) else 0
        leaving = anyio.Event()
        told = training.follow(job_id, known, leaving.is_set)
        # The heartbeat is an event of the contract; comments would come beside it.
        return EventStream(told, ping=0, shutdown_event=leaving, shutdown_grace_period=STREAM_END_S)


def _add_judging(router: APIRouter, services: Services, pool: edge.WorkPool) -> None:
    schema = {"$ref": REF.format(model="BacktestRequest")}
    whole = {"requestBody": {"content": {"application/json": {"schema": schema}}, "required": True}}

    async def judged(request: Request, judge: Callable[[wire.BacktestRequest], wire.Wire]) -> Response:
        """Read the body in the pool: a whole prediction takes too long for the thread of all requests."""
        try:
            body = await request.body()
        except ClientDisconnect as error:
            raise HTTPException(400, "the body was cut off") from error

        def judge_body() -> Response:
            try:
                asked = wire.BacktestRequest.model_validate_json(body)
            except ValidationError as error:
                raise RequestValidationError(error.errors(include_url=False)) from error
            return answer(judge(asked))

        return await pool.run(judge_body)

    @router.post("/api/backtest", response_model=wire.BacktestResult, openapi_extra=whole)
    async def backtest(request: Request) -> Response:
        """Book the positions of a prediction, and set them beside buy and hold."""
        return await judged(request, posted_backtest)

    @router.post("/api/forward_sim", response_model=wire.ForwardSimResult, openapi_extra=whole)
    async def forward_sim(request: Request) -> Response:
        """Book the last positions of a prediction."""
        return await judged(request, posted_forward_sim)

    @router.get("/api/track-record/{symbol:text}", response_model=wire.TrackRecord)
    async def track_record(symbol: SymbolInPath, limit: Days = 250) -> Response:
        """Return served forecasts and what became of them."""
        return await pool.run(lambda: answer(services.track_record(symbol, limit)))


def answer(said: bytes | wire.Wire | Sequence[wire.Wire]) -> Response:
    """Return JSON: ready-made, a model's own, or a list; the framework's encoder takes far longer."""
    if isinstance(said, wire.Wire):
        said = said.wire_bytes()
    elif not isinstance(said, bytes):
        said = b"[%s]" % b",".join(model.wire_bytes() for model in said)
    return Response(said, media_type="application/json")


def problem(scope: Scope, status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    """Return an error as the page reads it."""
    return Response(edge.problem_bytes(scope, status, detail), status, headers, edge.PROBLEM_TYPE)


def _on_our_error(request: Request, error: AIStocksError) -> Response:
    kind = next(cls for cls in type(error).__mro__ if cls in STATUS_OF)
    status, wait_s = STATUS_OF[kind], RETRY_AFTER_S.get(kind)
    if status == 500:
        return problem(request.scope, 500, edge.unexpected_detail(request.scope, error))
    logger.info("%s %s: %s", status, request.url.path.encode("unicode_escape").decode(), error)
    source = request.app.state.source
    said = re.sub(TRAINING, lambda found: _training(found[1], source), without_paths(str(error)))
    return problem(request.scope, status, said, {"Retry-After": str(wait_s)} if wait_s else None)


def _training(command: str, source: str) -> str:
    """Complete a command that trains by the source that is served, or by one that may have the symbol."""
    if source != SampleSource.name or command.split()[3] in {"SYMBOL", *SampleSource.SYMBOLS}:
        return f"{command} --source {source}`"
    known = ", ".join(SampleSource.SYMBOLS)
    return f"{command} --source yahoo` and serve that source: sample has {known} alone"


def _on_http_error(request: Request, error: StarletteHTTPException) -> Response:
    status, detail, path = error.status_code, str(error.detail), request.scope["path"]
    if detail == http.HTTPStatus(status).phrase:
        ours = {404: "no such route: see /docs", 405: f"{request.method} is not served here: see /docs"}
        detail = ours.get(status, detail)
    items = request.app.openapi()["paths"].items() if status == 405 else ()
    fits = [item for known, item in items if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", known), path)]
    # All of the path, and not those of the one route that the framework met first.
    allowed = ", ".join(sorted({method.upper() for item in fits for method in item}))
    return problem(request.scope, status, detail, {"Allow": allowed} if allowed else error.headers)


def _on_invalid(request: Request, error: RequestValidationError) -> Response:
    wrong = error.errors()
    if any(one["type"] == "json_invalid" for one in wrong):
        return problem(request.scope, 400, "the body is not valid JSON")
    said = [_sentence(one) for one in wrong[:ERRORS_IN_DETAIL]]
    said += [f"and {len(wrong) - ERRORS_IN_DETAIL} more"] * (len(wrong) > ERRORS_IN_DETAIL)
    return problem(request.scope, 422, "; ".join(said))


def _sentence(error: Mapping[str, Any]) -> str:
    """Say where, what, and which number came; other values may be endless, or not even JSON."""
    where = ".".join(str(part) for part in error["loc"] if part not in {"body", "query", "path"})[:80]
    message = str(error["msg"]).removeprefix("Value error, ")
    came = error.get("input")
    if not where and (isinstance(came, bytes) or error["type"] == "missing"):
        return "send JSON with Content-Type: application/json"
    got = f" (got {came})" if is_finite_number(came) and abs(came) < 1e15 else ""
    return f"{where}: {message}{got}" if where else f"{message}{got}"
