"""How fast the service answers, beside a minimal FastAPI route that returns as many ready-made bytes.

Trains AAPL for the purpose, from ``../shared/market`` where it is at hand, else from the embedded sample;
starts one worker on this machine and asks it over sockets. Both servers take turns, and medians of the rounds
are compared. Uncached answers are timed in this process: prices that nobody has seen, read, checked, decided
on and drawn.

    python benchmarks/service_time.py [--quick] [--only cached,uncached,health,start,memory] [--json]
"""

import argparse
import contextlib
import dataclasses
import json
import os
import selectors
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data.data_fetcher import BarSource
from utils.base import PROJECT_ROOT

MARKET = PROJECT_ROOT.parent / "shared" / "market"
PARTS = ("cached", "uncached", "health", "start", "memory")
DAYS = 120
SYMBOLS, REQUESTS = 100, 20_000
LIMITS = {
    "cached_p50_to_floor": 1.3,
    "cached_throughput_to_floor": 0.75,
    "uncached_p50_ms": 60.0,
    "health_p99_ms": 20.0,
    "start_to_first_answer_s": 3.0,
    "memory_mib": 1024.0,
    "memory_growth": 0.02,
}
AT_LEAST = {"cached_throughput_to_floor"}
FLOOR = """
import sys, uvicorn
from fastapi import FastAPI, Response
body = open(sys.argv[1], "rb").read()
app = FastAPI()
@app.post("/api/predict")
async def ready():
    return Response(body, media_type="application/json")
@app.get("/api/health/ready")
async def health():
    return Response(b"{}", media_type="application/json")
uvicorn.run(app, port=int(sys.argv[2]), log_level="warning", access_log=False)
"""


def post(**fields: object) -> bytes:
    """Return the bytes of a request for a prediction."""
    body = json.dumps({"symbol": "AAPL", "daysOnChart": DAYS, **fields}).encode()
    head = b"POST /api/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return head + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)


def get(path: str) -> bytes:
    """Return the bytes of a request for ``path``."""
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


class Connection:
    """A kept connection that takes one answer after the other."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = b""

    def ask(self, request: bytes) -> bytes:
        """Return the body of the answer; any status but 200 ends the benchmark."""
        self.socket.sendall(request)
        while (body := self.take()) is None:
            pass
        return body

    def take(self) -> bytes | None:
        """Read once; return the body when the answer is whole."""
        data = self.socket.recv(1 << 18)
        if not data:
            raise ConnectionError("the server closed the connection")
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return None
        size = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        if len(body) < size:
            return None
        self._buffer = b""
        if b" 200 " not in head[:16]:
            raise RuntimeError(f"{head[:40]!r}: {body[:300]!r}")
        return body


def latencies_ms(port: int, request: bytes, number: int) -> list[float]:
    """Return how long each of ``number`` requests took, one after the other."""
    connection, taken = Connection(port), []
    for _ in range(number):
        began = time.perf_counter()
        connection.ask(request)
        taken.append(1000.0 * (time.perf_counter() - began))
    return taken


def per_second(port: int, requests: Sequence[bytes], number: int, connections: int = 16) -> float:
    """Return answers per second over several connections that always have one request under way."""
    selector, left = selectors.DefaultSelector(), number
    for index in range(connections):
        connection = Connection(port)
        selector.register(connection.socket, selectors.EVENT_READ, connection)
        connection.socket.sendall(requests[index % len(requests)])
    began, done = time.perf_counter(), 0
    while done < number:
        for key, _ in selector.select():
            if key.data.take() is not None:
                done += 1
                left -= 1
                key.data.socket.sendall(requests[done % len(requests)])
    return number / (time.perf_counter() - began)


class Bench:
    """Prices, a trained model and servers in a folder of their own."""

    def __init__(self, folder: Path, *, quick: bool) -> None:
        self.folder, self.quick = folder, quick
        self.source = f"csv:{MARKET}" if (MARKET / "AAPL.csv").is_file() else "sample"
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(PROJECT_ROOT),
            # Compiled once, by the training, as on any machine that is not told otherwise.
            "PYTHONDONTWRITEBYTECODE": "",
            "AI_STOCKS_SOURCE": self.source,
            "AI_STOCKS_RATE_PER_S": "0",
            "AI_STOCKS_DRAIN_S": "0",
            **{
                f"AI_STOCKS_{name.upper()}_DIR": str(folder / name)
                for name in ("models", "cache", "results", "logs")
            },
        }

    def train(self, *options: str) -> subprocess.Popen[bytes]:
        """Begin to train AAPL."""
        command = [sys.executable, "-m", "training.train_gbm", "AAPL", "--overwrite", *options]
        return subprocess.Popen(
            command,
            cwd=PROJECT_ROOT,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    @contextlib.contextmanager
    def server(self, *command: str, **changes: str) -> Iterator[tuple[int, int]]:
        """Run a server; yield its port and process id once it is ready."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        arguments = [*command, str(port)] if command else ["app.py", "--port", str(port)]
        with (self.folder / "server.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=PROJECT_ROOT,
                env={**self.environment, **changes},
                stdout=log,
                stderr=log,
            )
        try:
            while True:
                if process.poll() is not None:
                    raise RuntimeError(
                        "the server has ended: " + (self.folder / "server.log").read_text()[-500:]
                    )
                with contextlib.suppress(OSError, RuntimeError):
                    Connection(port).ask(get("/api/health/ready"))
                    break
                time.sleep(0.01)
            yield port, process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def cached(bench: Bench) -> dict[str, float]:
    """Compare an answer that is at hand with ready-made bytes."""
    rounds, number = (5, 300) if bench.quick else (15, 1000)
    ready = bench.folder / "body.json"
    with bench.server() as (port, _):
        ready.write_bytes(Connection(port).ask(post()))
        with bench.server("-c", FLOOR, str(ready)) as (floor, _):
            times: dict[int, list[float]] = {port: [], floor: []}
            rates: dict[int, list[float]] = {port: [], floor: []}
            for one in (port, floor):
                latencies_ms(one, post(), number)
            for _ in range(rounds):
                for one in (port, floor):
                    times[one].append(statistics.median(latencies_ms(one, post(), number)))
                    rates[one].append(per_second(one, [post()], 2 * number))
    ours, theirs = statistics.median(times[port]), statistics.median(times[floor])
    rate, floor_rate = statistics.median(rates[port]), statistics.median(rates[floor])
    return {
        "cached_p50_to_floor": ours / theirs,
        "cached_throughput_to_floor": rate / floor_rate,
        "cached_p50_ms": ours,
        "floor_p50_ms": theirs,
        "cached_per_s": rate,
        "floor_per_s": floor_rate,
        "answer_bytes": float(ready.stat().st_size),
    }


class Unseen(BarSource):
    """AAPL with another last price at each question."""

    name, is_live = "unseen", False

    def __init__(self, raw: pd.DataFrame) -> None:
        self._raw, self._asked = raw, 0

    def fetch(self, symbol: str, *, start: object = None) -> pd.DataFrame:
        """Return all prices."""
        del symbol, start
        self._asked += 1
        raw = self._raw.copy()
        raw.iloc[-1, : raw.columns.get_loc("Volume")] *= 1.0 + 1e-7 * self._asked
        return raw


def uncached(bench: Bench) -> dict[str, float]:
    """Time answers from prices that were never seen."""
    from data.data_fetcher import make_source
    from service.model_registry import ModelRegistry
    from service.prediction_service import PredictionService
    from service.schemas import PredictionRequest

    raw = make_source(bench.source, cache_dir=bench.folder / "cache").fetch("AAPL")
    last = raw.columns.get_loc("Volume") == len(raw.columns) - 1
    raw = raw if last else raw[[*raw.columns.drop("Volume"), "Volume"]]
    registry, source, taken = ModelRegistry(bench.folder / "models"), Unseen(raw.astype(float)), []
    request = PredictionRequest(symbol="AAPL", days_on_chart=DAYS)
    for _ in range(12 if bench.quick else 60):
        # Nothing is kept but the model.
        service = PredictionService(registry=registry, source=source, cache=None)
        began = time.perf_counter()
        service.answer(request)
        taken.append(1000.0 * (time.perf_counter() - began))
    return {"uncached_p50_ms": statistics.median(taken[2:]), "history_bars": float(len(raw))}


def health(bench: Bench) -> dict[str, float]:
    """Ask how the service is while eight predictions at a time and a training run."""
    ended = threading.Event()
    answered = [0] * 8

    def keep_predicting(port: int, caller: int) -> None:
        connection = Connection(port)
        while not ended.is_set():
            # Another limit each time, so that no answer is at hand.
            limit = 1.0 + (caller * 1_000_000 + answered[caller]) * 1e-9
            connection.ask(post(maxLong=limit))
            answered[caller] += 1

    with bench.server() as (port, _):
        Connection(port).ask(post())
        callers = [threading.Thread(target=keep_predicting, args=(port, one)) for one in range(8)]
        training = bench.train("--validate-only")
        for caller in callers:
            caller.start()
        taken: list[float] = []
        try:
            until = time.monotonic() + (4.0 if bench.quick else 15.0)
            while time.monotonic() < until:
                taken += latencies_ms(port, get("/api/health"), 5)
                time.sleep(0.01)
        finally:
            ended.set()
            for caller in callers:
                caller.join()
            training.kill()
            training.wait()
    return {
        "health_p99_ms": float(np.percentile(taken, 99)),
        "health_p50_ms": statistics.median(taken),
        "predictions_meanwhile": float(sum(answered)),
    }


def start(bench: Bench) -> dict[str, float]:
    """Time from the command to the first prediction."""
    taken = []
    for _ in range(2 if bench.quick else 5):
        began = time.perf_counter()
        with bench.server() as (port, _):
            Connection(port).ask(post())
            taken.append(time.perf_counter() - began)
    return {"start_to_first_answer_s": statistics.median(taken)}


def memory(bench: Bench) -> dict[str, float]:
    """Load many symbols, ask often, and see what the server holds."""
    symbols, requests = (10, 2_000) if bench.quick else (SYMBOLS, REQUESTS)
    names = copies(bench, symbols)
    asked = [post(symbol=name) for name in names]
    changes = {
        "AI_STOCKS_SOURCE": f"csv:{bench.folder / 'prices'}",
        "AI_STOCKS_MODELS_DIR": str(bench.folder / "many"),
    }
    with bench.server(**changes) as (port, pid):
        connection = Connection(port)
        for request in asked:
            connection.ask(request)
        loaded = resident_mib(pid)
        per_second(port, asked, requests // 2)
        half = resident_mib(pid)
        per_second(port, asked, requests // 2)
        full = resident_mib(pid)
    return {
        "memory_mib": full,
        "memory_growth": full / half - 1.0,
        "loaded_mib": loaded,
        "symbols": float(symbols),
    }


def copies(bench: Bench, number: int) -> list[str]:
    """Save AAPL's prices and model under other names."""
    from data.data_fetcher import make_source
    from inference import artifact, load_gbm_models
    from utils.model_paths import current_version

    prices, models = bench.folder / "prices", bench.folder / "many"
    prices.mkdir()
    make_source(bench.source, cache_dir=bench.folder / "cache").fetch("AAPL").to_csv(
        prices / "first.csv", index_label="Date"
    )
    bundle = load_gbm_models.load_bundle(bench.folder / "models", "AAPL")
    manifest = json.loads((current_version(bench.folder / "models", "AAPL") / "manifest.json").read_text())
    golden = np.asarray(manifest["golden_inputs"], dtype=np.float64)
    # A hundred fresh processes would take minutes; the server checks each bundle when it loads it.
    artifact.verify_in_fresh_process = lambda *_: None
    names = [f"S{index:03d}" for index in range(number)]
    for name in names:
        shutil.copyfile(prices / "first.csv", prices / f"{name}.csv")
        metadata = {**bundle.metadata, "symbol": name, "model_id": f"{name}-gbm"}
        named = dataclasses.replace(bundle, symbol=name, metadata=metadata)
        load_gbm_models.save_bundle(named, models, golden_inputs=golden)
    return names


def resident_mib(pid: int) -> float:
    """Return the memory that a process holds."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024.0


def measure(parts: Sequence[str], *, quick: bool) -> dict[str, Any]:
    """Take the figures of ``parts`` and compare them with their limits."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), quick=quick)
        if bench.train("--n-trials", "0").wait() != 0:
            raise RuntimeError("AAPL could not be trained")
        figures: dict[str, float] = {}
        for part in parts:
            figures |= {
                "cached": cached,
                "uncached": uncached,
                "health": health,
                "start": start,
                "memory": memory,
            }[part](bench)
    bars = {
        name: {
            "value": figures[name],
            "limit": limit,
            "ok": figures[name] >= limit if name in AT_LEAST else figures[name] <= limit,
        }
        for name, limit in LIMITS.items()
        if name in figures
    }
    return {
        "bars": bars,
        "figures": figures,
        "notes": {"source": bench.source.replace(str(MARKET), MARKET.name)},
    }


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description="Time the service.")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, 10 symbols, 2,000 requests")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, a comma list (default: %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the figures; exit 1 when a limit is missed."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    parts = arguments.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    result = measure(parts, quick=arguments.quick)
    for name, value in result["figures"].items():
        if name not in result["bars"]:
            print(f"{name:<28}{value:12.3f}")
    for name, bar in result["bars"].items():
        print(f"{name:<28}{bar['value']:12.3f}  limit {bar['limit']:g}  {'ok' if bar['ok'] else 'MISSED'}")
    for name, note in result["notes"].items():
        print(f"{name}: {note}")
    if arguments.json:
        print(json.dumps(result))
    return 0 if all(bar["ok"] for bar in result["bars"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
