"""The one owner of the network bundle's format; `inference.artifact` keeps its folder whole.

The network is saved twice: as ``network.keras``, which Keras opens without further objects, and as plain
arrays, which serving runs. Serving imports no TensorFlow, and unpickles nothing.
"""

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from numba import njit
from pydantic import BaseModel, ConfigDict, Field, model_validator
from scipy.special import expit

from data.indicators import cached
from data.target_engineering import Dataset
from inference import artifact
from inference.artifact import (
    COLUMNS,
    GOLDEN_ROWS,
    HYPERPARAMETERS,
    METADATA,
    RECORD,
    RECORD_COLUMNS,
    Version,
    corrupt,
    unusable,
)
from inference.intervals import Calibration, FloatArray, FloatMatrix, IntArray
from inference.pipeline import Bundle, check_golden, read_record
from utils.model_paths import LSTM

KERAS, WEIGHTS, SCALER = "network.keras", "weights.npz", "scaler.json"
FILES = (RECORD, COLUMNS, HYPERPARAMETERS, METADATA, KERAS, WEIGHTS, SCALER)
LIBRARIES = ("numpy", "numba", "scipy", "pandas", "ta-lib")
MODEL = "lstm"
# Arrays of the two recurrent layers and the two dense ones, as Keras orders them.
ARRAYS = (
    *(f"{part}_{layer}" for layer in (1, 2) for part in ("kernel", "recurrent", "bias")),
    *("dense", "dense_bias", "output", "output_bias"),
)
Weights = tuple[FloatMatrix, ...]
# So many rows are forecast at a time: what they need stays within some 30 MB.
BATCH_ROWS = 4_096


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A trained network as plain arrays: scale, run the recurrent layers, calibrate.

    It is given rows of p ``columns``. It reads ``sequence_length`` of them, the forecast row and those before
    it, at the q positions ``selected``, ascending, each value as ``(value - centre) / scale``, clipped to
    plus or minus ``limit``. ``weights`` are `ARRAYS` by name, float32; of several outputs the middle one is
    the forecast, in units of the h-day volatility once multiplied with ``target_scale``.
    """

    columns: tuple[str, ...]
    selected: tuple[int, ...]
    sequence_length: int
    centre: FloatMatrix
    scale: FloatMatrix
    limit: float
    target_scale: float
    weights: Mapping[str, FloatMatrix]
    calibration: Calibration

    @property
    def selected_features(self) -> tuple[str, ...]:
        """Names of the features that the network reads."""
        return tuple(self.columns[i] for i in self.selected)

    def prepare(self, features: FloatMatrix) -> FloatMatrix:
        """Select, scale and clip: from (m, p) features to (m, q)."""
        if features.shape[1] != len(self.columns):
            raise ValueError(f"got {features.shape[1]} features, the model knows {len(self.columns)}")
        return scale_features(columns_at(features, self.selected), self.centre, self.scale, self.limit)

    def raw_scaled(self, features: FloatMatrix, windows: IntArray) -> FloatArray:
        """Return the signal of sequences of rows, in units of the h-day volatility, (n,).

        ``features`` are unscaled and finite, (m, p); ``windows`` are the rows of each sequence, oldest first,
        (n, sequence_length).
        """
        prepared = self.prepare(features)
        arrays = tuple(self.weights[name] for name in ARRAYS)
        if len(windows) == 1:
            outputs = latest_output(prepared[windows[0]], arrays)[np.newaxis]
        else:
            projected = prepared @ arrays[0] + arrays[2]
            starts = range(0, len(windows), BATCH_ROWS)
            parts = [batch_outputs(projected, windows[i : i + BATCH_ROWS], arrays) for i in starts]
            outputs = np.concatenate(parts) if parts else np.empty((0, 1), dtype=np.float32)
        middle = outputs[:, outputs.shape[1] // 2]
        return np.asarray(middle, dtype=np.float64) * self.target_scale


def columns_at(features: FloatMatrix, selected: tuple[int, ...]) -> FloatMatrix:
    """Return the features at ``selected``, ascending; the same array where that is all of them."""
    return features if len(selected) == features.shape[1] else features[:, list(selected)]


def scale_features(
    features: FloatMatrix, centre: FloatMatrix, scale: FloatMatrix, limit: float
) -> FloatMatrix:
    """Return ``(features - centre) / scale``, clipped to plus or minus ``limit``, float32."""
    return np.asarray(np.clip((features - centre) / scale, -limit, limit), dtype=np.float32)


def windows_of(ends: IntArray, starts: IntArray, length: int) -> IntArray:
    """Return the rows of the sequences that end at ``ends``, oldest first, (n, length).

    No sequence reads a row after its end. Where there are too few rows before it, the first one,
    ``starts``, is read again.
    """
    back = np.arange(1 - length, 1)
    return np.asarray(np.maximum(ends[:, np.newaxis] + back, starts[:, np.newaxis]), dtype=np.intp)


class Sequences:
    """The features of all rows of a panel, symbol after symbol, and the sequence that ends at each of them.

    Only features are kept: nothing here knows a target.
    """

    def __init__(self, dataset: Dataset) -> None:
        order = np.lexsort((dataset.date, dataset.symbol_code))
        self.features = dataset.features[order]
        self._keys = _keys(dataset)[order]
        codes = dataset.symbol_code[order]
        self._starts = np.searchsorted(codes, codes, side="left")

    def windows(self, rows: Dataset, length: int) -> IntArray:
        """Return for each of ``rows`` the positions in `features` of its sequence, (n, length)."""
        ends = np.searchsorted(self._keys, _keys(rows))
        return windows_of(ends, self._starts[ends], length)


def _keys(rows: Dataset) -> npt.NDArray[np.int64]:
    days = rows.date.astype("datetime64[D]").astype(np.int64)
    return np.asarray(rows.symbol_code.astype(np.int64) * 2**32 + days, dtype=np.int64)


def batch_outputs(projected: FloatMatrix, windows: IntArray, weights: Weights) -> FloatMatrix:
    """Run the network over many sequences; ``projected`` is what the first kernel makes of each row."""
    _, recurrent_1, _, kernel_2, recurrent_2, bias_2, dense, dense_bias, output, output_bias = weights
    n_rows = len(windows)
    hidden_1, cell_1 = (np.zeros((n_rows, len(recurrent_1)), dtype=np.float32) for _ in range(2))
    hidden_2, cell_2 = (np.zeros((n_rows, len(recurrent_2)), dtype=np.float32) for _ in range(2))
    for step in range(windows.shape[1]):
        hidden_1, cell_1 = _gated(projected[windows[:, step]] + hidden_1 @ recurrent_1, cell_1)
        hidden_2, cell_2 = _gated(hidden_1 @ kernel_2 + hidden_2 @ recurrent_2 + bias_2, cell_2)
    rectified = np.maximum(hidden_2 @ dense + dense_bias, np.float32(0))
    return np.asarray(rectified @ output + output_bias, dtype=np.float32)


def _gated(sums: FloatMatrix, cell: FloatMatrix) -> tuple[FloatMatrix, FloatMatrix]:
    """Return hidden state and cell after one step; the gates are in Keras's order: in, forget, cell, out."""
    units = cell.shape[1]
    gates = expit(sums)
    cell = gates[:, units : 2 * units] * cell + gates[:, :units] * np.tanh(sums[:, 2 * units : 3 * units])
    return gates[:, 3 * units :] * np.tanh(cell), cell


@cached
@njit(fastmath=True)
def _step(sums: FloatMatrix, hidden: FloatMatrix, cell: FloatMatrix) -> None:
    units = len(cell)
    one, two = np.float32(1), np.float32(2)
    for k in range(units):
        entering = one / (one + np.exp(-sums[k]))
        kept = one / (one + np.exp(-sums[units + k]))
        fresh = two / (one + np.exp(-two * sums[2 * units + k])) - one
        leaving = one / (one + np.exp(-sums[3 * units + k]))
        cell[k] = kept * cell[k] + entering * fresh
        hidden[k] = leaving * (two / (one + np.exp(-two * cell[k])) - one)


@cached
@njit(fastmath=True)
def latest_output(sequence: FloatMatrix, weights: Weights) -> FloatMatrix:
    """Run the network over one prepared sequence, (length, p), as `batch_outputs` does over many."""
    kernel_1, recurrent_1, bias_1, kernel_2, recurrent_2, bias_2, dense, dense_bias, output, output_bias = (
        weights
    )
    projected = np.dot(sequence, kernel_1) + bias_1
    hidden_1, cell_1 = np.zeros_like(recurrent_1[:, 0]), np.zeros_like(recurrent_1[:, 0])
    hidden_2, cell_2 = np.zeros_like(recurrent_2[:, 0]), np.zeros_like(recurrent_2[:, 0])
    for step in range(len(sequence)):
        _step(projected[step] + np.dot(hidden_1, recurrent_1), hidden_1, cell_1)
        _step(np.dot(hidden_1, kernel_2) + np.dot(hidden_2, recurrent_2) + bias_2, hidden_2, cell_2)
    rectified = np.maximum(np.dot(hidden_2, dense) + dense_bias, np.float32(0))
    return np.dot(rectified, output) + output_bias  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True, kw_only=True)
class LSTMBundle(Bundle):
    """A network with the out-of-sample record that vouches for it; ``keras`` is it as Keras saves it."""

    network: Network
    keras: bytes

    @property
    def models(self) -> tuple[str, ...]:
        """The network is one model."""
        return (MODEL,)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the features that `signal` takes, in its order."""
        return self.network.columns

    @property
    def calibration(self) -> Calibration:
        """How far the final fit's signal may be believed."""
        return self.network.calibration

    def signal(self, features: FloatMatrix, rows: IntArray) -> tuple[dict[str, FloatArray], FloatArray]:
        """Return what the network says at the given rows, see `Bundle.signal`; it passes over gaps."""
        length = self.network.sequence_length
        kept = np.flatnonzero(np.isfinite(features).all(axis=1))
        ends = np.searchsorted(kept, rows)
        first = max(int(ends.min()) + 1 - length, 0)
        windows = windows_of(ends - first, np.zeros_like(ends), length)
        raw_scaled = self.network.raw_scaled(features[kept[first:]], windows)
        return {MODEL: raw_scaled}, raw_scaled


class LSTMManifest(artifact.Manifest):
    """What a saved bundle promises; its golden inputs are successive, the outputs are of the last ones."""

    SCHEMA: ClassVar[int] = 1
    FILES: ClassVar[tuple[str, ...]] = FILES
    NAMES: ClassVar[tuple[str, ...]] = (MODEL,)


class ScalerDocument(BaseModel):
    """Content of ``scaler.json``, see `Network`."""

    model_config = ConfigDict(allow_inf_nan=False)

    centre: tuple[float, ...] = Field(min_length=1)
    scale: tuple[float, ...]
    limit: float = Field(gt=0)
    target_scale: float = Field(gt=0)

    @model_validator(mode="after")
    def _fits_together(self) -> "ScalerDocument":
        if len(self.scale) != len(self.centre) or min(self.scale) <= 0:
            raise ValueError("there is not one positive scale for each centre")
        return self


class FittedDocument(BaseModel):
    """Content of ``hyperparameters.json``: how the network came about, and how far it may be believed."""

    model_config = ConfigDict(allow_inf_nan=False)

    sequence_length: int = Field(ge=1)
    calibration: Calibration
    fitted: dict[str, Any]


def save_bundle(bundle: LSTMBundle, models_dir: Path, *, golden_inputs: FloatMatrix) -> Path:
    """Save a bundle, see `artifact.Format.save`; with golden inputs of successive bars, (m, p)."""
    promised = {
        "libraries": artifact.library_versions(LIBRARIES),
        "golden_inputs": golden_inputs.astype(np.float64).tolist(),
        "golden_outputs": golden_outputs(bundle.network, golden_inputs).tolist(),
    }
    return FORMAT.save(bundle, models_dir, _contents(bundle), promised)


def _contents(bundle: LSTMBundle) -> dict[str, bytes]:
    network = bundle.network
    documents = {
        COLUMNS: {"columns": network.columns, "selected": network.selected_features},
        SCALER: {
            "centre": network.centre.tolist(),
            "scale": network.scale.tolist(),
            "limit": network.limit,
            "target_scale": network.target_scale,
        },
        HYPERPARAMETERS: {
            "sequence_length": network.sequence_length,
            "calibration": asdict(network.calibration),
            "fitted": bundle.hyperparameters,
        },
    }
    arrays: dict[str, Any] = {name: network.weights[name] for name in ARRAYS}
    np.savez(buffer := io.BytesIO(), **arrays)
    texts = {name: artifact.as_json(text) for name, text in documents.items()}
    return {**texts, WEIGHTS: buffer.getvalue(), KERAS: bundle.keras}


def golden_outputs(network: Network, inputs: FloatMatrix) -> FloatArray:
    """Return what the network says to the last `GOLDEN_ROWS` of successive rows, in units of volatility."""
    ends = np.arange(len(inputs))[-GOLDEN_ROWS:]
    return network.raw_scaled(inputs, windows_of(ends, np.zeros_like(ends), network.sequence_length))


def _build(version: Version[LSTMManifest], metadata: Mapping[str, Any]) -> LSTMBundle:
    fitted = artifact.document(version, HYPERPARAMETERS, FittedDocument)
    network = _network(version, fitted)
    check_golden(
        version,
        lambda rows: golden_outputs(network, rows.astype(np.float32)),
        version.manifest.golden_outputs,
    )
    return LSTMBundle(
        symbol=metadata["symbol"],
        horizon_bars=metadata["horizon_bars"],
        record=read_record(version, *RECORD_COLUMNS, f"model_{MODEL}"),
        metadata=metadata,
        importance={},
        hyperparameters=fitted.fitted,
        network=network,
        keras=version.contents[KERAS],
    )


def _network(version: Version[LSTMManifest], fitted: FittedDocument) -> Network:
    folder = version.folder
    names = artifact.document(version, COLUMNS, artifact.ColumnNames)
    scaler = artifact.document(version, SCALER, ScalerDocument)
    with unusable(folder, WEIGHTS):
        with np.load(io.BytesIO(version.contents[WEIGHTS]), allow_pickle=False) as stored:
            weights = {name: np.ascontiguousarray(stored[name], dtype=np.float32) for name in ARRAYS}
        if not all(np.isfinite(array).all() for array in weights.values()):
            raise corrupt(folder, f"{WEIGHTS} holds numbers that are not finite")
    if not len(names.selected) == len(scaler.centre) == len(weights["kernel_1"]):
        raise corrupt(folder, f"{COLUMNS}, {SCALER} and {WEIGHTS} know different numbers of features")
    return Network(
        columns=names.columns,
        selected=tuple(map(names.columns.index, names.selected)),
        sequence_length=fitted.sequence_length,
        centre=np.asarray(scaler.centre, dtype=np.float32),
        scale=np.asarray(scaler.scale, dtype=np.float32),
        limit=scaler.limit,
        target_scale=scaler.target_scale,
        weights=weights,
        calibration=fitted.calibration,
    )


FORMAT = artifact.Format(kind=LSTM, manifest=LSTMManifest, module="inference.load_lstm_model", build=_build)
load_bundle, load_folder = FORMAT.load, FORMAT.load_folder
