"""Errors that the user can fix; the commands print them on one line and exit with status 2."""

import contextlib
import errno
import importlib
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

USER_ERROR_STATUS = 2
BAD_INPUT_STATUS = 3  # some inputs could not be used; the rest is done


class UserError(Exception):
    """A file, key, flag or annotation of the user cannot be used; the message names it and says what to do."""


class ConfigError(UserError, ValueError):
    """A configuration key or value that cannot be used."""


class OwnPartError(ConfigError):
    """A part of the user's own fails when it is made; the message names it, and the line where there is one."""


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
        raise kind(f"{who} needs the package {package.split('.')[0]}: pip install 'dimaskdino[{extra}]'.") from error


def where_raised(error: BaseException) -> str:
    """File and line of the user's code that an error comes from, and the error's kind, before its text."""
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}: {kind}"
    frames = traceback.extract_tb(error.__traceback__)
    libraries = (os.path.dirname(os.__file__), os.path.dirname(os.path.abspath(__file__)), "<frozen")
    own = [each for each in frames if not each.filename.startswith(libraries) and "site-packages" not in each.filename]
    return f"{own[-1].filename}, line {own[-1].lineno}: {kind}" if own else kind


def make_part(key: str, make: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call a registered class or builder, which may be the user's.

    Raises:
        ConfigError: it takes other arguments; names it and the key.
        OwnPartError: it is not this package's, and fails.
    """
    try:
        return make(*arguments, **options)
    except UserError:
        raise
    except Exception as error:  # a part of the user's may raise anything
        if make.__module__.partition(".")[0] in ("dimaskdino", "detectron2"):
            raise
        call_fails = isinstance(error, TypeError) and error.__traceback__ and error.__traceback__.tb_next is None
        text = f"{where_raised(error)}{' '.join(str(error).split())}"
        raise (ConfigError if call_fails else OwnPartError)(
            f"{key}: {make.__module__}.{make.__qualname__} cannot be made. {text}"
        ) from error


@contextlib.contextmanager
def file_errors_in_one_line() -> Iterator[None]:
    """Turn an OSError that names a file, or a full disk, into a :class:`UserError`; the user cannot fix others."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            name = f"{error.filename}: " if error.filename else ""
            raise UserError(f"{name}{error.strerror}; free some space, or write elsewhere.") from error
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
