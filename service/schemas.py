"""The wire contract in Python: predictions, prices and errors (`service.work_schemas` has the rest).

``types/ai.ts`` states the same in TypeScript, and a test holds the two together. A field whose default is
None may be absent on the wire; it is never sent as null. Every other default belongs to a request and is
written here once. Numbers are finite in both directions, since one NaN kills the page's chart.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator
from pydantic.alias_generators import to_camel

MAX_HORIZON_BARS = 252
MAX_CHART_BARS = 20_000
MIN_CHART_BARS = 30

FusionMode = Literal["gbm_only", "lstm_only", "ensemble", "classifier", "weighted", "hybrid", "regressor"]
Smoothing = Literal["none", "ema", "moving-average"]
VerdictLabel = Literal["edge", "no-edge", "insufficient"]
ForecastActionName = Literal["BUY", "SELL", "SHORT", "COVER", "HOLD"]
MarkerType = Literal["buy", "sell", "hold"]
MarkerSegment = Literal["history", "forecast"]
MarkerScope = Literal["prediction", "backtest"]
OverlayType = Literal["bollinger", "moving-average", "predicted-path", "volume"]


def _refuse_lookalikes(value: object) -> object:
    """Refuse ``true`` and ``"5"``, which pydantic would read as integers."""
    if isinstance(value, bool | str):
        raise ValueError("Input should be a valid integer")  # noqa: TRY004  pydantic turns only ValueError into 422
    return value


# `Number` and `Whole` are what a request may carry; answers are built from checked values.
Number = Annotated[float, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]
Whole = Annotated[int, BeforeValidator(_refuse_lookalikes)]
Symbol = Annotated[str, Field(min_length=1, max_length=64)]
ShortText = Annotated[str, Field(max_length=64)]
WireDate = Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Weight = Annotated[Number, Field(ge=0, le=10)]


class Wire(BaseModel):
    """What crosses the wire: camelCase names, finite numbers, unknown fields ignored."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        allow_inf_nan=False,
        frozen=True,
        # `modelId` and its like are words of the contract.
        protected_namespaces=(),
    )

    def wire_bytes(self) -> bytes:
        """Return the JSON that is sent: absent instead of null."""
        return self.model_dump_json(by_alias=True, exclude_none=True).encode()


class ConfidenceFloors(Wire):
    """Confidence below which a marker is not worth showing."""

    buy: Fraction = 0.3
    sell: Fraction = 0.45


class RegimeFilters(Wire):
    """In which market regimes positions are wanted."""

    bull: Flag = True
    bear: Flag = True


class FusionSettings(Wire):
    """How the models' opinions become one."""

    mode: FusionMode = "gbm_only"
    regressor_scale: Annotated[Number, Field(ge=0, le=10_000)] = 15.0
    buy_threshold: Fraction = 0.3
    sell_threshold: Fraction = 0.45
    regime_filters: RegimeFilters = RegimeFilters()


class PredictionParams(Wire):
    """What to predict and how to draw it."""

    symbol: Symbol
    model_id: ShortText | None = None
    horizon: Annotated[Whole, Field(ge=1, le=MAX_HORIZON_BARS)] = 5
    days_on_chart: Annotated[Whole, Field(ge=1, le=MAX_CHART_BARS)] = 120
    smoothing: Smoothing = "none"
    confidence_floors: ConfidenceFloors = ConfidenceFloors()
    trade_share_floor: Annotated[Number, Field(ge=0)] | None = None
    model_variant: ShortText | None = None
    data_interval: ShortText | None = None
    data_period: ShortText | None = None
    max_long: Weight | None = None
    max_short: Weight | None = None

    @field_validator("days_on_chart")
    @classmethod
    def _raise_to_minimum(cls, value: int) -> int:
        return max(value, MIN_CHART_BARS)


class PredictionRequest(PredictionParams):
    """Body of POST /api/predict."""

    fusion: FusionSettings = FusionSettings()


class ClassProbabilities(Wire):
    """Calibrated probabilities that sum to one."""

    buy: float
    sell: float
    hold: float


class TradeMarker(Wire):
    """A mark on the chart; `shares` is negative when sold."""

    date: WireDate
    price: float
    type: MarkerType
    shares: float
    confidence: float
    segment: MarkerSegment | None = None
    scope: MarkerScope | None = None
    explanation: str | None = None


class OverlayPoint(Wire):
    """One point of a line over the chart."""

    date: WireDate
    value: float


class OverlaySeries(Wire):
    """A line over the chart; `upper` and `lower` are as long as `points`."""

    type: OverlayType
    points: list[OverlayPoint]
    upper: list[float] | None = None
    lower: list[float] | None = None


class Candle(Wire):
    """One session's prices, adjusted for splits and dividends."""

    date: WireDate
    open: float
    high: float
    low: float
    close: float
    volume: float | None = None


class ForecastAction(Wire):
    """What to do in one coming session."""

    date: WireDate
    action: ForecastActionName
    price: float
    target_position: float


class Forecast(Wire):
    """The sessions to come; all arrays are equally long."""

    dates: list[WireDate]
    prices: list[float]
    returns: list[float]
    positions: list[float]
    lower_band: list[float] | None = None
    upper_band: list[float] | None = None
    actions: list[ForecastAction] | None = None


class PredictionMetadata(Wire):
    """What was asked, what answered, and how far it may be believed."""

    model_id: str
    fusion_mode: FusionMode
    buy_threshold: float
    sell_threshold: float
    horizon: int
    trade_share_floor: float | None = None
    model_quality_gate_passed: bool | None = None
    model_quality_score: float | None = None
    model_quality_reasons: list[str] | None = None
    holdout_metric_source: str | None = None
    holdout_pred_target_std_ratio: float | None = None
    feature_profile: str | None = None
    feature_selection_mode: str | None = None
    target_horizon_days: int | None = None
    execution_mode: str | None = None
    max_long: float | None = None
    max_short: float | None = None
    model_variant: str | None = None
    data_interval: str | None = None
    data_period: str | None = None
    is_intraday: bool | None = None
    annualization_factor: float | None = None
    smoothing: Smoothing | None = None
    confidence_floors: ConfidenceFloors | None = None
    out_of_sample_from: WireDate | None = None
    trained_through: WireDate | None = None
    data_as_of: WireDate | None = None
    data_stale: bool | None = None
    data_source: str | None = None
    verdict: VerdictLabel | None = None
    evidence: dict[str, float] | None = None
    model_version: str | None = None
    notes: list[str] | None = None


class PredictionResult(Wire):
    """Answer of POST /api/predict; see ``types/ai.ts`` for the meaning of each array."""

    symbol: str
    dates: list[WireDate]
    prices: list[float]
    actual_returns: list[float] | None = None
    predicted_prices: list[float]
    predicted_returns: list[float]
    fused_positions: list[float]
    classifier_probabilities: list[ClassProbabilities]
    trade_markers: list[TradeMarker]
    overlays: list[OverlaySeries]
    candles: list[Candle] | None = None
    forecast: Forecast | None = None
    metadata: PredictionMetadata


class HistoricalBar(Wire):
    """One session; the volume is whole."""

    date: WireDate
    open: float
    high: float
    low: float
    close: float
    volume: int


class HistoricalResponse(Wire):
    """Answer of GET /api/historical/{symbol}."""

    symbol: str
    data: list[HistoricalBar]
    data_as_of: WireDate | None = None
    data_stale: bool | None = None
    data_source: str | None = None


class RealtimeQuote(Wire):
    """Answer of GET /api/realtime/{symbol}, in the contract's own snake case."""

    model_config = ConfigDict(alias_generator=None)

    symbol: str
    current_price: float
    previous_close: float
    open: float
    day_high: float
    day_low: float
    volume: int


class Welcome(Wire):
    """Answer of GET /."""

    message: str


class StatusAnswer(Wire):
    """Answer of the health routes, and of DELETE."""

    status: str
    version: str | None = None
    models: int | None = None
    source: str | None = None


class Problem(Wire):
    """Every error (RFC 9457), in the RFC's snake case."""

    model_config = ConfigDict(alias_generator=None)

    type: str
    title: str
    status: int
    detail: str
    instance: str
    request_id: str
