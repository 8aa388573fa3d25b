"""Every error that the product raises on purpose.

::

    AIStocksError                    exit 1   a bug, or something nobody foresaw
    ├── UsageError                   exit 2   the caller asked for something impossible
    │   ├── InvalidSymbolError
    │   ├── JobMissingError                   no training has that id
    │   └── DeviceError              exit 9   a GPU was asked for and cannot be used
    ├── UpstreamError                exit 3   the price source cannot be reached or answers nonsense
    │   └── UnknownSymbolError                the source answers, and does not know the symbol
    ├── DataError                    exit 4   the bars are there and cannot be used
    │   └── InsufficientDataError             too few of them
    ├── ModelError                   exit 5
    │   ├── ModelMissingError
    │   ├── ModelCorruptError
    │   └── ModelIncompatibleError
    ├── ConflictError                exit 6
    │   ├── LockedError
    │   └── ModelExistsError
    ├── GateRefusedError             exit 7   ``--strict`` and the verdict is not ``edge``
    │   └── CollapsedError                    a network's signal does not vary, or has one sign
    ├── StorageError                 exit 8   disk full, read-only, not writable
    ├── OverloadError                         the service has more to compute than it takes on
    └── DeadlineError                         an answer of the service takes too long

``training.reproduce`` ends with 10 when the training came out differently, and a training that is interrupted
with 130, as shells have it; both raise nothing of this tree.
A message says what is wrong, which value came, and what to do. HTTP statuses are mapped in ``service.api``.
"""

import re

# Absolute paths of the server; routes of the API stay readable.
_PATH = re.compile(r"(?<![\w:/.])/(?!api/)(?:[^/\s'\"`]+/)+([^/\s'\"`]*)")


class AIStocksError(Exception):
    """Root of the tree; carries the exit code of a command line."""

    exit_code = 1


class UsageError(AIStocksError):
    """The request itself is wrong."""

    exit_code = 2


class InvalidSymbolError(UsageError):
    """Not a symbol that any source could know."""


class JobMissingError(UsageError):
    """No training has that id."""


class DeviceError(UsageError):
    """A GPU was asked for and cannot be used."""

    exit_code = 9


class UpstreamError(AIStocksError):
    """The price source is down, refuses, or answers nonsense; trying again later may help."""

    exit_code = 3


class UnknownSymbolError(UpstreamError):
    """The source answers and does not know the symbol."""


class DataError(AIStocksError):
    """The bars arrived and cannot be used."""

    exit_code = 4


class InsufficientDataError(DataError):
    """Fewer bars than the task needs."""


class ModelError(AIStocksError):
    """A saved model cannot be used."""

    exit_code = 5


class ModelMissingError(ModelError):
    """No model was trained for the symbol."""


class ModelCorruptError(ModelError):
    """A file of the bundle is not the one that was saved."""


class ModelIncompatibleError(ModelError):
    """The bundle is whole and does not fit this installation."""


class ConflictError(AIStocksError):
    """Somebody else holds it, or it is there already."""

    exit_code = 6


class LockedError(ConflictError):
    """Another process holds the lock."""


class ModelExistsError(ConflictError):
    """A bundle is there and ``--overwrite`` was not given."""


class GateRefusedError(AIStocksError):
    """The verdict refuses the model under ``--strict``."""

    exit_code = 7


class CollapsedError(GateRefusedError):
    """A network answers the same to everything: there is nothing to judge, and nothing is saved."""


class StorageError(AIStocksError):
    """The disk is full, read-only, or not writable."""

    exit_code = 8


def without_paths(text: str) -> str:
    """Return what may be shown to a stranger: of an absolute path the last part."""
    return _PATH.sub(r"\1", text)


class OverloadError(AIStocksError):
    """All workers of the service are busy, and the queue before them is full."""


class DeadlineError(AIStocksError):
    """An answer of the service took longer than callers are kept waiting."""
