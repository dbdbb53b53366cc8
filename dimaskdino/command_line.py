"""What the command lines of train_net.py and of the tools share."""

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from dimaskdino.errors import ConfigError, UserError


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number of at least ``least``."""

    def whole_number(text: str) -> int:
        number = int(text)
        if number < least:
            raise argparse.ArgumentTypeError(f"{number} is too small; it must be at least {least}")
        return number

    # argparse puts this name into its error for text that is not a number.
    whole_number.__name__ = "whole number"
    return whole_number


def fraction(text: str) -> float:
    """An argparse type: a number from 0 to 1."""
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to 1")
    return number


def add_import_flag(parser: argparse.ArgumentParser) -> None:
    """Add ``--import MODULE``, which may be repeated; the parsed names are ``modules``."""
    parser.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="your module that registers parts or datasets, such as my.parts for my/parts.py in the current folder; "
        "may be given several times",
    )


def import_modules(names: Sequence[str]) -> None:
    """Import modules by name, from the current folder or as Python finds them.

    Raises:
        ConfigError: there is no module of that name, or it does not import; the message names the file and line.
    """
    folder = os.getcwd()
    if names and folder not in sys.path:
        sys.path.insert(0, folder)  # `python -m` does the same; a script has its own folder there.
    for name in names:
        _check_name(name)
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            # If another module is missing, this one imports it.
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise _broken(name, error) from error
            raise ConfigError(
                f"--import {name}: there is no module {error.name} in the current folder {folder}, in PYTHONPATH, or "
                "among the installed packages."
            ) from error
        except Exception as error:  # a module of the user's may raise anything
            raise _broken(name, error) from error


def _broken(name: str, error: Exception) -> ConfigError:
    return ConfigError(f"--import {name}: the module does not import. {_where(error)}{' '.join(str(error).split())}")


def _where(error: Exception) -> str:
    """File and line of the user's code that an error comes from, and the error's kind."""
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}: {kind}"
    frames = traceback.extract_tb(error.__traceback__)
    libraries = (os.path.dirname(os.__file__), os.path.dirname(os.path.abspath(__file__)), "<frozen")
    own = [each for each in frames if not each.filename.startswith(libraries) and "site-packages" not in each.filename]
    return f"{own[-1].filename}, line {own[-1].lineno}: {kind}" if own else kind


def _check_name(name: str) -> None:
    as_module = name.removesuffix(".py").removeprefix("./").replace("/", ".").replace("\\", ".")
    if name == as_module and all(part.isidentifier() for part in name.split(".")):
        return
    suggestion = f"write --import {as_module}" if name.endswith(".py") else "write my.parts for my/parts.py"
    raise ConfigError(f"--import {name} is not the name of a module; {suggestion}.")
