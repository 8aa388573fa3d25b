"""Logging, configured by entry points only."""

import logging
import sys

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def configure_logging(level: str = "INFO") -> None:
    """Send log lines to stderr, so that stdout stays the result.

    Parameters
    ----------
    level
        Name of a level of the standard library.
    """
    logging.basicConfig(level=level.upper(), format=FORMAT, stream=sys.stderr, force=True)
