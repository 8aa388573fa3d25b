"""Train a saved bundle again from the recipe that it recorded, save nothing, and say what differs.

::

    python -m training.reproduce saved_models/AAPL/gbm

Exit 0 when prices, features and predictions came out the same to the last bit, 10 when something differs, or
the code of the error that prevented a comparison (see `utils.base`). Other library versions are told and do
not count by themselves: what counts is whether they changed anything.
"""

import argparse
import hashlib
import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data.cache_manager import BarCache
from data.data_fetcher import BarSource, NewsSource, fetch_stock_data, make_news, make_source
from data.feature_engineer import feature_set_hash, get_feature_columns
from inference.artifact import library_versions, read_manifest
from inference.load_gbm_models import GBMBundle, GBMManifest, load_folder
from training.recipe import TrainerConfig
from training.run_log import progress_line, together
from training.train_gbm import DeviceChoice, GBMTrainer, choose_device
from training.trainer import Trained, leaves
from utils.base import (
    AIStocksError,
    ModelIncompatibleError,
    ModelMissingError,
    Settings,
    UsageError,
    configure_logging,
    read_settings,
)
from utils.model_paths import ENSEMBLE, LSTM

logger = logging.getLogger(__name__)

DIFFERS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was compared, as recorded and as it came out; ``counts`` if a difference matters."""

    what: str
    then: str
    now: str
    is_same: bool
    counts: bool = True


def config_of(recipe: Mapping[str, Any]) -> TrainerConfig:
    """Return the trainer's configuration that a bundle recorded.

    Where this version has other parameters it is a `ModelIncompatibleError`: a default must not stand in.
    """
    try:
        config = TypeAdapter(TrainerConfig).validate_python(recipe)
    except (ValidationError, UsageError) as error:
        raise ModelIncompatibleError(f"the recorded recipe cannot be read: {error}") from error
    here = json.loads(json.dumps(asdict(config)))
    if here != json.loads(json.dumps(recipe)):
        now, then = ({(name, str(value)) for name, value in leaves(one)} for one in (here, recipe))
        changed = sorted(name for name, _ in now ^ then)
        raise ModelIncompatibleError(
            f"the recipe was recorded by another version, which has other parameters ({', '.join(changed)}): "
            "use that version, or train again"
        )
    return config


def train_again(
    bundle: GBMBundle, source: BarSource, cache: BarCache | None, console: Console
) -> tuple[Trained[GBMBundle], Mapping[str, str]]:
    """Train on the recorded prices with the recorded recipe; also return the hash of the prices by symbol."""
    metadata, config = bundle.metadata, config_of(bundle.metadata["recipe"])
    universe = metadata.get("universe")
    seen = {bundle.symbol: slice(metadata["data"]["first_session"], metadata["data"]["last_session"])}
    if universe is not None:
        seen = {name: slice(universe["data"][name]["last_session"]) for name in universe["symbols"]}
    fetched = {name: fetch_stock_data(name, source=source, cache=cache) for name in seen}
    panel = {name: replace(bars, frame=bars.frame.loc[seen[name]]) for name, bars in fetched.items()}
    with progress_line(console, bundle.symbol, together()) as on_event:
        trainer = GBMTrainer(config, on_event, device=device_as_then(config))
        walked = trainer.walk(panel)
        # By the limits that the looks before had left to it then.
        share = metadata["verdict"]["evidence"].get("limits_share")
        return trainer.conclude(walked, panel[bundle.symbol], limits_share=share), walked.hashes


def device_as_then(config: TrainerConfig) -> DeviceChoice:
    """Return the recorded device, or the CPU where this machine has no GPU."""
    if config.recipe.search.device == "cpu":
        return DeviceChoice(device="cpu", reason="as recorded")
    return choose_device("cuda", 0, len(get_feature_columns()), allow_cpu_fallback=True)


def compare(
    bundle: GBMBundle, again: Trained[GBMBundle], hashes: Mapping[str, str], folder: Path
) -> list[Finding]:
    """Compare a bundle with what training it again gave."""
    both = bundle, again.bundle
    then, now = (one.metadata for one in both)
    alone = {bundle.symbol: {"hash": then["data_hash"]}}
    prices = then["universe"]["data"] if then.get("universe") else alone
    here = library_versions(then["versions"])
    findings = [
        *(_equal(f"prices of {name}", one["hash"][:12], hashes[name][:12]) for name, one in prices.items()),
        _equal("features", then["feature_set_hash"][:12], feature_set_hash()[:12]),
        _equal("device", then["device"], now["device"], counts=False),
        *(
            _equal(f"version of {name}", one, here[name], counts=False)
            for name, one in then["versions"].items()
        ),
        _equal("verdict", then["verdict"]["label"], again.verdict.label, counts=False),
        _equal("selected features", *(", ".join(one.ensemble.selected_features) for one in both)),
        _equal("out-of-sample predictions", *(predictions_hash(one.record) for one in both)),
    ]
    for name in prediction_columns(bundle.record):
        said = pd.concat([one.record.set_index("date")[name] for one in both], axis=1)
        findings.append(_within(f"largest difference of {name}", *said.to_numpy().T))
    manifest = read_manifest(folder, GBMManifest)
    golden = np.asarray(manifest.golden_inputs, dtype=np.float32)
    models = {"final model": (manifest.golden_outputs, again.bundle.ensemble)}
    for path in again.bundle.path_models:
        outputs = manifest.path_golden_outputs[path.horizon_bars]
        models[f"path model of {path.horizon_bars} bars"] = outputs, path.ensemble
    for name, (outputs, ensemble) in models.items():
        made = ensemble.raw_scaled(golden)
        findings.append(_within(f"{name}, golden rows", np.asarray(outputs), made))
    return findings


def prediction_columns(record: pd.DataFrame) -> list[str]:
    """Return the columns of a walk-forward record that the models made."""
    models = sorted(name for name in record.columns if name.startswith("model_"))
    return ["predicted_log", "baseline_log", "raw_scaled", "skill_lower", *models]


def predictions_hash(record: pd.DataFrame) -> str:
    """Return a hash of the out-of-sample predictions, to the last bit."""
    content = hashlib.sha256(np.asarray(record["date"], dtype="datetime64[D]").tobytes())
    for name in prediction_columns(record):
        content.update(np.asarray(record[name], dtype=np.float64).tobytes())
    return content.hexdigest()[:12]


def _equal(what: str, then: str, now: str, *, counts: bool = True) -> Finding:
    return Finding(what=what, then=then, now=now, is_same=then == now, counts=counts)


def _within(what: str, then: np.ndarray[Any, Any], now: np.ndarray[Any, Any]) -> Finding:
    apart = float(np.max(np.abs(then - now), initial=0.0))
    return Finding(what=what, then="0", now=f"{apart:.3g}", is_same=apart == 0.0)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m training.reproduce",
        description="Train a saved bundle again and say what differs; nothing is saved.",
        epilog=f"Exit 0: the same; {DIFFERS}: it differs.",
    )
    parser.add_argument("bundle", type=Path, help="saved_models/SYMBOL/gbm, or a folder of versions/")
    parser.add_argument(
        "--source", help="where the prices are, unless AI_STOCKS_SOURCE or the bundle says it"
    )
    parser.add_argument("--no-cache", action="store_true", help="neither read nor write cached prices")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON on stdout")
    return parser


def source_of(
    asked: str | None, settings: Settings, recorded: str, news: NewsSource | None = None
) -> BarSource:
    """Return the source that the bundle was trained from; `UsageError` where its files are not known here."""
    source = make_source(asked or settings.source, cache_dir=settings.cache_dir, news=news)
    if asked is not None or source.name == recorded:
        return source
    if recorded.startswith("csv:"):
        raise UsageError(f"the bundle was trained from {recorded}: say where that is, with --source csv:DIR")
    return make_source(recorded, cache_dir=settings.cache_dir, news=news)


def reproduce(args: argparse.Namespace, settings: Settings, console: Console) -> list[Finding]:
    """Load, train again and compare."""
    folder = args.bundle.resolve()
    if not folder.is_dir():
        raise ModelMissingError(f"there is no bundle at {args.bundle}: name saved_models/SYMBOL/gbm")
    for kind in (LSTM, ENSEMBLE):
        if kind.versions in {folder.name, folder.parent.name}:
            raise UsageError(
                f"{args.bundle} is a bundle of {kind.name}: boosters alone are trained again here, "
                "give a gbm folder"
            )
    bundle = load_folder(folder)
    news = make_news(settings) if bundle.metadata.get("sentiment", {}).get("used") else None
    source = source_of(args.source, settings, str(bundle.metadata["source"]), news)
    cache = None if args.no_cache else BarCache(settings.cache_dir)
    again, hashes = train_again(bundle, source, cache, console)
    return compare(bundle, again, hashes, folder)


def show(findings: list[Finding], console: Console) -> None:
    """Print the findings; what is the same only by name."""
    differing = [finding for finding in findings if not finding.is_same]
    same = ", ".join(finding.what for finding in findings if finding.is_same)
    if differing:
        table = Table("", "recorded", "now", title="What differs", title_justify="left")
        for finding in differing:
            table.add_row(escape(finding.what), escape(finding.then), escape(finding.now))
        console.print(table)
    console.print(f"the same: {escape(same)}", soft_wrap=True)
    verdict = "differs" if any(finding.counts for finding in differing) else "came out the same"
    console.print(f"the training {verdict}")


def main(argv: list[str] | None = None) -> int:
    """Reproduce one bundle; see the module for the exit codes."""
    args = build_parser().parse_args(argv)
    settings = read_settings()
    configure_logging("WARNING" if args.json else settings.log_level)
    console = Console(stderr=args.json)
    try:
        findings = reproduce(args, settings, console)
    except AIStocksError as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        return error.exit_code
    if args.json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in findings]) + "\n")
    else:
        show(findings, console)
    return DIFFERS if any(finding.counts and not finding.is_same for finding in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
