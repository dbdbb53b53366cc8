"""Errors that are the user's to fix: command-line tools print them on one line and exit with status 2."""

import sys
from collections.abc import Callable

USER_ERROR_STATUS = 2


class UserError(Exception):
    """Something the user gave (a file, a key, a flag, an annotation) cannot be used; the message says what to do."""


class ConfigError(UserError, ValueError):
    """A configuration key or value that cannot be used."""


class DatasetError(UserError, ValueError):
    """A dataset that is missing, unreadable or does not fit the configuration."""


class CheckpointError(UserError, ValueError):
    """A weight file that is unreadable, untrusted or does not fit the model."""


def run_cli(main: Callable[[], None]) -> None:
    """Run a tool's ``main``; a :class:`UserError` ends the program with one line on stderr and its own exit status."""
    try:
        main()
    except UserError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        sys.exit(USER_ERROR_STATUS)
