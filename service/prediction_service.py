"""From a request to the answer that the page draws: model, bars, `decide`, and the tail of its decisions.

Nothing is decided here. Positions, forecasts and bands are those of `inference.pipeline.decide`, so a chart
shows what a backtest books. Smoothing, floors and thresholds change what is drawn, never a position.
"""

import logging
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from pydantic import ValidationError

from data.cache_manager import BarCache
from data.data_fetcher import BarSource, FileSource, Held, fetch_stock_data
from data.schema import bars_hash, calendar_for, check_enough, normalise_symbol
from evaluation.metrics import Z_90
from inference.pipeline import Decisions, decide, path_ahead
from inference.position_sizing import make_sizer
from service import prediction_chart as page
from service import schemas as wire
from service.ledger import ServedForecast
from service.model_registry import ModelRegistry, ServedModel
from service.schemas import PredictionRequest, PredictionResult
from utils.base import AIStocksError, DataError, StorageError, UpstreamError, UsageError
from utils.model_paths import GBM, PARTS, mode_of

logger = logging.getLogger(__name__)

# How often files are looked at for a change; and when a live source that failed or has not got the last
# session is asked again: twice as late each time, and each time between half and one and a half of it.
LOOK_AGAIN, RETRY, LONGEST_RETRY = timedelta(seconds=5), timedelta(seconds=30), timedelta(minutes=15)
MOST_HELD, SERVED_LATELY, REFRESH_EVERY_S = 256, timedelta(days=5), 20.0
NEVER = datetime.min.replace(tzinfo=UTC)
# Answers in memory (120 sessions take 45 KB), and decisions over whole histories (3 MB each).
MOST_ANSWER_BYTES, MOST_DECISIONS = 128 << 20, 8
# Of forecasts that cannot be written down: when to try again, how many may wait, and how often to try at the
# end of the service, when there is no later.
PAUSE_S, MAX_PENDING, MAX_KNOWN, LAST_TRIES, LAST_PAUSE_S = 5.0, 10_000, 10_000, 6, 0.25

K = TypeVar("K")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """What was asked for lately, bounded by the sum of weights; safe for many threads."""

    def __init__(self, most: int) -> None:
        self._most, self._total, self._lock = most, 0, threading.Lock()
        self._kept: OrderedDict[K, tuple[V, int]] = OrderedDict()

    def get(self, key: K) -> V | None:
        """Return what is kept, None if nothing is."""
        with self._lock:
            if (found := self._kept.get(key)) is None:
                return None
            self._kept.move_to_end(key)
            return found[0]

    def put(self, key: K, value: V, weight: int = 1) -> None:
        """Keep a value, in the place of those that nobody asked for for the longest time."""
        with self._lock:
            self._total += weight - self._kept.pop(key, (value, 0))[1]
            self._kept[key] = (value, weight)
            while self._total > self._most:
                self._total -= self._kept.popitem(last=False)[1][1]


class ReadyAnswer(NamedTuple):
    """The bytes of an answer, whose they are, and the model's version and the bars that they came from."""

    symbol: str
    kind: str
    made_from: tuple[object, ...]
    body: bytes


def hold_bars(
    symbol: str, *, source: BarSource, cache: BarCache | None, now: datetime, before: Held | None
) -> Held:
    """Fetch bars to be kept in memory; where that fails, those from before, if any, marked stale."""
    try:
        revision = source.revision(symbol) if isinstance(source, FileSource) else None
        if before is not None and revision is not None and before.revision == revision:
            held = before.at(now)
        else:
            bars = fetch_stock_data(symbol, source=source, cache=cache, now=now)
            content = (bars_hash(bars.frame), bars.provenance.stale)
            held = Held(bars=bars, content=content, due=now, revision=revision)
    except (UpstreamError, DataError) as error:
        if before is None:
            raise
        held = replace(before.at(now, failed=True), revision=None)
        last = held.bars.provenance.last_session
        logger.warning("%s: serving on with bars up to %s: %s", symbol, last, error)
    tries = before.tries + 1 if before is not None and held.content[1] else 0
    due = calendar_for(symbol).next_close(now)
    if not source.is_live:
        due = min(due, now + LOOK_AGAIN)
    elif held.content[1]:
        wait = min(RETRY * 2 ** min(tries, 16), LONGEST_RETRY)
        due = min(due, now + wait * random.uniform(0.5, 1.5))  # noqa: S311 - spreads requests, keeps no secret
    return replace(held, due=due, tries=tries)


class BarKeeper:
    """Bars of the symbols that are served, in memory: fetched once per session, old ones rather than none.

    Who finds them due asks the source; who comes meanwhile gets the older ones at once, marked stale where a
    session has closed since: a slow source holds up one request and no more. The clock tells UTC.
    """

    def __init__(
        self,
        source: BarSource,
        cache: BarCache | None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._source, self._cache, self._clock = source, cache, clock
        self._held: dict[str, Held] = {}
        self._asked: dict[str, datetime] = {}
        self._flights: dict[str, threading.Lock] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="refresh-bars", daemon=True)

    def ready(self, symbol: str) -> Held | None:
        """Return what is in memory unless it is due; asks nobody and never waits."""
        held, now = self._held.get(symbol), self._clock()
        if held is None or now >= held.due:
            return None
        self._asked[symbol] = now
        return held

    def get(self, symbol: str) -> Held:
        """Return the bars of a normalised symbol; raises as `hold_bars` where there are none at all."""
        held = self.ready(symbol) or self._refreshed(symbol)
        self._asked[symbol] = self._clock()
        while len(self._held) > MOST_HELD:
            oldest = min(list(self._held), key=lambda name: self._asked.get(name, NEVER))
            for kept in (self._asked, self._held, self._flights):
                kept.pop(oldest, None)
        return held

    def _refreshed(self, symbol: str) -> Held:
        before, flight = self._held.get(symbol), self._flights.setdefault(symbol, threading.Lock())
        if not flight.acquire(blocking=before is None):
            return before.at(self._clock()) if before is not None else self._refreshed(symbol)
        try:
            before, now = self._held.get(symbol), self._clock()
            if before is None or now >= before.due:
                before = hold_bars(symbol, source=self._source, cache=self._cache, now=now, before=before)
                self._held[symbol] = before
            return before
        finally:
            flight.release()
            if symbol not in self._held:
                self._flights.pop(symbol, None)

    def refresh_due(self) -> None:
        """Ask again for the bars that are due of every symbol that was served lately."""
        for symbol, asked in list(self._asked.items()):
            held, now = self._held.get(symbol), self._clock()
            if held is not None and now >= held.due and now - asked < SERVED_LATELY:
                with suppress(AIStocksError):
                    self._refreshed(symbol)

    def start(self) -> None:
        """Refresh in the background, where the source is live, until `stop`."""
        if self._source.is_live:
            self._thread.start()

    def _run(self) -> None:
        while not self._stopping.wait(REFRESH_EVERY_S):
            try:
                self.refresh_due()
            except Exception:
                logger.exception("refreshing prices failed, and goes on")

    def stop(self) -> None:
        """End the refreshing; a fetch under way is not waited for."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=1.0)


class Outbox:
    """Served forecasts on their way to ``record``, which keeps each with its moment; thread-safe."""

    def __init__(self, record: Callable[[ServedForecast, datetime], object]) -> None:
        self._record = record
        self._lock = threading.RLock()
        self._pending: dict[str, tuple[ServedForecast, datetime]] = {}
        self._known: Recent[str, bool] = Recent(MAX_KNOWN)
        self._retry: threading.Timer | None = None

    def keep(self, forecast: ServedForecast) -> None:
        """Record a forecast, at once or, where that fails, every few seconds until `close`; never raises."""
        digest, now = forecast.digest, datetime.now(UTC)
        with self._lock:
            if self._known.get(digest):
                return
            self._pending.setdefault(digest, (forecast, now))
            if self._retry is None:
                self._write_pending()
            if len(self._pending) > MAX_PENDING:
                self._lose(next(iter(self._pending)))

    def close(self) -> None:
        """Write what still waits, within a few seconds; what cannot be written is told to the log."""
        for left in reversed(range(LAST_TRIES)):
            self._write_pending(is_last=True)
            time.sleep(LAST_PAUSE_S if left and self._pending else 0.0)
        with self._lock:
            for digest in list(self._pending):
                self._lose(digest)

    def _lose(self, digest: str) -> None:
        forecast, served_at = self._pending.pop(digest)
        logger.error("lost a served forecast of %s: %s", served_at.isoformat(), forecast.model_dump())

    def _write_pending(self, *, is_last: bool = False) -> None:
        with self._lock:
            if self._retry is not None:
                self._retry.cancel()
                self._retry = None
            try:
                for digest, (forecast, served_at) in list(self._pending.items()):
                    self._record(forecast, served_at)
                    del self._pending[digest]
                    self._known.put(digest, value=True)
            except StorageError as error:
                logger.warning("%s; %d served forecasts wait in memory", error, len(self._pending))
                if not is_last:
                    self._retry = threading.Timer(PAUSE_S, self._write_pending)
                    self._retry.daemon = True
                    self._retry.start()


class PredictionService:
    """Answers what the page asks about one symbol; ``on_served`` is told of a forecast before it goes out."""

    def __init__(
        self,
        *,
        registry: ModelRegistry,
        source: BarSource,
        cache: BarCache | None,
        on_served: Callable[[ServedForecast], None] | None = None,
    ) -> None:
        self._on_served = on_served
        self._registry = registry
        self.bars = BarKeeper(source, cache)
        # By what was asked, and by what was sent: nothing needs to be read to find those.
        self._answers: Recent[PredictionRequest | bytes, ReadyAnswer] = Recent(MOST_ANSWER_BYTES)
        self._decisions: Recent[tuple[object, ...], Decisions] = Recent(MOST_DECISIONS)
        self._drawing: dict[str, threading.Lock] = {}

    def history(self, symbol: str, days: int) -> wire.HistoricalResponse:
        """Return the last ``days`` sessions, adjusted; raises as `data.data_fetcher.fetch_stock_data`."""
        bars = self.bars.get(normalise_symbol(symbol)).bars
        return wire.HistoricalResponse(
            symbol=bars.symbol,
            data=page.records(wire.HistoricalBar, bars.frame.tail(days).round({"Volume": 0})),
            data_as_of=f"{bars.provenance.last_session:%Y-%m-%d}",
            data_stale=bars.provenance.stale,
            data_source=bars.provenance.source,
        )

    def quote(self, symbol: str) -> wire.RealtimeQuote:
        """Return the last closed session in the shape of a quote; raises as `history`."""
        told = self.history(symbol, 2)
        check_enough(told.data, 2, "a quote")
        before, last = told.data
        return wire.RealtimeQuote(
            **told.model_dump(exclude={"data"}),
            current_price=last.close,
            previous_close=before.close,
            open=last.open,
            day_high=last.high,
            day_low=last.low,
            volume=last.volume,
        )

    def ready_answer(self, body: bytes) -> bytes | None:
        """Return the answer given before to a request, which comes as the bytes of its JSON; never waits.

        None where there is none, or model or bars have changed, or the bytes are no request.
        """
        ready = self._current(body)
        if ready is None:
            with suppress(ValidationError):
                ready = self._current(PredictionRequest.model_validate_json(body))
            if ready is not None:
                self._answers.put(body, ready, len(body) + len(ready.body))
        return ready.body if ready is not None else None

    def _current(self, key: PredictionRequest | bytes) -> ReadyAnswer | None:
        if (ready := self._answers.get(key)) is not None:
            model, held = self._registry.current(ready.symbol, ready.kind), self.bars.ready(ready.symbol)
            if model is not None and held is not None and ready.made_from == _made_from(model, held):
                return ready
        return None

    def answer(self, request: PredictionRequest) -> bytes:
        """Return history, decisions and forecast as they are sent, kept for who asks the same again.

        Raises `UsageError` for what is not served, and as `ModelRegistry.get` and `history`.
        """
        symbol, model_id = normalise_symbol(request.symbol), request.model_id
        if request.data_interval not in {None, "1d"}:
            raise UsageError(f"dataInterval {request.data_interval!a} is not served: leave it out or send 1d")
        kind = kind_wanted(request, symbol)
        # The model first, so that no price is asked for in vain.
        model = self._registry.get(symbol, kind)
        if model_id and model_id != model.meta.id:
            other = self._registry.find(model_id)
            if other.symbol != symbol:
                raise UsageError(f"modelId {other.id} is a model of {other.symbol}, and symbol is {symbol}")
        held = self.bars.get(symbol)
        made_from = _made_from(model, held)
        # Of many who ask the same at once, one computes and the others find it ready.
        with self._drawing.setdefault(symbol, threading.Lock()):
            ready = self._answers.get(request)
            if ready is None or ready.made_from != made_from:
                body = self._predicted(request, model, held).wire_bytes()
                ready = ReadyAnswer(symbol=symbol, kind=kind, made_from=made_from, body=body)
                self._answers.put(request, ready, len(body))
            return ready.body

    def _predicted(self, request: PredictionRequest, model: ServedModel, held: Held) -> PredictionResult:
        bars, sizer = held.bars, make_sizer(max_long=request.max_long, max_short=request.max_short)
        # Decided once for all that is drawn of the same model, bars and limits.
        key = (bars.symbol, *_made_from(model, held), sizer.config_id)
        if (decisions := self._decisions.get(key)) is None:
            decisions = decide(bars.symbol, bars.frame, model.forecaster, sizer)
            self._decisions.put(key, decisions)
        request = request.model_copy(update={name: getattr(sizer.rules, name) for name in page.LIMITS})
        chart = page.chart_of(decisions, request)
        ahead = calendar_for(bars.symbol).next_sessions(bars.frame.index[-1], request.horizon)
        path, column = path_ahead(decisions, ahead), chart.columns
        forecast, reasons = page.forecast_of(chart, path), page.reasons_of(model, bars.frame, chart)
        result = PredictionResult(
            symbol=bars.symbol,
            dates=chart.dates,
            prices=column["close"].tolist(),
            actual_returns=column["asset_return"].tolist(),
            predicted_prices=(column["close"] * np.exp(column["shown_log"])).tolist(),
            predicted_returns=np.expm1(column["shown_log"]).tolist(),
            fused_positions=column["target_weight"].tolist(),
            classifier_probabilities=page.classes_of(chart),
            trade_markers=page.markers_of(chart, forecast, request, reasons),
            overlays=page.overlays_of(bars.frame, chart, path),
            candles=page.records(wire.Candle, bars.frame.tail(len(chart.dates))),
            forecast=forecast,
            metadata=page.metadata_of(request, model, bars, decisions, chart),
        )
        if self._on_served is not None:
            self._on_served(served_forecast(result))
        return result


def served_forecast(answer: wire.PredictionResult) -> ServedForecast:
    """Return what a prediction says about its last session; raises `DataError` if it has no bands."""
    ahead, meta = answer.forecast, answer.metadata
    if ahead is None or not ahead.dates or not ahead.lower_band or not ahead.upper_band:
        raise DataError(f"the prediction of {answer.symbol} has no forecast with bands to keep")
    close, lower, upper = answer.prices[-1], ahead.lower_band[-1], ahead.upper_band[-1]
    # No database tells -0.0 from 0.0, and the hash must be that of what comes back.
    return ServedForecast(
        symbol=answer.symbol,
        source=meta.data_source or "unknown",
        model_id=meta.model_id,
        model_version=meta.model_version or meta.model_id,
        as_of=answer.dates[-1],
        target_session=ahead.dates[-1],
        horizon_bars=len(ahead.dates),
        close=close,
        forecast_return=ahead.returns[-1] + 0.0,
        lower_return=lower / close - 1.0 + 0.0,
        upper_return=upper / close - 1.0 + 0.0,
        sigma_log=float(np.log(upper / lower)) / (2.0 * Z_90) + 0.0,
        position=ahead.positions[0] + 0.0,
    )


def kind_wanted(request: PredictionRequest, symbol: str) -> str:
    """Return the kind of model asked for: by its id, and where that is the boosters', by the fusion mode."""
    by_id = {f"{symbol}-{kind}": kind for kind in page.MODE_OF if kind != GBM.name}
    return by_id.get(request.model_id or "", PARTS[mode_of(request.fusion.mode)][-1].name)


def _made_from(model: ServedModel, held: Held) -> tuple[object, ...]:
    return (model.place, model.made_from, *held.content)
