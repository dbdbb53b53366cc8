"""Errors that are the user's to fix: command-line tools print them on one line and exit with status 2."""

import contextlib
import errno
import sys
from collections.abc import Callable, Iterator, Sequence

USER_ERROR_STATUS = 2


class UserError(Exception):
    """Something the user gave (a file, a key, a flag, an annotation) cannot be used; the message says what to do."""


class ConfigError(UserError, ValueError):
    """A configuration key or value that cannot be used."""


class DatasetError(UserError, ValueError):
    """A dataset that is missing, unreadable or does not fit the configuration."""


class CheckpointError(UserError, ValueError):
    """A weight file that is unreadable, untrusted or does not fit the model."""


def check_choice(key: str, value: object, known: Sequence[object]) -> None:
    """Check a configuration key whose values are a few.

    Raises:
        ConfigError: the value is none of them.
    """
    if value not in known:
        raise ConfigError(f"{key} is {value!r}; it must be one of {', '.join(str(choice) for choice in known)}.")


@contextlib.contextmanager
def file_errors_told_in_one_line() -> Iterator[None]:
    """Turn an OSError that names a file into a :class:`UserError`; one without a file is not the user's to fix."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        in_the_way = error.errno in (errno.EEXIST, errno.ENOTDIR)
        hint = "a file lies where a folder is needed" if in_the_way else "check the path and its permissions"
        raise UserError(f"{error.filename}: {error.strerror}; {hint}.") from error


def run_cli(main: Callable[[], None]) -> None:
    """Run a tool's ``main``; what the user can fix ends the program with one line on stderr and its own exit status.

    That is a :class:`UserError`, and a file or folder that cannot be read or written.
    """
    try:
        with file_errors_told_in_one_line():
            main()
    except UserError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        sys.exit(USER_ERROR_STATUS)
