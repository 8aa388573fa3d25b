"""Where a symbol's artifacts lie, and the promise that they lie nowhere else."""

from pathlib import Path

from utils.errors import InvalidSymbolError


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
