"""What the JSON documents of a booster bundle must look like, before anything is read by their word."""

import math
from dataclasses import asdict
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from inference.artifact import Manifest
from inference.ensemble import Calibration

SCHEMA_VERSION = 2
BOOSTER_LIBRARY = {"xgb": "xgboost", "lgb": "lightgbm", "cat": "catboost"}
SCALER, RECORD = "scaler.joblib", "oos_predictions.parquet"
COLUMNS, IMPORTANCE = "feature_columns.json", "feature_importance.json"
HYPERPARAMETERS, METADATA = "hyperparameters.json", "training_metadata.json"
SHARED_FILES = (SCALER, RECORD, COLUMNS, IMPORTANCE, HYPERPARAMETERS, METADATA)
RECORD_COLUMNS = (
    "date",
    "predicted_log",
    "baseline_log",
    "raw_scaled",
    "realised_log",
    "sigma_log",
    "skill_lower",
    "fold",
    "trained_through",
)


def model_file(name: str) -> str:
    """Return the name of a booster's file."""
    return f"{name}_model.joblib"


class GBMManifest(Manifest):
    """What a saved bundle promises about itself.

    Attributes
    ----------
    models
        Names of its boosters; there is one ``<name>_model.joblib`` for each, and no other is loaded.
    libraries
        Versions that made it.
    data_hash
        Of the bars that it was trained on.
    golden_inputs, golden_outputs
        Unscaled feature rows (k, p) and what the boosters said to them, in units of volatility (k,).
    """

    SCHEMA: ClassVar[int] = SCHEMA_VERSION

    models: tuple[Literal["xgb", "lgb", "cat"], ...] = Field(min_length=1)
    libraries: dict[str, str]
    data_hash: str
    golden_inputs: list[list[float]] = Field(min_length=1)
    golden_outputs: list[float]

    @model_validator(mode="after")
    def _fits_together(self) -> "GBMManifest":
        if len(set(self.models)) < len(self.models):
            raise ValueError("a booster is listed twice")
        if absent := {*SHARED_FILES, *map(model_file, self.models)} - set(self.files):
            raise ValueError(f"{', '.join(sorted(absent))} is not listed")
        if len({len(row) for row in self.golden_inputs}) != 1 or not self.golden_inputs[0]:
            raise ValueError("the golden inputs are not a table")
        if len(self.golden_outputs) != len(self.golden_inputs):
            raise ValueError("there is not one golden output for each golden input")
        return self


class ColumnNames(BaseModel):
    """Content of ``feature_columns.json``."""

    columns: tuple[str, ...] = Field(min_length=1)
    selected: tuple[str, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _are_names_of_columns(self) -> "ColumnNames":
        if len(set(self.columns)) < len(self.columns) or len(set(self.selected)) < len(self.selected):
            raise ValueError("a column is listed twice")
        if unknown := [name for name in self.selected if name not in self.columns]:
            raise ValueError(f"selected but unknown: {', '.join(map(ascii, unknown))}")
        return self


class Fitted(BaseModel):
    """Content of ``hyperparameters.json``."""

    boosters: dict[str, Any]
    weights: dict[str, float]
    calibration: Calibration

    @model_validator(mode="after")
    def _is_finite(self) -> "Fitted":
        if not all(map(math.isfinite, [*self.weights.values(), *asdict(self.calibration).values()])):
            raise ValueError("a weight or the calibration is not finite")
        return self


class PromisedVerdict(BaseModel):
    """The part of the verdict that serving rests on."""

    label: str


class PromisedMetadata(BaseModel):
    """The part of the metadata that serving rests on."""

    model_config = ConfigDict(protected_namespaces=())

    symbol: str
    horizon_bars: int = Field(ge=1)
    model_version: str
    data_hash: str
    feature_set_hash: str
    verdict: PromisedVerdict
