"""Every error that the product raises on purpose, with the exit code of a command line that it ends.

Without one of its own it has that of its parent. Codes 10 (`training.reproduce` found a difference) and 130
(interrupted) raise nothing. A message says what is wrong, which value came, and what to do.
"""

import re
from collections.abc import Mapping

# Absolute paths of the server; routes of the API stay readable.
_PATH = re.compile(r"(?<![\w:/.])/(?!api/)(?:[^/\s'\"`]+/)+([^/\s'\"`]*)")


def without_paths(text: str) -> str:
    """Return what may be shown to a stranger: of an absolute path the last part."""
    return _PATH.sub(r"\1", text)


class AIStocksError(Exception):
    """Root of the tree; raised itself where nobody foresaw it, or for a bug."""

    exit_code = 1

    def __init_subclass__(cls, exit_code: int | None = None) -> None:
        cls.exit_code = cls.exit_code if exit_code is None else exit_code


class UsageError(AIStocksError, exit_code=2):
    """The caller asked for something impossible."""


class InvalidSymbolError(UsageError):
    """Not a symbol that any source could know."""


class JobMissingError(UsageError):
    """No training has that id."""


class DeviceError(UsageError, exit_code=9):
    """A GPU was asked for and cannot be used."""


class UpstreamError(AIStocksError, exit_code=3):
    """The price source is down, refuses, or answers nonsense; trying again later may help."""


class UnknownSymbolError(UpstreamError):
    """The source answers and does not know the symbol."""


class DataError(AIStocksError, exit_code=4):
    """The bars arrived and cannot be used."""


class InsufficientDataError(DataError):
    """Fewer bars than the task needs."""


class ModelError(AIStocksError, exit_code=5):
    """A saved model cannot be used."""


class ModelMissingError(ModelError):
    """No model was trained for the symbol."""


class ModelCorruptError(ModelError):
    """A file of the bundle is not the one that was saved."""


class ModelIncompatibleError(ModelError):
    """The bundle is whole and does not fit this installation."""


class ConflictError(AIStocksError, exit_code=6):
    """Somebody else holds it, or it is there already."""


class LockedError(ConflictError):
    """Another process holds the lock."""


class ModelExistsError(ConflictError):
    """A bundle is there and ``--overwrite`` was not given."""


class GateRefusedError(AIStocksError, exit_code=7):
    """The verdict refuses the model under ``--strict``; ``found`` is what a program should know of it."""

    def __init__(self, message: str, found: Mapping[str, object] | None = None) -> None:
        super().__init__(message)
        self.found = dict(found or {})


class CollapsedError(GateRefusedError):
    """A network's signal does not vary, or has one sign: there is nothing to judge, and nothing is saved."""


class StorageError(AIStocksError, exit_code=8):
    """The disk is full, read-only, or not writable."""


class OverloadError(AIStocksError):
    """All workers of the service are busy, and the queue before them is full."""


class DeadlineError(AIStocksError):
    """An answer of the service took longer than callers are kept waiting."""
