/**
 * The wire contract of AI-Stocks.
 *
 * `service/schemas.py` states the same in Python; `tests/test_service/test_schemas.py` holds the two together.
 * A field with `?` may be absent; none is ever null. Fields without `?` in a request have defaults on the server,
 * so `PredictRequestBody` is all that a caller must send. Dates are `YYYY-MM-DD`, returns, drawdowns, accuracies
 * and win rates are fractions, numbers are finite.
 */

export type FusionMode =
  | "gbm_only"
  | "lstm_only"
  | "ensemble"
  // Old names: served by the best available ensemble and echoed in metadata.fusionMode.
  | "classifier"
  | "weighted"
  | "hybrid"
  | "regressor";
export type Smoothing = "none" | "ema" | "moving-average";
export type Verdict = "edge" | "no-edge" | "insufficient";
export type ForecastActionName = "BUY" | "SELL" | "SHORT" | "COVER" | "HOLD";
export type MarkerType = "buy" | "sell" | "hold";
export type MarkerSegment = "history" | "forecast";
export type MarkerScope = "prediction" | "backtest";
export type OverlayType = "bollinger" | "moving-average" | "predicted-path" | "volume";
/** `open` until the target session has closed, `unscored` where what came can never be told. */
export type TrackRecordStatus = "open" | "scored" | "unscored";
export type Loss = "huber" | "mae" | "balanced" | "quantile";
/** `lstm_transformer`, the form's default, is served by the LSTM trainer. */
export type ModelType = "gbm" | "lstm" | "ensemble" | "lstm_transformer" | "stacking";
export type JobStatus = "queued" | "running" | "completed" | "failed" | "cancelled";
export type TrainingEventType =
  | "started"
  | "stage"
  | "epoch"
  | "log"
  | "completed"
  | "failed"
  | "cancelled"
  | "heartbeat";

// ---------------------------------------------------------------- prediction: request

export interface ConfidenceFloors {
  buy: number;
  sell: number;
}

/**
 * Which trades are marked and named: those decided in a bull market (the close on or above the mean of the last
 * 200 closes, itself included), in a bear market (below it). Positions stay those that were decided.
 */
export interface RegimeFilters {
  bull: boolean;
  bear: boolean;
}

export interface FusionSettings {
  mode: FusionMode;
  regressorScale: number;
  buyThreshold: number;
  sellThreshold: number;
  regimeFilters: RegimeFilters;
}

export interface PredictionParams {
  symbol: string;
  modelId?: string;
  /** Sessions to forecast, 1 to 252. */
  horizon: number;
  /** Sessions of history to draw; fewer than 30 are raised to 30. */
  daysOnChart: number;
  smoothing: Smoothing;
  confidenceFloors: ConfidenceFloors;
  tradeShareFloor?: number;
  modelVariant?: string;
  dataInterval?: string;
  dataPeriod?: string;
  maxLong?: number;
  maxShort?: number;
}

/** Body of POST /api/predict. */
export interface PredictionRequest extends PredictionParams {
  fusion: FusionSettings;
}

/** What a caller must send at least: the symbol. */
export type PredictRequestBody = Pick<PredictionRequest, "symbol"> &
  Partial<Omit<PredictionRequest, "symbol" | "fusion">> & { fusion?: Partial<FusionSettings> };

// ---------------------------------------------------------------- prediction: response

export interface ClassProbabilities {
  buy: number;
  sell: number;
  hold: number;
}

export interface TradeMarker {
  date: string;
  price: number;
  type: MarkerType;
  /** Signed: negative when sold. */
  shares: number;
  confidence: number;
  segment?: MarkerSegment;
  scope?: MarkerScope;
  explanation?: string;
}

export interface OverlayPoint {
  date: string;
  value: number;
}

export interface OverlaySeries {
  type: OverlayType;
  points: OverlayPoint[];
  upper?: number[];
  lower?: number[];
}

export interface Candle {
  date: string;
  open: number;
  high: number;
  low: number;
  close: number;
  volume?: number;
}

export interface ForecastAction {
  date: string;
  action: ForecastActionName;
  price: number;
  targetPosition: number;
}

export interface Forecast {
  dates: string[];
  /** Median price at the close of each session. */
  prices: number[];
  /** From the last close to each session. */
  returns: number[];
  positions: number[];
  /** 80 % of the outcomes are expected between the bands. */
  lowerBand?: number[];
  upperBand?: number[];
  actions?: ForecastAction[];
}

export interface PredictionMetadata {
  modelId: string;
  fusionMode: FusionMode;
  buyThreshold: number;
  sellThreshold: number;
  horizon: number;
  tradeShareFloor?: number;
  modelQualityGatePassed?: boolean;
  modelQualityScore?: number;
  modelQualityReasons?: string[];
  holdoutMetricSource?: string;
  holdoutPredTargetStdRatio?: number;
  featureProfile?: string;
  featureSelectionMode?: string;
  targetHorizonDays?: number;
  executionMode?: string;
  maxLong?: number;
  maxShort?: number;
  modelVariant?: string;
  dataInterval?: string;
  dataPeriod?: string;
  isIntraday?: boolean;
  annualizationFactor?: number;
  smoothing?: Smoothing;
  confidenceFloors?: ConfidenceFloors;
  /** First session whose forecast was made by a model that had not seen it. */
  outOfSampleFrom?: string;
  trainedThrough?: string;
  dataAsOf?: string;
  dataStale?: boolean;
  dataSource?: string;
  verdict?: Verdict;
  evidence?: Record<string, number>;
  modelVersion?: string;
  /** Sessions from the last one trained on to the last bar. */
  modelAgeSessions?: number;
  /** Whether the model is older than any that the walk-forward judged. */
  modelIsOld?: boolean;
  /** What of the request could not be honoured, and what is amiss, in words. */
  notes?: string[];
}

export interface PredictionResult {
  symbol: string;
  dates: string[];
  prices: number[];
  /** Return of each session itself: from the close before to its own close. */
  actualReturns?: number[];
  /** Price that was forecast at the close of each date for `metadata.targetHorizonDays` sessions later. */
  predictedPrices: number[];
  /** Return that was forecast at the close of each date over `metadata.targetHorizonDays` sessions. */
  predictedReturns: number[];
  /** Target weight decided at the close of each date; it earns from the next session on. */
  fusedPositions: number[];
  /**
   * One per date: probability that the return over the target horizon pays for a round trip upwards (buy) or
   * downwards (sell), and the rest (hold). A third each where there is no forecast.
   */
  classifierProbabilities: ClassProbabilities[];
  tradeMarkers: TradeMarker[];
  overlays: OverlaySeries[];
  candles?: Candle[];
  forecast?: Forecast;
  metadata: PredictionMetadata;
}

// ---------------------------------------------------------------- backtest

export interface BacktestParams {
  backtestWindow: number;
  initialCapital: number;
  maxLong: number;
  maxShort: number;
  /** Fraction of the traded value below 0.05, basis points from there on; at most 500 bps. */
  commission: number;
  slippage: number;
  enableForwardSim: boolean;
  shortCap?: number;
  forwardWindow?: number;
  /** Explicit; wins over `commission`. */
  commissionBps?: number;
  slippageBps?: number;
  minPositionChange?: number;
  annualizationFactor?: number;
  dataInterval?: string;
  flatAtDayEnd?: boolean;
  dayEndFlattenFraction?: number;
}

/** Body of POST /api/backtest and POST /api/forward_sim. */
export interface BacktestRequest {
  prediction: PredictionResult;
  params: BacktestParams;
}

export interface EquityPoint {
  date: string;
  equity: number;
  /** At most 0. */
  drawdown: number;
}

export interface PricePoint {
  date: string;
  price: number;
}

export interface BuyHoldPoint {
  date: string;
  equity: number;
}

export interface TradeExplanation {
  classifierProb: number;
  regressorReturn: number;
  fusionMode: string;
  notes?: string;
}

export interface TradeRecord {
  id: string;
  date: string;
  /** BUY, SELL, SHORT, COVER or a more detailed name. */
  action: string;
  price: number;
  shares: number;
  position: number;
  pnl: number;
  cumulativePnl: number;
  commission?: number;
  slippage?: number;
  explanation?: TradeExplanation;
}

export interface BacktestMetrics {
  cumulativeReturn: number;
  sharpeRatio: number;
  /** At most 0. */
  maxDrawdown: number;
  winRate: number;
  averageTradeProfit: number;
  totalTrades: number;
  directionalAccuracy: number;
  correlation: number;
  smape?: number;
  rmse?: number;
  cumulativeReturnPct?: number;
  buyHoldReturnPct?: number;
  excessReturnPct?: number;
  sortinoRatio?: number;
  calmarRatio?: number;
  transactionCosts?: number;
  /** For borrowed cash (exposure over 1) and borrowed shares. */
  borrowFee?: number;
  profitFactor?: number;
  turnover?: number;
}

export interface RollingDiagnostics {
  date: string;
  equity: number;
  buyHoldEquity: number;
  drawdown: number;
  rollingSharpe: number;
  rollingAlpha: number;
  position: number;
  strategyReturn: number;
  buyHoldReturn: number;
}

export interface MonthlyDiagnostics {
  period: string;
  strategyReturn: number;
  buyHoldReturn: number;
  alpha: number;
}

export interface ActionDiagnostics {
  action: string;
  count: number;
  winRate: number;
  avgPnl: number;
  totalPnl: number;
}

export interface RiskDiagnostics {
  exposureMean: number;
  exposureStd: number;
  tailLossP95: number;
  cvar95: number;
  bestBar: number;
  worstBar: number;
}

export interface Diagnostics {
  rolling: RollingDiagnostics[];
  monthly: MonthlyDiagnostics[];
  actionBreakdown: ActionDiagnostics[];
  /** Empty for daily bars. */
  hourly: Record<string, number>[];
  risk: RiskDiagnostics;
}

export interface ForwardSimResult {
  dates: string[];
  prices: number[];
  equityCurve: number[];
  sharpe: number;
  maxDrawdown: number;
  trades: number;
  source?: "historical_holdout";
  windowStart?: string;
  windowEnd?: string;
  cumulativeReturn?: number;
  winRate?: number;
  profitFactor?: number;
  actions?: ForecastAction[];
  markers?: TradeMarker[];
  totalCosts?: number;
  borrowFee?: number;
  /** What must be known beside the figures: rows left out, IN-SAMPLE ones counted, figures that are undefined. */
  notes?: string[];
}

export interface BacktestResult {
  equityCurve: EquityPoint[];
  priceSeries: PricePoint[];
  tradeLog: TradeRecord[];
  metrics: BacktestMetrics;
  annotations: TradeMarker[];
  buyHoldEquity?: BuyHoldPoint[];
  csv?: string;
  forwardSimulation?: ForwardSimResult;
  windowStart?: string;
  windowEnd?: string;
  diagnostics?: Diagnostics;
  /** What must be known beside the figures: rows left out, IN-SAMPLE ones counted, figures that are undefined. */
  notes?: string[];
}

// ---------------------------------------------------------------- models and training

export interface ModelMeta {
  id: string;
  symbol: string;
  /** ISO 8601. */
  createdAt: string;
  fusionModeDefault: FusionMode;
  metrics: BacktestMetrics;
  scalers?: Record<string, unknown>;
  sequenceLength: number;
  ensembleSize: number;
  lastTrainingJobId?: string;
  notes?: string;
  modelVariant?: string;
  dataInterval?: string;
  dataPeriod?: string;
  qualityGatePassed?: boolean;
  qualityScore?: number;
  qualityReasons?: string[];
  targetHorizonDays?: number;
  modelVersion?: string;
  trainedThrough?: string;
  outOfSampleFrom?: string;
  dataSource?: string;
  verdict?: Verdict;
}

/** One kept version of a model; `damage` says why it cannot serve. */
export interface ModelVersion {
  modelVersion: string;
  serving: boolean;
  newer: boolean;
  createdAt?: string;
  trainedThrough?: string;
  verdict?: Verdict;
  damage?: string;
}

/** Body of POST /api/training/start; further fields are ignored. */
export interface TrainingParams {
  symbol: string;
  epochs: number;
  batchSize: number;
  loss: Loss;
  sequenceLength: number;
  featureToggles: Record<string, boolean>;
  ensembleSize: number;
  baseSeed: number;
  overwriteExisting?: boolean;
  overwrite?: boolean;
  modelType?: ModelType;
  dropout?: number;
  learningRate?: number;
  nTrials?: number;
  maxFeatures?: number;
  targetHorizons?: number[];
  useLgb?: boolean;
  allowCpuFallback?: boolean;
  dataPeriod?: string;
}

export interface TrainingStarted {
  jobId: string;
}

export interface TrainingJobMetrics {
  trainLoss: number;
  valLoss: number;
  directionalAccuracy: number;
  varianceScore: number;
}

export interface TrainingJob {
  id: string;
  symbol: string;
  status: JobStatus;
  /** 0 to 1. */
  progress: number;
  currentEpoch: number;
  totalEpochs: number;
  startedAt: string;
  completedAt?: string;
  error?: string;
  metrics?: TrainingJobMetrics;
  modelType?: ModelType;
  currentStep?: string;
}

/** Data of one unnamed server-sent event; epoch events carry the fields from `epoch` to `timestamp`. */
export interface TrainingEvent {
  type: TrainingEventType;
  status: JobStatus;
  progress: number;
  epoch?: number;
  totalEpochs?: number;
  trainLoss?: number;
  valLoss?: number;
  learningRate?: number;
  directionalAccuracy?: number;
  varianceScore?: number;
  timestamp?: string;
  stage?: string;
  message?: string;
}

// ---------------------------------------------------------------- prices and plumbing

export interface HistoricalBar {
  date: string;
  open: number;
  high: number;
  low: number;
  close: number;
  volume: number;
}

export interface HistoricalResponse {
  symbol: string;
  data: HistoricalBar[];
  dataAsOf?: string;
  dataStale?: boolean;
  dataSource?: string;
}

export interface RealtimeQuote {
  symbol: string;
  current_price: number;
  previous_close: number;
  open: number;
  day_high: number;
  day_low: number;
  volume: number;
  data_as_of?: string;
  data_stale?: boolean;
  data_source?: string;
}

export interface Welcome {
  message: string;
}

/** Also the answer to DELETE: `deleted`, `cancelled`. */
export interface StatusAnswer {
  status: string;
  version?: string;
  models?: number;
  source?: string;
}

/** Every error, as application/problem+json. */
export interface Problem {
  type: string;
  title: string;
  status: number;
  detail: string;
  instance: string;
  request_id: string;
}

// ---------------------------------------------------------------- track record

/** One served forecast; returns are simple, from the as-of to the target session. */
export interface TrackRecordForecast {
  symbol: string;
  source: string;
  /** The model that answered, whatever was asked for. */
  modelId: string;
  modelVersion: string;
  asOf: string;
  targetSession: string;
  horizonBars: number;
  /** Close at `asOf` as it was known when served. */
  close: number;
  forecastReturn: number;
  /** Edges of the 80 % band. */
  lowerReturn: number;
  upperReturn: number;
  /** Standard deviation of the normal log return with a band as wide. */
  sigmaLog: number;
  /** Target weight decided at the close of `asOf`. */
  position: number;
  /** ISO 8601. */
  servedAt: string;
  status: TrackRecordStatus;
  /** False where the same forecast was served before, or later than the last closed session allows, or cannot be scored. */
  counts: boolean;
  realisedReturn?: number;
  /** Absent when the price did not move. */
  directionHit?: boolean;
  alwaysUpHit?: boolean;
  bandHit?: boolean;
  /** Continuous ranked probability score in log returns; lower is better. */
  crps?: number;
  /** Of `position` entered at `asOf` and held to the target session, after costs and financing. */
  positionReturn?: number;
  /** The same of all capital in shares. */
  holdReturn?: number;
  note?: string;
}

/** All forecasts of one model over one horizon that count; figures are absent where none is scored. */
export interface TrackRecordSummary {
  horizonBars: number;
  modelId: string;
  served: number;
  scored: number;
  directionAccuracy?: number;
  /** Accuracy of always forecasting a rise, over the same forecasts. */
  alwaysUpAccuracy?: number;
  /** 0.8 is what the bands claim. */
  bandCoverage?: number;
  meanCrps?: number;
  meanPositionReturn?: number;
  meanHoldReturn?: number;
}

export interface TrackRecord {
  symbol: string;
  summaries: TrackRecordSummary[];
  /** In the order of serving. */
  forecasts: TrackRecordForecast[];
  notes: string[];
}
