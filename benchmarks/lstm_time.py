"""How long an epoch of the network takes beside Keras's own loop, and a forecast of the latest bar.

    python benchmarks/lstm_time.py [--quick] [--json]

Both loops train the same model on the same 5,000 sequences, in turns; the shortest of each counts, so that a
busy machine slows both alike. The forecast is that of a loaded bundle: features of the bar are at hand, and
scaling, network and calibration are timed. Whether serving imports TensorFlow is seen in a fresh process.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from inference.intervals import Calibration
from inference.load_lstm_model import ARRAYS, Network, windows_of
from training.recipe import NetworkConfig
from training.train_lstm import Batches, KerasNetwork
from utils.base import PROJECT_ROOT

SEQUENCES, FEATURES, BATCH = 5_000, 66, 256
LIMIT_EPOCH_RATIO = 1.5
LIMIT_LATEST_MS = 0.3
LIMIT_ERROR = 1e-5
SERVED = "import inference.load_lstm_model, inference.pipeline, sys; print('tensorflow' in sys.modules)"


def seconds(work: Callable[[], object]) -> float:
    """Return how long a piece of work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def sequences(config: NetworkConfig) -> Batches:
    """Return drawn sequences and targets."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(SEQUENCES, FEATURES)).astype(np.float32)
    ends = np.arange(SEQUENCES)
    return Batches(
        features=features,
        windows=windows_of(ends, np.zeros_like(ends), config.sequence_length),
        target=rng.normal(size=(SEQUENCES, 1)).astype(np.float32),
        weight=np.ones(SEQUENCES, dtype=np.float32),
    )


def epochs(keras: KerasNetwork, batches: Batches, repeats: int) -> tuple[float, float]:
    """Return seconds of an epoch of ours and of Keras's own loop, each the shortest of several."""
    rng = np.random.default_rng(1)
    inputs = batches.features[batches.windows]

    def ours() -> None:
        keras.train_epoch(batches, keras.config.learning_rate, rng)

    def bare() -> None:
        keras.model.fit(inputs, batches.target, batch_size=BATCH, epochs=1, verbose=0)

    ours(), bare()
    pairs = [(seconds(ours), seconds(bare)) for _ in range(repeats)]
    return min(pair[0] for pair in pairs), min(pair[1] for pair in pairs)


def exported(keras: KerasNetwork, config: NetworkConfig) -> Network:
    """Return the arrays of a network as they are served."""
    return Network(
        columns=tuple(map(str, range(FEATURES))),
        selected=tuple(range(FEATURES)),
        sequence_length=config.sequence_length,
        centre=np.zeros(FEATURES, dtype=np.float32),
        scale=np.ones(FEATURES, dtype=np.float32),
        limit=config.feature_limit,
        target_scale=1.0,
        weights=dict(zip(ARRAYS, keras.weights(), strict=True)),
        calibration=Calibration(drift=0.0, raw_mean=0.0, slope=1.0, skill_lower=0.0, n_rows=0),
    )


def measure(*, quick: bool) -> dict[str, Any]:
    """Take the times and compare them with their limits."""
    config = NetworkConfig(batch_size=BATCH)
    batches, keras = sequences(config), KerasNetwork(config, FEATURES)
    ours, bare = epochs(keras, batches, 2 if quick else 5)
    network = exported(keras, config)
    latest = batches.features[-config.sequence_length :]
    window = np.arange(config.sequence_length)[np.newaxis]
    network.raw_scaled(latest, window)
    calls = 200 if quick else 2_000
    taken = [
        seconds(lambda: network.calibration.apply(network.raw_scaled(latest, window))) for _ in range(calls)
    ]
    windows = batches.windows[-500:]
    theirs = keras.model.predict_on_batch(network.prepare(batches.features)[windows])[:, 0]
    error = float(np.abs(network.raw_scaled(batches.features, windows) - theirs).max())
    command = [sys.executable, "-c", SERVED]
    imports = subprocess.run(
        command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    return {
        "bars": {
            "epoch_to_bare_keras": _bar(ours / bare, LIMIT_EPOCH_RATIO),
            "latest_bar_ms": _bar(float(np.median(taken)) * 1e3, LIMIT_LATEST_MS),
            "error_to_keras": _bar(error, LIMIT_ERROR),
        },
        "notes": {
            "sequences": SEQUENCES,
            "batch": BATCH,
            "epoch_s": ours,
            "bare_keras_epoch_s": bare,
            "serving_imports_tensorflow": imports,
        },
    }


def _bar(value: float, limit: float) -> dict[str, float | bool]:
    return {"value": value, "limit": limit, "met": value <= limit}


def main() -> int:
    """Print what was measured; return 1 when a limit is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = measure(quick=args.quick)
    if args.json:
        print(json.dumps(found))
    else:
        for name, bar in found["bars"].items():
            print(f"{name}: {bar['value']:.3g} (limit {bar['limit']:g}) {'met' if bar['met'] else 'MISSED'}")
        for name, value in found["notes"].items():
            print(f"{name}: {value}")
    return 0 if all(bar["met"] for bar in found["bars"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
