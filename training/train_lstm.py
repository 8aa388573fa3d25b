"""Train, validate and save the small network of symbols; ``docs/training.md`` explains every flag.

::

    python -m training.train_lstm AAPL --epochs 50 --batch-size 512
    python -m training.train_lstm AAPL MSFT --universe us50 --loss quantile

What makes the numbers honest is shared with the boosters: rows, targets, walk-forward, calibration, verdict.
A sequence is the features of a bar and of the bars before it, of one symbol. TensorFlow is imported when a
network is trained, and by nothing else in the product.
"""

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
from sklearn.preprocessing import RobustScaler

from data.data_splitter import split_latest
from data.target_engineering import DEFAULT_HORIZON_BARS, Dataset, check_horizon
from inference.artifact import GOLDEN_ROWS, library_versions
from inference.intervals import Calibration, FloatArray, FloatMatrix, IntArray
from inference.load_lstm_model import (
    ARRAYS,
    LIBRARIES,
    MODEL,
    LSTMBundle,
    Network,
    Sequences,
    load_folder,
    save_bundle,
    scale_features,
)
from training.recipe import (
    Fitted,
    Loss,
    LSTMConfig,
    NetworkConfig,
    chooser,
    direction_weights,
    drift_by_symbol,
    evidence,
    sample_weights,
    some_rows,
    training_rows,
    without_symbols,
)
from training.run_log import Program, common_parser, refuse_common
from training.train_gbm import run
from training.trainer import FinalRecipe, OnEvent, Trainer, Walked
from utils.base import CollapsedError, UsageError, at_least, below, silent_stderr
from utils.model_paths import LSTM
from validation.gates import collapse_of
from validation.walk_forward import RecipePrediction

QUANTILES = (0.1, 0.5, 0.9)
# Every so many epochs the signal is looked at, see `collapse_of`.
MONITOR_EPOCHS = 5
# Validation rows are forecast so many at a time.
CHUNK_ROWS = 2_048
# Smaller batches than asked for are taken where an epoch would have fewer steps.
MIN_STEPS, MIN_BATCH_ROWS, MIN_INNER_ROWS = 10, 32, 100
USUAL_FORGET_BIAS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Batches:
    """Sequences with their targets, as the network learns them.

    Scaled features of all rows, (m, p); positions of each sequence in them, (n, length); targets in
    deviations of the training target, (n, 1); sample weights, (n,).
    """

    features: FloatMatrix
    windows: IntArray
    target: FloatMatrix
    weight: FloatMatrix

    def take(self, index: IntArray) -> tuple[FloatMatrix, FloatMatrix, FloatMatrix]:
        """Return inputs (k, length, p), targets and weights of some sequences."""
        return self.features[self.windows[index]], self.target[index], self.weight[index]


def learning_rate(epoch: int, config: NetworkConfig) -> float:
    """Return the rate of an epoch, counted from 0: linear warm-up from a tenth, then a cosine."""
    top, warm = config.learning_rate, config.warmup_epochs
    if epoch < warm:
        return top * (0.1 + 0.9 * epoch / max(warm - 1, 1))
    return top * 0.5 * (1 + float(np.cos(np.pi * (epoch - warm) / max(config.epochs - warm, 1))))


def require_tensorflow() -> None:
    """Raise `UsageError` where TensorFlow is not installed."""
    if importlib.util.find_spec("tensorflow") is None:
        raise UsageError('networks are trained with TensorFlow: pip install ".[lstm]"')


class KerasNetwork:
    """The Keras model: built once, set back to its seeded beginning for every fit, always on the CPU."""

    def __init__(self, config: NetworkConfig, n_features: int) -> None:
        require_tensorflow()
        # TensorFlow greets, whatever its log level is.
        with silent_stderr():
            import keras  # noqa: PLC0415 - a gigabyte, only for who trains a network
            import tensorflow as tf  # noqa: PLC0415

            # It would take all of a GPU's memory for a network that gains little from it.
            tf.config.set_visible_devices([], "GPU")
        self._keras, self.config = keras, config
        self.model = self._build(n_features)
        optimizer = keras.optimizers.Adam(config.learning_rate, clipnorm=1.0)
        # XLA takes four times as long for these layers.
        self.model.compile(optimizer=optimizer, loss=self.loss, jit_compile=False)
        optimizer.build(self.model.trainable_variables)
        self._state = [*self.model.variables, *optimizer.variables]
        self._beginning = [variable.numpy().copy() for variable in self._state]

    def _build(self, n_features: int) -> Any:  # noqa: ANN401 - Keras is not typed
        keras, config = self._keras, self.config
        seeds = map(int, np.random.SeedSequence(config.seed).generate_state(16) >> 1)

        def drawn(units: int) -> dict[str, object]:
            return {"units": units, "kernel_initializer": keras.initializers.GlorotUniform(next(seeds))}

        def recurrent(units: int, *, sequences: bool) -> Any:  # noqa: ANN401
            orthogonal = keras.initializers.Orthogonal(seed=next(seeds))
            return keras.layers.LSTM(
                **drawn(units), recurrent_initializer=orthogonal, return_sequences=sequences
            )

        outputs = len(QUANTILES) if config.loss == "quantile" else 1
        first, second = config.units
        return keras.Sequential(
            [
                keras.Input((config.sequence_length, n_features)),
                recurrent(first, sequences=True),
                keras.layers.Dropout(config.dropout, seed=next(seeds)),
                recurrent(second, sequences=False),
                keras.layers.Dropout(config.dropout, seed=next(seeds)),
                keras.layers.Dense(**drawn(config.dense_units), activation="relu"),
                keras.layers.Dense(outputs, kernel_initializer="zeros"),
            ]
        )

    def loss(self, target: Any, output: Any) -> Any:  # noqa: ANN401
        """Return the loss of each row, (n,)."""
        ops = self._keras.ops
        if self.config.loss == "quantile":
            above = target - output
            levels = ops.convert_to_tensor(np.array([QUANTILES], dtype=np.float32))
            return ops.mean(ops.maximum(levels * above, (levels - 1) * above), axis=-1)
        if self.config.loss == "mae":
            return self._keras.losses.mean_absolute_error(target, output)
        return self._keras.losses.huber(target, output)

    def begin(self, forget_bias: float = USUAL_FORGET_BIAS) -> None:
        """Forget every fit; the forget gates begin with this bias."""
        for variable, value in zip(self._state, self._beginning, strict=True):
            variable.assign(value)
        for layer in self.model.layers[:3:2]:
            kernel, recurrent, bias = layer.get_weights()
            # The gates are in Keras's order: in, forget, cell, out.
            bias[layer.units : 2 * layer.units] = forget_bias
            layer.set_weights([kernel, recurrent, bias])

    def train_epoch(
        self, batches: Batches, rate: float, rng: np.random.Generator, least_steps: int = MIN_STEPS
    ) -> float:
        """Go once through all sequences in a drawn order, in so many steps or more; return the mean loss."""
        order = rng.permutation(len(batches.target))
        total = 0.0
        self.model.optimizer.learning_rate.assign(rate)
        # An epoch of few large steps would end before the network has left its beginning.
        size = min(self.config.batch_size, max(len(order) // least_steps, MIN_BATCH_ROWS))
        for start in range(0, len(order), size):
            inputs, target, weight = batches.take(order[start : start + size])
            loss = self.model.train_on_batch(inputs, target, sample_weight=weight)
            total += float(loss) * len(target)
        return total / len(order)

    def look(self, batches: Batches) -> tuple[float, FloatArray]:
        """Return the weighted loss of sequences that are not learned, and the signal, (n,)."""
        index = np.arange(len(batches.target))
        chunks = np.split(index, range(CHUNK_ROWS, len(index), CHUNK_ROWS))
        outputs = np.concatenate([self.model.predict_on_batch(batches.take(c)[0]) for c in chunks])
        losses = self.loss(batches.target, outputs).numpy()
        middle = outputs[:, outputs.shape[1] // 2].astype(np.float64)
        return float(np.average(losses, weights=batches.weight)), middle

    def weights(self) -> list[FloatMatrix]:
        """Return copies of the trained arrays, in the order of `ARRAYS`."""
        return [np.array(array, dtype=np.float32) for array in self.model.get_weights()]

    def saved(self, network: Network) -> bytes:
        """Return the model of a network as Keras saves it, without the loss: it loads by itself."""
        bare = self._build(self.model.input_shape[-1])
        bare.set_weights([network.weights[name] for name in ARRAYS])
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "network.keras")
            bare.save(path)
            return path.read_bytes()


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedLSTM(Fitted[Network]):
    """One fold's fit of the network.

    ``best_epoch`` is counted from 1. ``keras`` is the network as Keras saves it, of the final fit alone.
    """

    sequences: Sequences
    epochs: tuple[Mapping[str, Any], ...]
    best_epoch: int
    keras: bytes = b""

    @property
    def notes(self) -> Mapping[str, object]:
        """What the fold table shows beside the metrics."""
        own, ran = self.model.calibration, {"epochs": len(self.epochs), "best_epoch": self.best_epoch}
        return {"slope": own.slope, "skill_lower": own.skill_lower, **ran}

    def predict(self, rows: Dataset) -> RecipePrediction:
        """Forecast rows that were not seen."""
        windows = self.sequences.windows(rows, self.model.sequence_length)
        used, place = np.unique(windows, return_inverse=True)
        raw_scaled = self.model.raw_scaled(self.sequences.features[used], place.reshape(windows.shape))
        return self.calibrated(rows, {MODEL: raw_scaled}, raw_scaled)


class LSTMRecipe(FinalRecipe[FittedLSTM]):
    """Fits the network every few folds, and its calibration in every fold, in order of time.

    ``sequences`` hold the features of all rows of the run; ``on_event`` is told of every epoch.
    """

    def __init__(self, config: NetworkConfig, sequences: Sequences, on_event: OnEvent | None = None) -> None:
        self.config = config
        self._sequences = sequences
        self._tell: OnEvent = on_event or (lambda _event: None)
        self._keras: KerasNetwork | None = None
        self._fitted: FittedLSTM | None = None

    def fit(self, train: Dataset, *, fold: int, earlier: pd.DataFrame, name: str | None = None) -> FittedLSTM:
        """Fit, see `training.recipe.GBMRecipe.fit`; a network that has collapsed is a `CollapsedError`."""
        train, earlier = without_symbols(train, earlier, self.config.leave_out)
        if self._fitted is None or fold % self.config.refit_every_folds == 0:
            self._fitted = self._fit_network(train, name or f"fold {fold}")
        drifts = drift_by_symbol(train, sample_weights(train, self.config.weight_half_life_sessions))
        _, pooled, own = evidence(earlier, (MODEL,), *drifts, train.horizon_bars)
        return replace(self._fitted, model=replace(self._fitted.model, calibration=pooled), calibrations=own)

    def fit_all(self, dataset: Dataset, record: pd.DataFrame) -> FittedLSTM:
        """Fit on every labelled row, calibrated on the whole walk-forward record."""
        labelled = dataset.take(np.flatnonzero(dataset.labelled))
        fitted = self.fit(labelled, fold=0, earlier=record, name="final fit")
        return replace(fitted, keras=self._keras_of(len(fitted.model.selected)).saved(fitted.model))

    def _fit_network(self, train: Dataset, name: str) -> FittedLSTM:
        config = self.config
        inner, later = split_latest(
            train.date, train.label_end, config.validation_share, at_least_rows=MIN_INNER_ROWS
        )
        scaler = RobustScaler().fit(some_rows(train.features[inner]))
        centre, scale = (part.astype(np.float32) for part in (scaler.center_, scaler.scale_))
        rows = training_rows(train, train.features, config)
        # The rows that decide when to stop choose no features.
        scaled = scale_features(train.features[inner], centre, scale, config.feature_limit)
        selected = chooser(train, config)(replace(rows.take(inner), features=scaled))
        network = Network(
            columns=train.columns,
            selected=selected,
            sequence_length=config.sequence_length,
            centre=centre[list(selected)],
            scale=scale[list(selected)],
            limit=config.feature_limit,
            target_scale=float(rows.target_scaled[inner].std()) or 1.0,
            weights={},
            calibration=Calibration(drift=0.0, raw_mean=0.0, slope=0.0, skill_lower=0.0, n_rows=0),
        )
        features = network.prepare(self._sequences.features)
        windows = self._sequences.windows(train, config.sequence_length)
        target = (rows.target_scaled / network.target_scale).astype(np.float32)[:, np.newaxis]
        weight = (rows.weight / rows.weight[inner].mean()).astype(np.float32)
        if config.loss == "balanced":
            weight = weight * direction_weights(target)
        batches, checked = (
            Batches(features=features, windows=windows[part], target=target[part], weight=weight[part])
            for part in (inner, later)
        )
        weights, epochs, best = self._run(batches, checked, name, is_alone=len(train.symbols) == 1)
        network = replace(network, weights=dict(zip(ARRAYS, weights, strict=True)))
        return FittedLSTM(
            model=network, calibrations={}, sequences=self._sequences, epochs=epochs, best_epoch=best
        )

    def _keras_of(self, n_features: int) -> KerasNetwork:
        """Return the model for so many features; it is built anew only where their number has changed."""
        if self._keras is None or self._keras.model.input_shape[-1] != n_features:
            self._keras = KerasNetwork(self.config, n_features)
        return self._keras

    def _run(
        self, batches: Batches, checked: Batches, name: str, *, is_alone: bool
    ) -> tuple[list[FloatMatrix], tuple[Mapping[str, Any], ...], int]:
        """Train until the validation loss stops falling; return the best weights, all epochs, the best."""
        config = self.config
        keras = self._keras_of(batches.features.shape[1])
        keras.begin(config.forget_bias if is_alone else USUAL_FORGET_BIAS)
        least_steps = config.least_steps if is_alone else MIN_STEPS
        rng = np.random.default_rng(config.seed)
        # What the warm-up leaves hardly differs from the zero that the network begins with: it would be the
        # safest forecast of every series, and say nothing of any.
        first = min(config.warmup_epochs, config.epochs - 1)
        kept, best, lowest = keras.weights(), first, np.inf
        told: list[Mapping[str, Any]] = []
        for epoch in range(config.epochs):
            rate = learning_rate(epoch, config)
            train_loss = keras.train_epoch(batches, rate, rng, least_steps)
            loss, signal = keras.look(checked)
            told.append(
                {
                    "epoch": epoch + 1,
                    "totalEpochs": config.epochs,
                    "trainLoss": train_loss,
                    "valLoss": loss,
                    "learningRate": rate,
                    "directionalAccuracy": float(np.mean((signal > 0) == (checked.target[:, 0] > 0))),
                    # How much of the outcomes' spread is forecast: near zero is a network about to collapse.
                    "varianceScore": float(signal.std() / checked.target.std()),
                }
            )
            self._tell({"type": "epoch", "fit": name, **told[-1]})
            if epoch >= first and loss < lowest:
                kept, best, lowest = keras.weights(), epoch + 1, loss
            # During the warm-up the signal is still leaving the zero that it begins with.
            is_due = (epoch + 1) % MONITOR_EPOCHS == 0 and epoch >= config.warmup_epochs
            if is_due and (how := collapse_of(signal)):
                raise CollapsedError(
                    f"{name}: after {epoch + 1} epochs the network has collapsed, {how}; nothing was saved: "
                    "try another --loss, --learning-rate or --seed, or more prices"
                )
            if epoch + 1 - best >= config.patience_epochs:
                break
        return kept, tuple(told), best


class LSTMTrainer(Trainer[FittedLSTM, LSTMBundle]):
    """Trains networks, see `Trainer`; also tells of every epoch (``{"type": "epoch", ...}``)."""

    kind = LSTM
    config: LSTMConfig

    def __init__(self, config: LSTMConfig, on_event: OnEvent | None = None) -> None:
        super().__init__(config, on_event)
        self.golden_rows = GOLDEN_ROWS + config.recipe.sequence_length - 1

    def recipe(self, dataset: Dataset) -> LSTMRecipe:
        """Return the network's recipe."""
        return LSTMRecipe(self.config.recipe, Sequences(dataset), self._tell)

    def bundle_of(
        self, walked: Walked[FittedLSTM], symbol: str, record: pd.DataFrame, metadata: Mapping[str, Any]
    ) -> LSTMBundle:
        """Return the final network with the symbol's calibration."""
        fit = walked.fitted
        return LSTMBundle(
            symbol=symbol,
            horizon_bars=self.config.horizon_bars,
            record=record,
            metadata=metadata,
            importance={},
            hyperparameters={"best_epoch": fit.best_epoch, "epochs": fit.epochs},
            network=fit.for_symbol(symbol),
            keras=fit.keras,
        )

    @property
    def facts(self) -> dict[str, object]:
        """Versions and device, see `Trainer.facts`."""
        return {
            "versions": library_versions([*LIBRARIES, "scikit-learn", "tensorflow", "keras"]),
            "device": "cpu",
            "device_reason": "a small network gains little elsewhere, and comes out the same here every time",
        }


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    program = Program(
        check=check,
        config=config_from,
        trainer=lambda config, _args, _n_rows, on_event: LSTMTrainer(config, on_event),
        save=save_bundle,
        load_folder=load_folder,
    )
    parser, model = common_parser(LSTM, "Train, validate and save the network of symbols.", program)
    add, default, count = model.add_argument, NetworkConfig(), at_least(1)

    def horizon(text: str) -> tuple[int]:
        return (count(text),)

    add("--target-horizon", type=horizon, default=(DEFAULT_HORIZON_BARS,), metavar="BARS", help="bars ahead")
    add("--loss", choices=get_args(Loss), default=default.loss)
    add("--epochs", type=count, default=default.epochs, help="epochs at most")
    add("--batch-size", type=count, default=default.batch_size, help="sequences of one step")
    add("--sequence-length", type=count, default=default.sequence_length, help="bars that the network reads")
    years = "years between two fits of the walk-forward"
    add("--refit-every-folds", type=count, default=default.refit_every_folds, help=years)
    add("--dropout", type=below(0.9), default=default.dropout, help="share that is dropped")
    add("--learning-rate", type=below(1.0), default=default.learning_rate)
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuse flags that cannot be meant together, and to train without TensorFlow."""
    refuse_common(args)
    if not args.rollback:
        require_tensorflow()


def config_from(args: argparse.Namespace) -> LSTMConfig:
    """Return the trainer's configuration that the command line asks for."""
    names = set(asdict(NetworkConfig())) & set(vars(args))
    recipe = NetworkConfig(**{name: getattr(args, name) for name in names})
    return LSTMConfig(horizon_bars=check_horizon(args.target_horizon[0]), recipe=recipe)


def main(argv: list[str] | None = None) -> int:
    """Train the networks of the symbols, see `training.train_gbm.run`."""
    return run(build_parser().parse_args(argv))


if __name__ == "__main__":
    # Worker processes must find this module under its own name.
    from training.train_lstm import main as entry

    sys.exit(entry())
