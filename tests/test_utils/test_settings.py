import pytest

from utils.settings import Settings, read_settings


def test_a_level_that_nobody_knows_ends_an_entry_point_with_a_sentence(monkeypatch, capsys):
    monkeypatch.setenv("AI_STOCKS_LOG_LEVEL", "chatty")
    with pytest.raises(SystemExit, match="2"):
        read_settings()
    assert "AI_STOCKS_LOG_LEVEL='CHATTY'" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "level"), [("", "INFO"), ("debug", "DEBUG")])
def test_an_empty_level_is_the_default_and_case_does_not_matter(monkeypatch, value, level):
    monkeypatch.setenv("AI_STOCKS_LOG_LEVEL", value)
    assert Settings().log_level == level
