"""Deployment settings, logging and numbers of a command line: what entry points alone deal with.

Algorithm parameters do not belong here: they are frozen dataclasses beside the code that uses them.
"""

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

PROJECT_ROOT = Path(__file__).resolve().parents[1]
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
DEFAULT_ORIGINS = ("http://localhost:3000", "http://127.0.0.1:3000")


class Settings(BaseSettings):
    """Where things lie and who may ask; each field is ``AI_STOCKS_<NAME>`` in the environment.

    Attributes
    ----------
    source
        ``yahoo``, ``sample`` or ``csv:DIR``.
    models_dir, cache_dir, results_dir, logs_dir
        Where bundles, price caches, backtest results and training logs are kept.
    allow_origins
        Origins that browsers may call from, besides the two defaults; a comma list in
        ``PYTHON_API_ALLOW_ORIGINS``.
    log_level
        Level of the root logger.
    """

    model_config = SettingsConfigDict(
        env_prefix="AI_STOCKS_", extra="ignore", frozen=True, populate_by_name=True
    )

    source: str = "yahoo"
    models_dir: Path = PROJECT_ROOT / "saved_models"
    cache_dir: Path = PROJECT_ROOT / ".cache"
    results_dir: Path = PROJECT_ROOT / "backtest_results"
    logs_dir: Path = PROJECT_ROOT / "training_logs"
    allow_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), validation_alias="PYTHON_API_ALLOW_ORIGINS"
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = "INFO"

    @field_validator("log_level", mode="before")
    @classmethod
    def _known_level(cls, value: object) -> object:
        # An empty variable is one that was not set.
        return (value.upper() or "INFO") if isinstance(value, str) else value

    @field_validator("allow_origins", mode="before")
    @classmethod
    def _split_commas(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @property
    def origins(self) -> tuple[str, ...]:
        """All origins that browsers may call from."""
        return (*DEFAULT_ORIGINS, *self.allow_origins)


def read_settings() -> Settings:
    """Read the settings of an entry point; end it with exit code 2 where the environment makes no sense."""
    try:
        return Settings()
    except ValidationError as error:
        for wrong in error.errors():
            name = str(wrong["loc"][0])
            variable = name if name.isupper() else f"AI_STOCKS_{name.upper()}"
            sys.stderr.write(f"error: {variable}={wrong['input']!r}: {wrong['msg']}\n")
        raise SystemExit(2) from error


def configure_logging(level: str = "INFO") -> None:
    """Send log lines to stderr, so that stdout stays the result.

    Parameters
    ----------
    level
        Name of a level of the standard library.
    """
    logging.basicConfig(level=level.upper(), format=LOG_FORMAT, stream=sys.stderr, force=True)


def at_least(lowest: int, highest: int = sys.maxsize) -> Callable[[str], int]:
    """Return a reader of whole numbers of the command line within limits."""

    def read(text: str) -> int:
        if text.isdecimal() and lowest <= int(text) <= highest:
            return int(text)
        upper = "" if highest == sys.maxsize else f" and at most {highest}"
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {lowest}{upper}")

    return read


def below(limit: float) -> Callable[[str], float]:
    """Return a reader of numbers of the command line from 0 to below a limit."""

    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = -1.0
        if 0 <= number < limit:
            return number
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to below {limit}")

    return read
