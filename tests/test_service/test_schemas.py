"""The two statements of the wire contract, held together."""

import copy
import inspect
import json
import re
import shutil
import subprocess
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, Union, get_args, get_origin

import pytest
from fastapi import FastAPI
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

# Said in Python alone: what several of them have in common.
PYTHON_ONLY = {"Wire", "Dated", "Described", "ForecastContent", "Windowed"}

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
        for name, model in inspect.getmembers(service.schemas, inspect.isclass)
        if issubclass(model, Wire) and name not in PYTHON_ONLY
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


# ---------------------------------------------------------------- the served OpenAPI


TYPES_OF_JSON = {"number": "number", "integer": "number", "string": "string", "boolean": "boolean"}


def typescript_of_schema(schema: dict) -> str:  # noqa: PLR0911
    """Say a JSON schema in TypeScript; null, which is never sent, is left out."""
    if "$ref" in schema:
        return schema["$ref"].rpartition("/")[2]
    if "anyOf" in schema:
        return _union(
            " | ".join(typescript_of_schema(one) for one in schema["anyOf"] if one != {"type": "null"})
        )
    if "enum" in schema:
        return _union(" | ".join(f'"{value}"' for value in schema["enum"]))
    if "const" in schema:
        return f'"{schema["const"]}"'
    kind = schema.get("type")
    if kind == "array":
        return f"{typescript_of_schema(schema['items'])}[]"
    if kind == "object":
        of = schema["additionalProperties"]
        return f"Record<string, {typescript_of_schema({} if of is True else of)}>"
    return TYPES_OF_JSON[kind] if kind else "unknown"


def served_models(openapi: dict) -> dict[str, Fields]:
    """Return the same of the served OpenAPI: what is neither required nor has a default may be absent."""
    return {
        name: {
            field: (
                typescript_of_schema(of),
                field not in schema.get("required", ()) and of.get("default") is None,
            )
            for field, of in schema.get("properties", {}).items()
        }
        for name, schema in openapi["components"]["schemas"].items()
    }


def served_differences(openapi: dict) -> list[str]:
    served = served_models(openapi)
    typescript = {
        name: fields for name, fields in parse_typescript(AI_TS.read_text()).items() if name in served
    }
    return differences(typescript, served)


def test_the_served_openapi_states_the_same_contract(api: FastAPI) -> None:
    openapi = api.openapi()
    assert {"PredictionRequest", "PredictionResult", "ModelMeta", "Problem"} <= set(served_models(openapi))
    assert served_differences(openapi) == []


def planted(api: FastAPI) -> dict:
    """Return the served OpenAPI with a field of the contract taken away."""
    openapi = copy.deepcopy(api.openapi())
    model = openapi["components"]["schemas"]["PredictionResult"]
    del model["properties"]["fusedPositions"]
    model["required"].remove("fusedPositions")
    return openapi


def test_a_field_that_the_served_openapi_lacks_is_caught(api: FastAPI) -> None:
    assert [line.split(":")[0] for line in served_differences(planted(api))] == [
        "PredictionResult.fusedPositions"
    ]


def null_defaults(openapi: dict) -> list[str]:
    """Name the fields whose default is null: generated types would call them required."""
    return [
        f"{name}.{field}"
        for name, schema in openapi["components"]["schemas"].items()
        for field, of in schema.get("properties", {}).items()
        if of.get("default", "none") is None
    ]


def test_no_field_of_the_served_openapi_defaults_to_null(api: FastAPI) -> None:
    openapi = copy.deepcopy(api.openapi())
    assert "BacktestParams" in openapi["components"]["schemas"]
    assert null_defaults(openapi) == []
    openapi["components"]["schemas"]["PredictionResult"]["properties"]["forecast"]["default"] = None
    assert null_defaults(openapi) == ["PredictionResult.forecast"]


def test_every_path_parameter_and_error_is_documented(api: FastAPI) -> None:
    for path, item in api.openapi()["paths"].items():
        for operation in item.values():
            declared = {one["name"] for one in operation.get("parameters", ()) if one["in"] == "path"}
            assert declared == set(re.findall(r"{(\w+)}", path)), path
            failures = {k: v for k, v in operation["responses"].items() if not k.startswith("2")}
            assert {"default", "422", "429", "500", "503"} <= set(failures), path
            for response in failures.values():
                assert list(response["content"]) == ["application/problem+json"]


CHECK_TS = """import type {{ components }} from "./served";
import type * as page from "./ai";
type Served = components["schemas"];
type Clean<T> = T extends null ? never : T extends (infer U)[] ? Clean<U>[]
  : T extends object ? {{ [K in keyof T]: Clean<T[K]> }} : T;
type Within<A, B> = [A] extends [B] ? true : false;
type Same<A, B> = [Within<A, B>, Within<B, A>, Within<keyof A, keyof B>, Within<keyof B, keyof A>];
export const same: [true, true, true, true][] = [
{lines}
];
"""


@pytest.fixture
def compile_typescript(tmp_path: Path) -> Callable[[dict], str]:
    """Return a function that says what the TypeScript compiler thinks of a served OpenAPI."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    folders = {}
    for package in ("openapi-typescript", "typescript"):
        done = subprocess.run(
            ["node", "-p", f"require.resolve('{package}/package.json')"],
            cwd=AI_TS.parent,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            pytest.skip(f"node has no package {package}: npm install --no-save openapi-typescript typescript")
        folders[package] = Path(done.stdout.strip()).parent

    def compiled(openapi: dict) -> str:
        (tmp_path / "openapi.json").write_text(json.dumps(openapi))
        (tmp_path / "ai.ts").write_text(AI_TS.read_text())
        names = sorted(served_models(openapi).keys() & parse_typescript(AI_TS.read_text()).keys())
        lines = ",\n".join(f'  null! as Same<Clean<Served["{name}"]>, Clean<page.{name}>>' for name in names)
        (tmp_path / "check.ts").write_text(CHECK_TS.format(lines=lines))
        cli = folders["openapi-typescript"] / "bin" / "cli.js"
        subprocess.run(
            ["node", cli, "openapi.json", "-o", "served.ts"], cwd=tmp_path, capture_output=True, check=True
        )
        tsc = folders["typescript"] / "bin" / "tsc"
        done = subprocess.run(
            ["node", tsc, "--noEmit", "--strict", "--skipLibCheck", "check.ts"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout

    return compiled


def test_the_compiler_agrees_with_the_served_openapi(
    api: FastAPI, compile_typescript: Callable[[dict], str]
) -> None:
    assert compile_typescript(api.openapi()) == ""
    assert "check.ts" in compile_typescript(planted(api))
