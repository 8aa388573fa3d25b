"""The wire contract in Python.

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
MarkerSegment = Literal["history", "forecast"]


def _refuse_lookalikes(value: object) -> object:
    """Refuse ``true`` and ``"5"``, which pydantic would read as integers."""
    if isinstance(value, bool | str):
        raise ValueError("Input should be a valid integer")  # noqa: TRY004  pydantic turns only ValueError into 422
    return value


# `Number` and `int` with `WHOLE` are what a request may carry; answers are built from checked values.
Number = Annotated[float, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]
# After the limits, which would else be missing from the JSON schema.
WHOLE = BeforeValidator(_refuse_lookalikes)
# Said here, checked where symbols are read: there the refusal has examples.
SYMBOL_PATTERN = r"^ *\^?[A-Za-z0-9][A-Za-z0-9.=-]{0,14} *$"
Symbol = Annotated[str, Field(min_length=1, max_length=64, json_schema_extra={"pattern": SYMBOL_PATTERN})]
ShortText = Annotated[str, Field(max_length=64)]
Interval = Annotated[str, Field(max_length=64, json_schema_extra={"pattern": "^1d$"})]
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


class Dated(Wire):
    """What belongs to one session."""

    date: WireDate


class Windowed(Wire):
    """What was booked over a window, and what must be known beside it."""

    window_start: WireDate | None = None
    window_end: WireDate | None = None
    notes: list[str] | None = None


class Described(Wire):
    """What a model says of itself wherever it is named."""

    model_variant: str | None = None
    data_interval: str | None = None
    data_period: str | None = None
    target_horizon_days: int | None = None
    model_version: str | None = None
    trained_through: WireDate | None = None
    out_of_sample_from: WireDate | None = None
    data_source: str | None = None
    verdict: VerdictLabel | None = None


class ConfidenceFloors(Wire):
    """Confidence below which a marker is not worth showing."""

    buy: Fraction = 0.3
    sell: Fraction = 0.45


class RegimeFilters(Wire):
    bull: Flag = True
    bear: Flag = True


class FusionSettings(Wire):
    mode: FusionMode = "gbm_only"
    regressor_scale: Annotated[Number, Field(ge=0, le=10_000)] = 15.0
    buy_threshold: Fraction = 0.3
    sell_threshold: Fraction = 0.45
    regime_filters: RegimeFilters = RegimeFilters()


class PredictionParams(Wire):
    """What to predict and how to draw it."""

    symbol: Symbol
    model_id: ShortText | None = None
    horizon: Annotated[int, Field(ge=1, le=MAX_HORIZON_BARS), WHOLE] = 5
    days_on_chart: Annotated[int, Field(ge=1, le=MAX_CHART_BARS), WHOLE] = 120
    smoothing: Smoothing = "none"
    confidence_floors: ConfidenceFloors = ConfidenceFloors()
    trade_share_floor: Annotated[Number, Field(ge=0)] | None = None
    model_variant: ShortText | None = None
    data_interval: Interval | None = None
    data_period: ShortText | None = None
    max_long: Weight | None = None
    max_short: Weight | None = None

    @field_validator("days_on_chart")
    @classmethod
    def _raise_to_minimum(cls, value: int) -> int:
        return max(value, MIN_CHART_BARS)


class PredictionRequest(PredictionParams):
    fusion: FusionSettings = FusionSettings()


class ClassProbabilities(Wire):
    """Calibrated probabilities that sum to one."""

    buy: float
    sell: float
    hold: float


class TradeMarker(Dated):
    """A mark on the chart; `shares` is negative when sold."""

    price: float
    type: Literal["buy", "sell", "hold"]
    shares: float
    confidence: float
    segment: MarkerSegment | None = None
    scope: Literal["prediction", "backtest"] | None = None
    explanation: str | None = None


class OverlayPoint(Dated):
    value: float


class OverlaySeries(Wire):
    type: Literal["bollinger", "moving-average", "predicted-path", "volume"]
    points: list[OverlayPoint]
    upper: list[float] | None = None
    lower: list[float] | None = None


class Candle(Dated):
    """One session's prices, adjusted for splits and dividends."""

    open: float
    high: float
    low: float
    close: float
    volume: float | None = None


class ForecastAction(Dated):
    action: ForecastActionName
    price: float
    target_position: float


class Forecast(Wire):
    dates: list[WireDate]
    prices: list[float]
    returns: list[float]
    positions: list[float]
    lower_band: list[float] | None = None
    upper_band: list[float] | None = None
    actions: list[ForecastAction] | None = None


class PredictionMetadata(Described):
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
    execution_mode: str | None = None
    max_long: float | None = None
    max_short: float | None = None
    is_intraday: bool | None = None
    annualization_factor: float | None = None
    smoothing: Smoothing | None = None
    confidence_floors: ConfidenceFloors | None = None
    data_as_of: WireDate | None = None
    data_stale: bool | None = None
    evidence: dict[str, float] | None = None
    model_age_sessions: int | None = None
    model_is_old: bool | None = None
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


class HistoricalBar(Candle):
    """One session; the volume is whole."""

    volume: int


class HistoricalResponse(Wire):
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
    data_as_of: WireDate | None = None
    data_stale: bool | None = None
    data_source: str | None = None


class Welcome(Wire):
    message: str


class StatusAnswer(Wire):
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


Loss = Literal["huber", "mae", "balanced", "quantile"]
ModelType = Literal["gbm", "lstm", "ensemble", "lstm_transformer", "stacking"]
JobStatus = Literal["queued", "running", "completed", "failed", "cancelled"]


class BacktestParams(Wire):
    """How to backtest; `commission` and `slippage` are fractions below 0.05, basis points from there on."""

    backtest_window: Annotated[int, Field(ge=10, le=MAX_CHART_BARS), WHOLE] = 60
    initial_capital: Annotated[Number, Field(ge=1, le=1e12)] = 10_000.0
    max_long: Weight = 1.8
    max_short: Weight = 0.2
    commission: Annotated[Number, Field(ge=0, le=500)] = 0.0005
    slippage: Annotated[Number, Field(ge=0, le=500)] = 0.0003
    enable_forward_sim: Flag = False
    short_cap: Weight | None = None
    forward_window: Annotated[int, Field(ge=2, le=MAX_CHART_BARS), WHOLE] | None = None
    commission_bps: Annotated[Number, Field(ge=0, le=500)] | None = None
    slippage_bps: Annotated[Number, Field(ge=0, le=500)] | None = None
    min_position_change: Fraction | None = None
    annualization_factor: Annotated[Number, Field(gt=0)] | None = None
    data_interval: ShortText | None = None
    flat_at_day_end: Flag | None = None
    day_end_flatten_fraction: Fraction | None = None


class BacktestRequest(Wire):
    """Body of POST /api/backtest and POST /api/forward_sim; the prediction is untrusted."""

    prediction: PredictionResult
    params: BacktestParams = BacktestParams()


class EquityPoint(Dated):
    equity: float
    drawdown: float


class PricePoint(Dated):
    price: float


class BuyHoldPoint(Dated):
    equity: float


class TradeExplanation(Wire):
    classifier_prob: float
    regressor_return: float
    fusion_mode: str
    notes: str | None = None


class TradeRecord(Wire):
    id: str
    date: WireDate
    action: str
    price: float
    shares: float
    position: float
    pnl: float
    cumulative_pnl: float
    commission: float | None = None
    slippage: float | None = None
    explanation: TradeExplanation | None = None


class BacktestMetrics(Wire):
    """The eight that the page always draws, and what goes along."""

    cumulative_return: float
    sharpe_ratio: float
    max_drawdown: Annotated[float, Field(le=0)]
    win_rate: float
    average_trade_profit: float
    total_trades: int
    directional_accuracy: float
    correlation: float
    smape: float | None = None
    rmse: float | None = None
    cumulative_return_pct: float | None = None
    buy_hold_return_pct: float | None = None
    excess_return_pct: float | None = None
    sortino_ratio: float | None = None
    calmar_ratio: float | None = None
    transaction_costs: float | None = None
    borrow_fee: float | None = None
    profit_factor: float | None = None
    turnover: float | None = None


class RollingDiagnostics(Dated):
    equity: float
    buy_hold_equity: float
    drawdown: float
    rolling_sharpe: float
    rolling_alpha: float
    position: float
    strategy_return: float
    buy_hold_return: float


class MonthlyDiagnostics(Wire):
    period: str
    strategy_return: float
    buy_hold_return: float
    alpha: float


class ActionDiagnostics(Wire):
    action: str
    count: int
    win_rate: float
    avg_pnl: float
    total_pnl: float


class RiskDiagnostics(Wire):
    exposure_mean: float
    exposure_std: float
    tail_loss_p95: float
    cvar95: float
    best_bar: float
    worst_bar: float


class Diagnostics(Wire):
    rolling: list[RollingDiagnostics]
    monthly: list[MonthlyDiagnostics]
    action_breakdown: list[ActionDiagnostics]
    hourly: list[dict[str, float]]
    risk: RiskDiagnostics


class ForwardSimResult(Windowed):
    dates: list[WireDate]
    prices: list[float]
    equity_curve: list[float]
    sharpe: float
    max_drawdown: float
    trades: int
    source: Literal["historical_holdout"] | None = None
    cumulative_return: float | None = None
    win_rate: float | None = None
    profit_factor: float | None = None
    actions: list[ForecastAction] | None = None
    markers: list[TradeMarker] | None = None
    total_costs: float | None = None
    borrow_fee: float | None = None


class BacktestResult(Windowed):
    equity_curve: list[EquityPoint]
    price_series: list[PricePoint]
    trade_log: list[TradeRecord]
    metrics: BacktestMetrics
    annotations: list[TradeMarker]
    buy_hold_equity: list[BuyHoldPoint] | None = None
    csv: str | None = None
    forward_simulation: ForwardSimResult | None = None
    diagnostics: Diagnostics | None = None


class ModelMeta(Described):
    id: str
    symbol: str
    created_at: str
    fusion_mode_default: FusionMode
    metrics: BacktestMetrics
    scalers: dict[str, object] | None = None
    sequence_length: int
    ensemble_size: int
    last_training_job_id: str | None = None
    notes: str | None = None
    quality_gate_passed: bool | None = None
    quality_score: float | None = None
    quality_reasons: list[str] | None = None


class ModelVersion(Wire):
    """One kept version of a saved model, ``newer`` than the one that serves; ``damage``: why it cannot."""

    model_version: str
    serving: bool
    newer: bool
    created_at: str | None = None
    trained_through: WireDate | None = None
    verdict: VerdictLabel | None = None
    damage: str | None = None


class TrainingParams(Wire):
    """What to train; what is left out is the trainer's own default, which these are."""

    symbol: Symbol
    epochs: Annotated[int, Field(ge=1, le=10_000), WHOLE] = 50
    batch_size: Annotated[int, Field(ge=1, le=65_536), WHOLE] = 512
    loss: Loss = "huber"
    sequence_length: Annotated[int, Field(ge=1, le=1_000), WHOLE] = 30
    feature_toggles: dict[str, Flag] = {}
    ensemble_size: Annotated[int, Field(ge=1, le=100), WHOLE] = 1
    base_seed: Annotated[int, Field(ge=0, le=2**31 - 1), WHOLE] = 7
    overwrite_existing: Flag | None = None
    overwrite: Flag | None = None
    model_type: ModelType | None = None
    dropout: Annotated[Number, Field(ge=0, lt=0.9)] | None = None
    learning_rate: Annotated[Number, Field(gt=0, lt=1)] | None = None
    n_trials: Annotated[int, Field(ge=0, le=10_000), WHOLE] | None = None
    max_features: Annotated[int, Field(ge=1, le=1_000), WHOLE] | None = None
    target_horizons: list[Annotated[int, Field(ge=1, le=MAX_HORIZON_BARS), WHOLE]] | None = None
    use_lgb: Flag | None = None
    allow_cpu_fallback: Flag | None = None
    data_period: ShortText | None = None


class TrainingStarted(Wire):
    job_id: str


class TrainingJobMetrics(Wire):
    train_loss: float
    val_loss: float
    directional_accuracy: float
    variance_score: float


class TrainingJob(Wire):
    id: str
    symbol: str
    status: JobStatus
    progress: Annotated[float, Field(ge=0, le=1)]
    current_epoch: int
    total_epochs: int
    started_at: str
    completed_at: str | None = None
    error: str | None = None
    metrics: TrainingJobMetrics | None = None
    model_type: ModelType | None = None
    current_step: str | None = None


class TrainingEvent(Wire):
    type: Literal["started", "stage", "epoch", "log", "completed", "failed", "cancelled", "heartbeat"]
    status: JobStatus
    progress: Annotated[float, Field(ge=0, le=1)]
    epoch: int | None = None
    total_epochs: int | None = None
    train_loss: float | None = None
    val_loss: float | None = None
    learning_rate: float | None = None
    directional_accuracy: float | None = None
    variance_score: float | None = None
    timestamp: str | None = None
    stage: str | None = None
    message: str | None = None


class ForecastContent(Wire):
    """One forecast as it went out: the median of the simple return to a session, and the 80 % band around it.

    ``close`` is the adjusted close of ``as_of`` as known then, ``position`` the target weight decided at it,
    ``model_id`` what answered, whatever was asked for, and ``sigma_log`` the standard deviation of the normal
    log return with a band as wide.
    """

    symbol: str
    source: str
    model_id: str
    model_version: str
    as_of: WireDate
    target_session: WireDate
    horizon_bars: int
    close: float
    forecast_return: float
    lower_return: float
    upper_return: float
    sigma_log: float
    position: float


class TrackRecordForecast(ForecastContent):
    """One served forecast and what became of it; returns are simple, from the as-of to the target session."""

    served_at: str
    status: Literal["open", "scored", "unscored"]
    counts: bool
    realised_return: float | None = None
    direction_hit: bool | None = None
    always_up_hit: bool | None = None
    band_hit: bool | None = None
    crps: float | None = None
    position_return: float | None = None
    hold_return: float | None = None
    note: str | None = None


class TrackRecordSummary(Wire):
    """All forecasts of one model over one horizon; absent where none is scored."""

    horizon_bars: int
    model_id: str
    served: int
    scored: int
    direction_accuracy: float | None = None
    always_up_accuracy: float | None = None
    band_coverage: float | None = None
    mean_crps: float | None = None
    mean_position_return: float | None = None
    mean_hold_return: float | None = None


class TrackRecord(Wire):
    symbol: str
    summaries: list[TrackRecordSummary]
    forecasts: list[TrackRecordForecast]
    notes: list[str]
