"""Errors that the user can fix are one line; others keep their traceback."""

import errno
import os

import pytest

from dimaskdino.errors import run_cli


def raising(error: Exception):
    def main() -> None:
        raise error

    return main


def test_file_errors_are_one_line_and_status_2(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_cli(raising(PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/root/x")))
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: /root/x: Permission denied; check the path and its permissions.\n"


@pytest.mark.parametrize("error", [ConnectionError("closed by peer"), BrokenPipeError(), KeyError("x")])
def test_other_errors_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        run_cli(raising(error))
