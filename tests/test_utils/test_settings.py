import argparse

import pytest

from utils.settings import Settings, at_least, below, read_settings


def test_a_level_that_nobody_knows_ends_an_entry_point_with_a_sentence(monkeypatch, capsys):
    monkeypatch.setenv("AI_STOCKS_LOG_LEVEL", "chatty")
    with pytest.raises(SystemExit, match="2"):
        read_settings()
    assert "AI_STOCKS_LOG_LEVEL='CHATTY'" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "level"), [("", "INFO"), ("debug", "DEBUG")])
def test_an_empty_level_is_the_default_and_case_does_not_matter(monkeypatch, value, level):
    monkeypatch.setenv("AI_STOCKS_LOG_LEVEL", value)
    assert Settings().log_level == level


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
