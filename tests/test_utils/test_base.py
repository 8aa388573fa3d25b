"""Settings, the example that lists them, and the lines of the log."""

import argparse
import json
import logging
import os
import re
import sys
from pathlib import Path

import pytest

from utils.base import (
    PROJECT_ROOT,
    JsonFormatter,
    Settings,
    TextFormatter,
    UsageError,
    at_least,
    below,
    database_engine,
    read_settings,
)

EXAMPLE = PROJECT_ROOT / ".env.example"
KEY = "a-key-of-sixteen-or-more"


@pytest.fixture(autouse=True)
def bare(monkeypatch, tmp_path):
    """Read no setting of the machine that runs the tests."""
    monkeypatch.setitem(Settings.model_config, "env_file", None)
    for field in variables():
        monkeypatch.delenv(field, raising=False)


def variables() -> dict[str, str]:
    """Return {variable: field} of every setting."""
    return {
        str(field.validation_alias or f"AI_STOCKS_{name.upper()}"): name
        for name, field in Settings.model_fields.items()
    }


def example() -> dict[str, str]:
    return dict(re.findall(r"^(\w+)=(.*)$", EXAMPLE.read_text(), flags=re.MULTILINE))


def test_the_example_lists_every_setting():
    assert set(example()) == set(variables())


def test_the_example_says_the_defaults(monkeypatch):
    monkeypatch.chdir(PROJECT_ROOT)
    usual = Settings()
    listed = Settings(_env_file=EXAMPLE)
    for name in Settings.model_fields:
        said, default = getattr(listed, name), getattr(usual, name)
        assert (said.resolve() if isinstance(said, Path) else said) == default, name


def test_an_example_that_lags_behind_is_caught(tmp_path):
    stale = tmp_path / "stale"
    stale.write_text(EXAMPLE.read_text().replace("AI_STOCKS_DRAIN_S=2", "AI_STOCKS_DRAIN_S=3"))
    assert Settings(_env_file=stale).drain_s != Settings().drain_s


def test_the_environment_wins_over_the_file(monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.write_text("AI_STOCKS_SOURCE=sample\nAI_STOCKS_WORK_THREADS=3\n")
    monkeypatch.setenv("AI_STOCKS_SOURCE", "csv:x")
    settings = Settings(_env_file=file)
    assert (settings.source, settings.work_threads) == ("csv:x", 3)


def test_a_level_that_nobody_knows_ends_an_entry_point_with_a_sentence(monkeypatch, capsys):
    monkeypatch.setenv("AI_STOCKS_LOG_LEVEL", "chatty")
    with pytest.raises(SystemExit, match="2"):
        read_settings()
    assert "AI_STOCKS_LOG_LEVEL='CHATTY'" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "level"), [("", "INFO"), ("debug", "DEBUG")])
def test_an_empty_level_is_the_default_and_case_does_not_matter(monkeypatch, value, level):
    monkeypatch.setenv("AI_STOCKS_LOG_LEVEL", value)
    assert Settings().log_level == level


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RATE_PER_S", "-1"),
        ("RATE_PER_S", "nan"),
        ("RATE_BURST", "0"),
        ("WORK_THREADS", "0"),
        ("WORK_QUEUE", "-1"),
        ("DEADLINE_S", "0"),
        ("DEADLINE_S", "inf"),
        ("DRAIN_S", "-1"),
        ("LOG_FORMAT", "xml"),
        ("TRUSTED_PROXIES", "the-proxy"),
        ("TRUSTED_PROXIES", "10.0.0.1/8"),
    ],
)
def test_values_that_make_no_sense_are_refused(monkeypatch, capsys, name, value):
    monkeypatch.setenv(f"AI_STOCKS_{name}", value)
    with pytest.raises(SystemExit, match="2"):
        read_settings()
    assert f"AI_STOCKS_{name}='{value}'" in capsys.readouterr().err


def test_api_keys_are_a_comma_list_that_never_shows(monkeypatch, capsys):
    monkeypatch.setenv("AI_STOCKS_API_KEYS", f" {KEY}, {KEY}2 ,")
    settings = read_settings()
    assert [key.get_secret_value() for key in settings.api_keys] == [KEY, f"{KEY}2"]
    assert KEY not in repr(settings)
    monkeypatch.setenv("AI_STOCKS_API_KEYS", "tooshort")
    with pytest.raises(SystemExit, match="2"):
        read_settings()
    said = capsys.readouterr().err
    assert "AI_STOCKS_API_KEYS: " in said
    assert "tooshort" not in said


def record_of(message: str, *args: object, **extra: object) -> logging.LogRecord:
    record = logging.LogRecord("service", logging.INFO, __file__, 1, message, args, None)
    record.__dict__.update(extra)
    return record


HOSTILE = "a\nINFO forged\r\x1b[31m\x00\x9b2J\u2028b"


def test_a_line_of_text_stays_one_line():
    line = TextFormatter("%(levelname)s %(message)s").format(record_of("got %s", HOSTILE))
    assert line == "INFO got a\\u000aINFO forged\\u000d\\u001b[31m\\u0000\\u009b2J\\u2028b"


def test_a_line_of_json_carries_the_fields_and_what_failed():
    try:
        int(HOSTILE)
    except ValueError:
        record = record_of("got %s", HOSTILE, fields={"status": 200})
        record.exc_info = sys.exc_info()
    line = JsonFormatter().format(record)
    assert line.isprintable()
    said = json.loads(line)
    assert said["status"] == 200
    assert said["message"] == f"got {HOSTILE}"
    assert "ValueError" in said["error"]
    json.loads(JsonFormatter().format(record_of("\ud800 %s", object())))


def test_a_command_of_the_project_works_on_the_same_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOMETHING_ELSE", "stays")
    settings = Settings(models_dir=Path("models"), source="sample", log_level="ERROR")
    for name, value in settings.child_environment().items():
        monkeypatch.setenv(name, value)
    again = Settings()
    assert again.models_dir == tmp_path / "models"
    assert (again.source, again.log_level) == ("sample", "ERROR")
    assert again.database == settings.database == f"sqlite:///{tmp_path / 'models' / 'ai_stocks.sqlite'}"
    assert settings.child_environment()["SOMETHING_ELSE"] == "stays"
    assert str(PROJECT_ROOT) in settings.child_environment()["PYTHONPATH"].split(os.pathsep)


def test_the_database_may_be_named(monkeypatch):
    monkeypatch.setenv("AI_STOCKS_DATABASE_URL", "postgresql+psycopg://host/name")
    assert Settings().database == "postgresql+psycopg://host/name"


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "9", "x", "²"])
def test_a_whole_number_out_of_bounds_is_no_argument(text):
    assert at_least(1, 8)("8") == 8
    with pytest.raises(argparse.ArgumentTypeError, match="at least 1 and at most 8"):
        at_least(1, 8)(text)


@pytest.mark.parametrize("text", ["-0.1", "1", "nan", "inf", "x", ""])
def test_a_number_out_of_bounds_is_no_argument(text):
    assert below(1.0)("0.25") == 0.25
    with pytest.raises(argparse.ArgumentTypeError, match="from 0 to below 1"):
        below(1.0)(text)


# ---------------------------------------------------------------- the database's address


@pytest.mark.parametrize(
    "url",
    [
        "",
        "nonsense",
        "mysql://u:s3cret@h/n",
        "postgresql+psycopg2://u:s3cret@h/n",
        "postgresql://u:s3cret@h:port/n",
        "postgresql://u:s3@cret@h/n",
        "postgresql://u:s3@cret/3@h/n",
        # Every connection would have a database of its own, or there is no such file.
        "sqlite://",
        "sqlite:///",
        "sqlite:///?uri=true",
        "sqlite:///:memory:",
        "sqlite:///%3Amemory%3A",
        "sqlite:///file::memory:?uri=true",
        "sqlite:///file:jobs?mode=memory&cache=shared&uri=true",
        "sqlite:///file:jobs.sqlite",
        "sqlite:///jobs.sqlite?mode=memory",
        "sqlite:///jobs.sqlite?timeout=s3cret",
        "sqlite:///jobs%00.sqlite",
        "sqlite://host/jobs.sqlite",
        "sqlite://u:s3cret@/jobs.sqlite",
    ],
)
def test_an_address_that_cannot_be_used_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(UsageError, match=r"AI_STOCKS_DATABASE_URL .* write sqlite:") as caught:
        database_engine(url, 1.0)
    assert "s3" not in str(caught.value)
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize("name", ["jobs.sqlite", "a file", ":memory", "of file:x", "50%25"])
def test_a_file_may_have_any_name(tmp_path, name):
    engine = database_engine(f"sqlite:///{tmp_path}/{name}", 1.0)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE kept (x INTEGER)")
    engine.dispose()
    assert [path.name for path in tmp_path.iterdir()] == [name.replace("%25", "%")]


@pytest.mark.parametrize("name", ["postgresql", "postgres", "postgresql+psycopg"])
def test_a_missing_driver_is_named_with_what_brings_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(UsageError, match=r'needs the driver psycopg: pip install "\.\[postgres\]"') as caught:
        database_engine(f"{name}://u:s3cret@h/n", 1.0)
    assert "s3cret" not in str(caught.value)
