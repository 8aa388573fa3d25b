"""Where a symbol's artifacts lie, and the promise that they lie nowhere else."""

from pathlib import Path

from utils.errors import InvalidSymbolError, ModelCorruptError, ModelMissingError


def symbol_dir(root: Path, symbol: str) -> Path:
    """Return the folder of one symbol under ``root``.

    Parameters
    ----------
    root
        Root folder of saved models or of a cache.
    symbol
        A symbol that was normalised before (see ``data.schema.normalise_symbol``).

    Raises
    ------
    InvalidSymbolError
        If the folder would lie outside ``root``.
    """
    base = root.resolve()
    path = (base / symbol).resolve()
    if path.parent != base:
        raise InvalidSymbolError(f"symbol {symbol!r} does not name a folder under the model root")
    return path


def gbm_link(root: Path, symbol: str) -> Path:
    """Return ``<root>/<SYMBOL>/gbm``: a link to the version that serves, swapped atomically."""
    return symbol_dir(root, symbol) / "gbm"


def versions_dir(root: Path, symbol: str) -> Path:
    """Return the folder that keeps the symbol's earlier bundles."""
    return symbol_dir(root, symbol) / "versions"


def current_version(models_dir: Path, symbol: str) -> Path:
    """Return the folder that the symbol's link points to."""
    link = gbm_link(models_dir, symbol)
    folder = link.resolve()
    if not folder.is_dir():
        raise ModelMissingError(f"no model for {symbol}: run `python -m training.train_gbm {symbol}`")
    if folder.parent != versions_dir(models_dir, symbol).resolve():
        raise ModelCorruptError(f"the model of {symbol} lies outside its folder: train again")
    return folder


def list_versions(models_dir: Path, symbol: str) -> list[Path]:
    """Return the kept versions of a symbol, oldest first."""
    versions = versions_dir(models_dir, symbol)
    if not versions.is_dir():
        return []
    return sorted(path for path in versions.iterdir() if path.is_dir() and not path.name.startswith("."))


def list_symbols(models_dir: Path) -> list[str]:
    """Return the symbols that have a bundle, sorted."""
    if not models_dir.is_dir():
        return []
    return sorted(path.name for path in models_dir.iterdir() if (path / "gbm" / "manifest.json").is_file())
