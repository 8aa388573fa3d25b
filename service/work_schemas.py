"""The wire contract in Python: backtests, models and trainings; see `service.schemas` for its rules."""

from typing import Annotated, Literal

from pydantic import Field

from service.schemas import (
    MAX_CHART_BARS,
    MAX_HORIZON_BARS,
    Flag,
    ForecastAction,
    Fraction,
    FusionMode,
    Number,
    PredictionResult,
    ShortText,
    Symbol,
    TradeMarker,
    VerdictLabel,
    Weight,
    Whole,
    Wire,
    WireDate,
)

Loss = Literal["huber", "mae", "balanced", "quantile"]
ModelType = Literal["gbm", "lstm", "ensemble", "lstm_transformer", "stacking"]
JobStatus = Literal["queued", "running", "completed", "failed", "cancelled"]
TrainingEventType = Literal[
    "started", "stage", "epoch", "log", "completed", "failed", "cancelled", "heartbeat"
]


class BacktestParams(Wire):
    """How to backtest; `commission` and `slippage` are fractions below 0.05, basis points from there on."""

    backtest_window: Annotated[Whole, Field(ge=10, le=MAX_CHART_BARS)] = 60
    initial_capital: Annotated[Number, Field(gt=0)] = 10_000.0
    max_long: Weight = 1.8
    max_short: Weight = 0.2
    commission: Annotated[Number, Field(ge=0, le=500)] = 0.0005
    slippage: Annotated[Number, Field(ge=0, le=500)] = 0.0003
    enable_forward_sim: Flag = False
    short_cap: Weight | None = None
    forward_window: Annotated[Whole, Field(ge=1, le=MAX_CHART_BARS)] | None = None
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


class EquityPoint(Wire):
    """Equity and drawdown (at most 0) at one close."""

    date: WireDate
    equity: float
    drawdown: float


class PricePoint(Wire):
    """Price at one close."""

    date: WireDate
    price: float


class BuyHoldPoint(Wire):
    """Equity of buy and hold at one close."""

    date: WireDate
    equity: float


class TradeExplanation(Wire):
    """Why a trade was made."""

    classifier_prob: float
    regressor_return: float
    fusion_mode: str
    notes: str | None = None


class TradeRecord(Wire):
    """One booked trade."""

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


class RollingDiagnostics(Wire):
    """One session of the rolling view."""

    date: WireDate
    equity: float
    buy_hold_equity: float
    drawdown: float
    rolling_sharpe: float
    rolling_alpha: float
    position: float
    strategy_return: float
    buy_hold_return: float


class MonthlyDiagnostics(Wire):
    """One month."""

    period: str
    strategy_return: float
    buy_hold_return: float
    alpha: float


class ActionDiagnostics(Wire):
    """All trades of one kind."""

    action: str
    count: int
    win_rate: float
    avg_pnl: float
    total_pnl: float


class RiskDiagnostics(Wire):
    """Exposure and tails."""

    exposure_mean: float
    exposure_std: float
    tail_loss_p95: float
    cvar95: float
    best_bar: float
    worst_bar: float


class Diagnostics(Wire):
    """Views of a backtest."""

    rolling: list[RollingDiagnostics]
    monthly: list[MonthlyDiagnostics]
    action_breakdown: list[ActionDiagnostics]
    hourly: list[dict[str, float]]
    risk: RiskDiagnostics


class ForwardSimResult(Wire):
    """Answer of POST /api/forward_sim."""

    dates: list[WireDate]
    prices: list[float]
    equity_curve: list[float]
    sharpe: float
    max_drawdown: float
    trades: int
    source: Literal["historical_holdout"] | None = None
    window_start: WireDate | None = None
    window_end: WireDate | None = None
    cumulative_return: float | None = None
    win_rate: float | None = None
    profit_factor: float | None = None
    actions: list[ForecastAction] | None = None
    markers: list[TradeMarker] | None = None
    total_costs: float | None = None
    borrow_fee: float | None = None


class BacktestResult(Wire):
    """Answer of POST /api/backtest."""

    equity_curve: list[EquityPoint]
    price_series: list[PricePoint]
    trade_log: list[TradeRecord]
    metrics: BacktestMetrics
    annotations: list[TradeMarker]
    buy_hold_equity: list[BuyHoldPoint] | None = None
    csv: str | None = None
    forward_simulation: ForwardSimResult | None = None
    window_start: WireDate | None = None
    window_end: WireDate | None = None
    diagnostics: Diagnostics | None = None


class ModelMeta(Wire):
    """One saved model."""

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
    model_variant: str | None = None
    data_interval: str | None = None
    data_period: str | None = None
    quality_gate_passed: bool | None = None
    quality_score: float | None = None
    quality_reasons: list[str] | None = None
    target_horizon_days: int | None = None
    model_version: str | None = None
    trained_through: WireDate | None = None
    out_of_sample_from: WireDate | None = None
    data_source: str | None = None
    verdict: VerdictLabel | None = None


class TrainingParams(Wire):
    """Body of POST /api/training/start."""

    symbol: Symbol
    epochs: Annotated[Whole, Field(ge=1, le=10_000)] = 100
    batch_size: Annotated[Whole, Field(ge=1, le=65_536)] = 32
    loss: Loss = "huber"
    sequence_length: Annotated[Whole, Field(ge=1, le=1_000)] = 60
    feature_toggles: dict[str, Flag] = Field(default_factory=dict)
    ensemble_size: Annotated[Whole, Field(ge=1, le=100)] = 1
    base_seed: Annotated[Whole, Field(ge=0, le=2**31 - 1)] = 42
    overwrite_existing: Flag | None = None
    overwrite: Flag | None = None
    model_type: ModelType | None = None
    dropout: Fraction | None = None
    learning_rate: Annotated[Number, Field(gt=0, le=1)] | None = None
    n_trials: Annotated[Whole, Field(ge=1, le=10_000)] | None = None
    max_features: Annotated[Whole, Field(ge=1, le=1_000)] | None = None
    target_horizons: list[Annotated[Whole, Field(ge=1, le=MAX_HORIZON_BARS)]] | None = None
    use_lgb: Flag | None = None
    allow_cpu_fallback: Flag | None = None
    data_period: ShortText | None = None


class TrainingStarted(Wire):
    """Answer of POST /api/training/start."""

    job_id: str


class TrainingJobMetrics(Wire):
    """How the running training does."""

    train_loss: float
    val_loss: float
    directional_accuracy: float
    variance_score: float


class TrainingJob(Wire):
    """One training."""

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
    """Data of one server-sent event."""

    type: TrainingEventType
    status: JobStatus
    progress: Annotated[float, Field(ge=0, le=1)]
    epoch: int | None = None
    total_epochs: int | None = None
    train_loss: float | None = None
    val_loss: float | None = None
    learning_rate: float | None = None
    timestamp: str | None = None
    stage: str | None = None
    message: str | None = None
