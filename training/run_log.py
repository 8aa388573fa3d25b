"""How a command that trains is asked, and what it tells: a plain log per run, the report, the terminal.

The log is written anew after every event: a run that is killed leaves what it had come to, without its last
section, STATUS: one word, and why. Trouble with log or report is a warning, no failure.
"""

import argparse
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from pydantic.alias_generators import to_camel
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from evaluation.charts import Report
from evaluation.report import training_report, write_report
from training.trainer import OnEvent, RowsConfig, Trained, Trainer, WalkConfig, leaves
from utils import base as errors
from utils.base import Settings, at_least, configure_logging, json_lines, print_rows
from utils.model_paths import ArtifactKind, artifact_link
from validation.gates import in_words

logger = logging.getLogger(__name__)

Status = Literal["SUCCESS", "NO_EDGE", "COLLAPSED", "FAILED"]
SECTIONS = ("TRAINING CONFIG", "FOLD METRICS", "FINAL METRICS", "WARNINGS", "STATUS")
COLLAPSED_SHARE = 0.5
INTERRUPTED = 130
INTERRUPTED_LINE = "interrupted: what was not saved yet is lost, what served before still serves\n"
GRACE_S = 2.0
MAX_SEED = 2**31 - 1  # what every library takes
Outcome = dict[str, Any]
IN_EVERY_OUTCOME = (
    "model_version", "out_of_sample_from", "trained_through", "horizon_bars", "data_hash", "tries",
)  # fmt: skip
FOLD_COLUMNS = (
    "number", "test_start", "test_end", "n", "ic", "ic_low", "ic_high", "symbol_ic", "hit_minus_base",
    "sharpe", "sharpe_buy_hold", "calibration_slope", "pred_std_over_target_std", "share_positive",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What one kind of model adds to the common command line; it travels as ``args.program``.

    ``check`` refuses what the flags cannot mean together; ``trainer`` is told for about how many rows it is.
    """

    check: Callable[[argparse.Namespace], None]
    config: Callable[[argparse.Namespace], WalkConfig]
    trainer: Callable[[Any, argparse.Namespace, int, OnEvent], Trainer[Any, Any]]
    save: Callable[..., Path]
    load_folder: Callable[[Path], object]


def common_parser(
    kind: ArtifactKind, description: str, program: Program | None = None
) -> tuple[argparse.ArgumentParser, Any]:
    """Return a parser with the flags of all that trains (a program's, too), and its group for the model."""
    parser = argparse.ArgumentParser(prog=f"python -m {kind.trainer}", description=description)
    parser.set_defaults(kind=kind, program=program)
    flag = "store_true"
    parser.add_argument("symbols", nargs="+", metavar="SYMBOL")
    prices, model, run = (parser.add_argument_group(name) for name in ("prices", "model", "run"))
    prices.add_argument("--source", help="yahoo, sample or csv:DIR (default: AI_STOCKS_SOURCE, or yahoo)")
    prices.add_argument("--no-cache", action=flag, help="neither read nor write cached prices")
    prices.add_argument("--force-refresh", action=flag, help="fetch the whole history again")
    model.add_argument("--seed", type=at_least(1, MAX_SEED), default=RowsConfig().seed)
    run.add_argument("--overwrite", action=flag, help="train although a bundle is there")
    run.add_argument("--validate-only", action=flag, help="judge and report, save no model")
    run.add_argument("--strict", action=flag, help="save nothing unless the verdict is edge (exit 7)")
    run.add_argument("--json", action=flag, help="print the result as JSON on stdout")
    run.add_argument("--events", metavar="FILE", help="tell the progress to a program: a JSON object a line")
    if program is not None:
        add = prices.add_argument
        add("--universe", metavar="NAME|A,B,C|FILE", help="train one pooled model on these, too")
        add("--leave-symbol-out", action=flag, help="a symbol's pooled model never sees its rows")
        run.add_argument("--jobs", type=at_least(1), default=1, help="symbols trained, or read, at a time")
        run.add_argument("--rollback", action=flag, help="train nothing: the version before serves again")
    return parser, model


def refuse_common(args: argparse.Namespace) -> None:
    """Refuse flags of every kind of model that cannot be meant together."""
    trains = ("universe", "validate_only", "strict", "tune", "overwrite", "force_refresh", "no_cache")
    beside = next((name for name in trains if getattr(args, name, None)), "").replace("_", "-")
    refuse(
        {
            f"--rollback trains nothing: leave --{beside} out": args.rollback and beside,
            "--universe names nothing: give a set, symbols or a file": args.universe == "",
            "--leave-symbol-out needs the others: add --universe": args.leave_symbol_out
            and not args.universe,
            "--validate-only saves nothing: leave --overwrite out": args.validate_only and args.overwrite,
        }
    )


def refuse(wrong: Mapping[str, object]) -> None:
    """Raise `UsageError` with the first words whose condition holds."""
    if said := [words for words, holds in wrong.items() if holds]:
        raise errors.UsageError(said[0])


class RunLog(logging.Handler):
    """The log of one run for one symbol; where it cannot be written, it is silent after one warning."""

    def __init__(self, folder: Path, symbol: str, config: Mapping[str, Any], kind: str) -> None:
        super().__init__(logging.WARNING)
        self.path: Path | None = folder / f"{symbol}_{kind}_{datetime.now(UTC):%Y%m%dT%H%M%S%f}.log"
        self.status: Status | None = None
        self.has_ended = False  # once it is delivered: what goes wrong later befalls another symbol
        self._folds: list[Mapping[str, Any]] = []
        self._sections: dict[str, list[str]] = {name: [] for name in SECTIONS}
        self._sections["TRAINING CONFIG"] = _lines(config)
        self._write()

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Take down a fold; stages are shown elsewhere."""
        if event["type"] == "fold":
            self._folds.append(event)
            self._sections["FOLD METRICS"] = fold_lines(self._folds)
            self._write()

    def emit(self, record: logging.LogRecord) -> None:
        """Take down a warning of a library, once."""
        text = f"{record.name}: {record.getMessage()}"
        if text not in self._sections["WARNINGS"]:
            self._sections["WARNINGS"].append(text)

    def conclude(self, trained: Trained[Any]) -> None:
        """Take down what came out of a walk-forward."""
        metadata, summary = trained.bundle.metadata, trained.walk_forward.summary
        more = {"path models": metadata["path_models"], "across folds": asdict(summary)}
        has_collapsed = (summary.collapsed_folds or 0.0) >= COLLAPSED_SHARE
        self.end(metadata, {**more, "duration_s": metadata["duration_s"]}, has_collapsed=has_collapsed)

    def end(
        self, metadata: Mapping[str, Any], more: Mapping[str, Any], *, has_collapsed: bool = False
    ) -> None:
        """Take down the verdict and the figures behind it, and what there is ``more``, by name."""
        verdict, data = metadata["verdict"], metadata["data"]
        facts = {name: metadata[name] for name in ("symbol", "source", "data_hash", "model_version")}
        facts |= {name: data[name] for name in ("first_session", "last_session")}
        known = {"verdict": verdict["label"], "evidence": verdict["evidence"], "metrics": metadata["metrics"]}
        lines = _lines({**facts, **known, **more})
        for gate in verdict["gates"]:
            # In the unit of its threshold.
            value = in_words(gate["value"], ".2%" if gate["threshold"].endswith("%") else ".4g")
            result = {None: "not computed", False: "failed", True: "passed"}[gate["passed"]]
            lines.append(f"gate {gate['name']}: {value} (threshold {gate['threshold']}) {result}")
        self._sections |= {"FOLD METRICS": fold_lines(metadata.get("folds", ())), "FINAL METRICS": lines}
        self._sections["WARNINGS"] += data.get("problems", ())
        word: Status = "SUCCESS" if verdict["label"] == "edge" else "NO_EDGE"
        self._finish("COLLAPSED" if has_collapsed else word, verdict["reasons"])

    def fail(self, error: BaseException) -> None:
        """Take down how the run ended; a refused verdict keeps its status."""
        if self.has_ended:
            return
        if isinstance(error, errors.GateRefusedError) and self.status is not None:
            self._finish(self.status, (*self._sections["STATUS"][1:], f"refused: {error}"))
        else:
            word: Status = "COLLAPSED" if isinstance(error, errors.CollapsedError) else "FAILED"
            self._finish(word, (f"{type(error).__name__}: {str(error) or 'interrupted'}",))

    def _finish(self, status: Status, reasons: Sequence[str]) -> None:
        self.status = status
        self._sections["STATUS"] = [status, *reasons]
        self._write()

    def _write(self) -> None:
        if self.path is None:
            return
        lines = []
        for name, content in self._sections.items():
            # No STATUS yet means that the run is not over, or was killed. What is said twice is told once.
            if name != "STATUS" or content:
                lines += [f"=== {name} ===", *(dict.fromkeys(content) or ["none"]), ""]
        folder, part = self.path.parent, self.path.with_name(f".{self.path.name}.part")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            part.write_text("\n".join(lines), encoding="utf-8")
            part.replace(self.path)
        except OSError as error:
            logger.warning("no training log in %s: %s; the training goes on", folder, error.strerror)
            self.path = None


def fold_lines(folds: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the folds as a table of text; a column is there when a fold has it."""
    if not folds:
        return []
    columns = [name for name in FOLD_COLUMNS if any(name in fold for fold in folds)]
    rows = [columns, *([_text(fold.get(name)) for name in columns] for fold in folds)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    return ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows]


def _lines(nested: Mapping[str, Any]) -> list[str]:
    return [f"{name}: {_text(value)}" for name, value in leaves(nested)]


def together(*listeners: OnEvent) -> OnEvent:
    """Return a listener that tells all of these; nobody where there are none."""

    def tell(event: Mapping[str, Any]) -> None:
        for listener in listeners:
            listener(event)

    return tell


@contextmanager
def interruptible() -> Iterator[None]:
    """Let the first SIGINT end the run by a `KeyboardInterrupt`, so that what is half written is removed."""

    # Nothing but the end of the process stops the threads that a search waits for.
    def end() -> None:
        for handler in logging.getLogger().handlers:
            if isinstance(handler, RunLog):
                handler.fail(KeyboardInterrupt())
        sys.stderr.write(INTERRUPTED_LINE)
        sys.stderr.flush()
        os._exit(INTERRUPTED)

    def on_signal(number: int, frame: FrameType | None) -> None:
        timer = threading.Timer(GRACE_S, end)
        timer.daemon = True
        timer.start()
        signal.default_int_handler(number, frame)

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def logged_run(folder: Path, symbol: str, config: Mapping[str, Any], kind: str) -> Iterator[RunLog]:
    """Keep the log of a run; an error ends it as FAILED."""
    log = RunLog(folder, symbol, config, kind)
    logging.getLogger().addHandler(log)
    try:
        yield log
    except BaseException as error:
        log.fail(error)
        raise
    finally:
        logging.getLogger().removeHandler(log)


def publish(page: Report, folder: Path, metadata: Mapping[str, Any]) -> Path | None:
    """Write a bundle's report into ``folder``; None, after a warning, where that cannot be done."""
    kind = metadata["model_id"].rpartition("-")[2]
    try:
        return write_report(page, folder / f"{metadata['symbol']}_{kind}_{metadata['model_version']}.html")
    except errors.StorageError as error:
        logger.warning("no report of the training: %s", error)
        return None


def publish_report(trained: Trained[Any], folder: Path) -> Path | None:
    """Write the HTML report of a training, see `publish`."""
    bundle, metadata = trained.bundle, trained.bundle.metadata
    page = training_report(
        symbol=bundle.symbol,
        metadata=metadata,
        record=bundle.record,
        importance=bundle.importance,
        trials=trained.trials,
        summary=asdict(trained.walk_forward.summary),
        findings=metadata["data"]["problems"],
        epochs=bundle.hyperparameters.get("epochs", ()),
    )
    return publish(page, folder, metadata)


def _text(value: object) -> str:
    return in_words(value, ".4g") if value is None or isinstance(value, float) else str(value)


def outcome_of(
    metadata: Mapping[str, Any], names: Sequence[str], paths: Mapping[str, Path | None]
) -> Outcome:
    """Return the result of one symbol as plain data: the verdict, named metadata, where things are."""
    verdict = metadata["verdict"]
    return {
        "symbol": metadata["symbol"],
        "verdict": verdict["label"],
        **{name: verdict[name] for name in ("reasons", "evidence", "bypassed_gates")},
        **{name: metadata[name] for name in (*IN_EVERY_OUTCOME, *names)},
        **{name: path and str(path) for name, path in paths.items()},
    }


def refuse_existing(symbol: str, args: argparse.Namespace, settings: Settings) -> None:
    """Refuse to replace a bundle without being told to."""
    exists = artifact_link(settings.models_dir, symbol, args.kind).exists()
    if exists and not (args.overwrite or args.validate_only):
        name = "an ensemble" if args.program is None else "a model"
        raise errors.ModelExistsError(f"{symbol} has {name} already: add --overwrite to train it anew")


def refused(symbol: str, error: errors.AIStocksError) -> Outcome:
    """Return the outcome of a symbol that could not be trained."""
    found = error.found if isinstance(error, errors.GateRefusedError) else {}
    return {"symbol": symbol, "error": str(error), "exit_code": error.exit_code, **found}


def show(outcome: Outcome, console: Console, *, in_full: bool) -> None:
    """Print an outcome for a person; errors go to stderr, and nothing else does where JSON is wanted."""
    if "error" in outcome:
        Console(stderr=True).print(f"[red]error:[/red] {escape(outcome['error'])}", soft_wrap=True)
    elif in_full and "rolled_back_from" in outcome:
        console.print(outcome["message"], soft_wrap=True)
    elif in_full:
        joined = f", models joined by {outcome['method']}" if "parts" in outcome else ""
        parts = outcome.get("parts") or {"table": summary(outcome), "notes": []}
        console.print(f"{outcome['symbol']}: {outcome['verdict']}{joined}", style="italic")
        print_rows(console, parts["table"])
        gates = ", ".join(outcome["bypassed_gates"] if outcome["bundle"] else ())
        bypassed = [f"saved although these classic gates fail: {gates}"] if gates else []
        for text in (*parts["notes"], *outcome["reasons"], *bypassed):
            console.print(f"  - {escape(text)}", soft_wrap=True)
        for name in ("bundle", "report", "log"):
            console.print(f"{name}: {escape(str(outcome[name] or 'none'))}", soft_wrap=True)


def summary(result: Outcome) -> list[dict[str, str]]:
    """Return what a person wants to know of one symbol first, by name."""
    evidence = {name: _text(value) for name, value in result["evidence"].items()}
    names = "active_return_annual", "direction_accuracy", "share_up"
    active, hits, always_up = (in_words(result["evidence"][name], ".2%") for name in names)
    rows = {
        "out of sample": f"from {result['out_of_sample_from']}, {result['evidence']['n_rows']:,} forecasts",
        "horizon": f"{result['horizon_bars']} sessions",
        "information coefficient (signal)": f"{evidence['ic']} (p {evidence['p_ic']})",
        "a year over equal exposure": f"{active} (p {evidence['p_return']})",
        "direction accuracy": f"{hits} (always up: {always_up})",
        "verdicts on these prices": evidence["n_trials"],
        "trained in": f"{result['duration_s']} s on {result['device']}, seed {result['seed']}",
    }
    for bars, found in result["path_models"].items():
        rows[f"path, horizon {bars}"] = f"IC {_text(found['ic'])} (p {_text(found['p_ic'])}), decides nothing"
    return [{"": name, " ": text} for name, text in rows.items()]


def tell_all(
    train: Callable[[Console, OnEvent], Iterable[Outcome]], args: argparse.Namespace, settings: Settings
) -> int:
    """Show every outcome as soon as it is there; return the exit code of the first failure."""
    configure_logging("WARNING" if args.json else settings.log_level)
    console = Console(stderr=args.json)
    results: list[Outcome] = []
    try:
        with interruptible(), event_lines(args.events) as tell:
            for outcome in train(console, tell):
                results.append(outcome)
                tell(ending(outcome))
                show(outcome, console, in_full=not args.json)
    except errors.AIStocksError as error:
        results.append({"error": str(error), "exit_code": error.exit_code})
        show(results[-1], console, in_full=not args.json)
    except KeyboardInterrupt:
        sys.stderr.write(INTERRUPTED_LINE)
        return INTERRUPTED
    if args.json:
        sys.stdout.write(json.dumps(results, allow_nan=False) + "\n")
    return next((outcome["exit_code"] for outcome in results if "error" in outcome), 0)


@contextmanager
def progress_line(console: Console, symbol: str, tell: OnEvent) -> Iterator[OnEvent]:
    """Show how far it is: a bar on a terminal, a line for each stage elsewhere; ``tell`` hears it, too."""
    if not console.is_terminal:
        yield together(stage_lines(symbol), tell)
        return
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %")
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task(symbol, total=1.0)

        def on_event(event: Mapping[str, Any]) -> None:
            if event["type"] == "stage":
                bar.update(task, completed=event["progress"], description=f"{symbol}: {event['stage']}")

        yield together(on_event, tell)


def stage_lines(symbol: str) -> OnEvent:
    """Return a listener that logs a line for each stage."""

    def on_event(event: Mapping[str, Any]) -> None:
        if event["type"] == "stage":
            logger.info("%s: %3.0f %% %s", symbol, 100 * event["progress"], event["stage"])

    return on_event


@contextmanager
def event_lines(path: str | None) -> Iterator[OnEvent]:
    """Write events for a program that listens: one JSON object a line, in the names of the wire.

    Their types are ``stage``, ``epoch``, ``log``, ``fold``, and those of `ending`; None tells nobody.
    """
    if path is None:
        yield together()
        return
    with json_lines(path) as write:
        progress = 0.0

        def tell(event: Mapping[str, Any]) -> None:
            nonlocal progress
            if event["type"] == "fold":
                names = (name for name in FOLD_COLUMNS if event.get(name) is not None)
                words = ", ".join(f"{name} {_text(event[name])}" for name in names)
                event = {"type": "log", "message": f"fold: {words}"}
            progress = min(1.0, max(0.0, event.get("progress", progress)))
            told = {"status": "running", "timestamp": datetime.now(UTC).isoformat(), **event}
            write({to_camel(name): value for name, value in told.items()} | {"progress": progress})

        tell({"type": "started"})
        yield tell


def ending(outcome: Outcome) -> dict[str, Any]:
    """Return the event that ends the training of a symbol."""
    if "error" in outcome:
        return {"type": "failed", "status": "failed", "message": outcome["error"]}
    words = outcome.get("message") or f"{outcome['symbol']}: {outcome['verdict']}"
    return {"type": "completed", "status": "completed", "progress": 1.0, "message": words}
