"""Types and flags that the command lines share."""

import argparse

import pytest

from dimaskdino.command_line import at_least


@pytest.mark.parametrize(("text", "said"), [("-1", "-1 is too small; it must be at least 0"), ("1.5", "whole number")])
def test_a_number_that_cannot_be_used_names_its_flag_and_the_least(
    text: str, said: str, capsys: pytest.CaptureFixture
) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=at_least(0))
    assert parser.parse_args(["--workers", "0"]).workers == 0
    with pytest.raises(SystemExit):
        parser.parse_args(["--workers", text])
    error = capsys.readouterr().err
    assert "argument --workers: " in error
    assert said in error
