"""The two statements of the wire contract, held together."""

import inspect
import json
import re
import types
from pathlib import Path
from typing import Annotated, Literal, Union, get_args, get_origin

import pytest
from pydantic import ValidationError

import service.schemas
from service.schemas import (
    BacktestParams,
    BacktestRequest,
    PredictionRequest,
    Problem,
    RealtimeQuote,
    TrainingParams,
    Wire,
)

AI_TS = Path(__file__).resolve().parents[2] / "types" / "ai.ts"
# Said in TypeScript alone: it only relaxes PredictionRequest for callers.
TYPESCRIPT_ONLY = {"PredictRequestBody"}

Fields = dict[str, tuple[str, bool]]


def parse_typescript(text: str) -> dict[str, Fields]:
    """Return {interface: {field: (type, optional)}} with named unions spelled out."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.DOTALL)
    unions = {
        name: _union(body)
        for name, body in re.findall(r"export type (\w+) =([^;]*);", text)
        if name not in TYPESCRIPT_ONLY
    }
    found: dict[str, Fields] = {}
    for name, parent, body in re.findall(
        r"export interface (\w+)(?: extends (\w+))? \{(.*?)\n\}", text, re.DOTALL
    ):
        fields = dict(found[parent]) if parent else {}
        for field, mark, kind in re.findall(r"(\w+)(\??):\s*([^;]+);", body):
            fields[field] = (unions.get(kind.strip(), _union(kind)), bool(mark))
        found[name] = fields
    return found


def _union(text: str) -> str:
    return " | ".join(sorted(part.strip() for part in text.split("|") if part.strip()))


def typescript_of(annotation: object) -> str:  # noqa: PLR0911
    """Say a Python annotation in TypeScript."""
    names = {float: "number", int: "number", str: "string", bool: "boolean", object: "unknown"}
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation in names:
        return names[annotation]
    if origin is Annotated:
        return typescript_of(args[0])
    if origin in {Union, types.UnionType}:
        (inner,) = (arg for arg in args if arg is not type(None))
        return typescript_of(inner)
    if origin is Literal:
        return _union(" | ".join(f'"{value}"' for value in args))
    if origin is list:
        return f"{typescript_of(args[0])}[]"
    if origin is dict:
        return f"Record<{typescript_of(args[0])}, {typescript_of(args[1])}>"
    assert isinstance(annotation, type), annotation
    assert issubclass(annotation, Wire), annotation
    return annotation.__name__


def python_models() -> dict[str, Fields]:
    """Return the same of the pydantic models; what defaults to None may be absent."""
    models = {
        name: model
        for module in (service.schemas, service.schemas)
        for name, model in inspect.getmembers(module, inspect.isclass)
        if issubclass(model, Wire) and model is not Wire
    }
    return {
        name: {
            field.alias or python_name: (
                typescript_of(field.annotation),
                field.default is None and not field.is_required(),
            )
            for python_name, field in model.model_fields.items()
        }
        for name, model in models.items()
    }


def differences(typescript: dict[str, Fields], python: dict[str, Fields]) -> list[str]:
    said = [f"{name}: only on one side" for name in sorted(typescript.keys() ^ python.keys())]
    for name in sorted(typescript.keys() & python.keys()):
        for field in sorted(typescript[name].keys() | python[name].keys()):
            left, right = typescript[name].get(field), python[name].get(field)
            if left != right:
                said.append(f"{name}.{field}: TypeScript {left}, Python {right}")
    return said


def test_typescript_and_python_state_the_same_contract() -> None:
    typescript = parse_typescript(AI_TS.read_text())
    assert len(typescript) >= 40
    assert differences(typescript, python_models()) == []


@pytest.mark.parametrize(
    ("planted", "instead", "caught"),
    [
        ("  fusedPositions: number[];\n", "", "PredictionResult.fusedPositions"),
        ("  dataStale?: boolean;", "  dataStale: boolean;", "PredictionMetadata.dataStale"),
        ("  createdAt: string;", "  createdAt: number;", "ModelMeta.createdAt"),
        ('  | "lstm_only"\n', "", "PredictionMetadata.fusionMode"),
        ("  winRate: number;\n", "  winrate: number;\n", "BacktestMetrics.winRate"),
        ("export interface Candle {", "export interface Candles {", "Candle: only"),
        ("  lowerBand?: number[];\n", "  lowerBand?: number[];\n  extra?: number;\n", "Forecast.extra"),
    ],
)
def test_a_planted_difference_is_caught(planted: str, instead: str, caught: str) -> None:
    text = AI_TS.read_text()
    assert planted in text
    found = differences(parse_typescript(text.replace(planted, instead)), python_models())
    assert any(line.startswith(caught) for line in found), found


def test_the_required_keys_of_the_contract_are_there() -> None:
    # By hand from the contract, since the two sides could agree on being wrong.
    contract = {
        "PredictionResult": "symbol dates prices predictedPrices predictedReturns fusedPositions "
        "classifierProbabilities tradeMarkers overlays metadata",
        "PredictionMetadata": "modelId fusionMode buyThreshold sellThreshold horizon",
        "TradeMarker": "date price type shares confidence",
        "BacktestMetrics": "cumulativeReturn sharpeRatio maxDrawdown winRate averageTradeProfit totalTrades "
        "directionalAccuracy correlation",
        "ModelMeta": "id symbol createdAt fusionModeDefault metrics sequenceLength ensembleSize",
        "TrainingJob": "id symbol status progress currentEpoch totalEpochs startedAt",
        "BacktestResult": "equityCurve priceSeries tradeLog metrics annotations",
        "ForwardSimResult": "dates prices equityCurve sharpe maxDrawdown trades",
        "TradeRecord": "id date action price shares position pnl cumulativePnl",
        "RealtimeQuote": "symbol current_price previous_close open day_high day_low volume",
        "Problem": "type title status detail instance request_id",
        "PredictionParams": "symbol horizon daysOnChart smoothing confidenceFloors",
        "BacktestParams": "backtestWindow initialCapital maxLong maxShort commission slippage "
        "enableForwardSim",
        "TrainingParams": "symbol epochs batchSize loss sequenceLength featureToggles ensembleSize baseSeed",
    }
    models = python_models()
    for name, fields in contract.items():
        assert {field for field, (_, optional) in models[name].items() if not optional} == set(fields.split())


def test_a_request_needs_only_its_symbol() -> None:
    request = PredictionRequest.model_validate_json('{"symbol": "AAPL", "sequence_length": 60}')
    assert (request.horizon, request.days_on_chart, request.smoothing) == (5, 120, "none")
    assert (request.confidence_floors.buy, request.confidence_floors.sell) == (0.3, 0.45)
    fusion = request.fusion
    assert (fusion.mode, fusion.regressor_scale) == ("gbm_only", 15)
    assert (fusion.buy_threshold, fusion.sell_threshold) == (0.3, 0.45)
    assert (fusion.regime_filters.bull, fusion.regime_filters.bear) == (True, True)


def test_a_partial_fusion_keeps_the_other_defaults() -> None:
    request = PredictionRequest.model_validate({"symbol": "AAPL", "fusion": {"mode": "ensemble"}})
    assert request.fusion.sell_threshold == 0.45


@pytest.mark.parametrize(("asked", "drawn"), [(1, 30), (29, 30), (30, 30), (31, 31)])
def test_a_short_chart_is_raised_to_30(asked: int, drawn: int) -> None:
    request = PredictionRequest.model_validate({"symbol": "AAPL", "daysOnChart": asked})
    assert request.days_on_chart == drawn


HOSTILE = ["NaN", "Infinity", "-Infinity", "1e999", "true", '"5"', "null", "[]", "1" + "0" * 400]


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize("field", ["horizon", "daysOnChart"])
def test_whole_numbers_refuse_lookalikes(field: str, value: str) -> None:
    with pytest.raises(ValidationError):
        PredictionRequest.model_validate(json.loads(f'{{"symbol": "AAPL", "{field}": {value}}}'))


@pytest.mark.parametrize("value", [value for value in HOSTILE if value != "null"])
@pytest.mark.parametrize("field", ["maxLong", "maxShort", "tradeShareFloor"])
def test_numbers_refuse_lookalikes(field: str, value: str) -> None:
    with pytest.raises(ValidationError):
        PredictionRequest.model_validate(json.loads(f'{{"symbol": "AAPL", "{field}": {value}}}'))


def test_defaults_of_backtest_and_training() -> None:
    params = BacktestParams()
    assert (params.backtest_window, params.initial_capital, params.max_long, params.max_short) == (
        60,
        10_000,
        1.8,
        0.2,
    )
    with pytest.raises(ValidationError):
        BacktestParams(backtest_window=9)
    with pytest.raises(ValidationError):
        BacktestParams.model_validate({"initialCapital": float("inf")})
    training = TrainingParams.model_validate(
        {"symbol": "AAPL", "modelType": "lstm_transformer", "unknown": 1}
    )
    assert training.model_type == "lstm_transformer"
    assert training.feature_toggles == {}
    assert BacktestRequest.model_fields["params"].default == params


def test_absent_is_absent_and_never_null() -> None:
    quote = RealtimeQuote(
        symbol="A", current_price=1, previous_close=1, open=1, day_high=1, day_low=1, volume=1
    )
    assert json.loads(quote.wire_bytes())["current_price"] == 1
    marker = service.schemas.TradeMarker(
        date="2026-01-02", price=1.0, type="buy", shares=1.0, confidence=0.5, segment=None
    )
    assert b"null" not in marker.wire_bytes()
    assert "segment" not in json.loads(marker.wire_bytes())


def test_no_answer_can_carry_nan() -> None:
    with pytest.raises(ValidationError):
        service.schemas.OverlayPoint(date="2026-01-02", value=float("nan"))
    with pytest.raises(ValidationError):
        service.schemas.OverlayPoint(date="02.01.2026", value=1.0)
    with pytest.raises(ValidationError):
        service.schemas.Forecast(dates=[], prices=[float("inf")], returns=[], positions=[])


def test_problem_is_snake_case() -> None:
    body = Problem(type="t", title="t", status=422, detail="d", instance="/", request_id="r")
    assert set(json.loads(body.wire_bytes())) == {
        "type",
        "title",
        "status",
        "detail",
        "instance",
        "request_id",
    }
