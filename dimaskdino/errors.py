"""Errors that the user can fix; the commands print them on one line and exit with status 2."""

import contextlib
import errno
import importlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

USER_ERROR_STATUS = 2
BAD_INPUT_STATUS = 3  # some inputs could not be used; the rest is done


class UserError(Exception):
    """A file, key, flag or annotation of the user cannot be used; the message names it and says what to do."""


class ConfigError(UserError, ValueError):
    """A configuration key or value that cannot be used."""


class DatasetError(UserError, ValueError):
    """A dataset that is missing or unreadable, or does not fit the configuration."""


class CheckpointError(UserError, ValueError):
    """A weight file that is unreadable or untrusted, or does not fit the model."""


def check_choice(key: str, value: object, known: Sequence[object]) -> None:
    """Check a configuration key that has a few possible values.

    Raises:
        ConfigError: the value is not one of ``known``.
    """
    if value not in known:
        raise ConfigError(f"{key} is {value!r}; it must be one of {', '.join(str(choice) for choice in known)}.")


def check_range(key: str, value: float, least: float, most: float = math.inf, meaning: str = "") -> None:
    """Check a configuration key that is a finite number.

    Raises:
        ConfigError: the value is below ``least`` or above ``most``.
    """
    if not (least <= value <= most and math.isfinite(value)):
        bounds = [f"at least {least}"] * (least > -math.inf) + [f"at most {most}"] * (most < math.inf)
        note = f" ({meaning})" if meaning else ""
        raise ConfigError(f"{key} is {value}; it must be {' and '.join(bounds)}{note}.")


def require(package: str, who: str, extra: str, kind: type[UserError] = UserError) -> ModuleType:
    """Import a package that is installed with ``extra`` alone, for ``who``.

    Raises:
        UserError: of ``kind``; it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise kind(f"{who} needs the package {package}: pip install 'dimaskdino[{extra}]'.") from error


@contextlib.contextmanager
def file_errors_in_one_line() -> Iterator[None]:
    """Turn an OSError that names a file into a :class:`UserError`; the user cannot fix one that does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        needs_folder = error.errno in (errno.EEXIST, errno.ENOTDIR)
        hint = "there is a file where a folder is needed" if needs_folder else "check the path and its permissions"
        raise UserError(f"{error.filename}: {error.strerror}; {hint}.") from error


def run_cli(main: Callable[[], None]) -> None:
    """Run a tool's ``main``; an error that the user can fix ends it with one line on stderr and status 2.

    These are :class:`UserError`, and any file or folder that cannot be read or written.
    """
    try:
        with file_errors_in_one_line():
            main()
    except UserError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        sys.exit(USER_ERROR_STATUS)
