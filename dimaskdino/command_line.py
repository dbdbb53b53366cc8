"""What the command lines of train_net.py and of the tools have in common."""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence

from dimaskdino.errors import ConfigError


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number that is not smaller than ``least``."""

    def whole_number(text: str) -> int:
        number = int(text)
        if number < least:
            raise argparse.ArgumentTypeError(f"{number} is too small; it must be at least {least}")
        return number

    # argparse calls what is no number at all by this name.
    whole_number.__name__ = "whole number"
    return whole_number


def add_import_flag(parser: argparse.ArgumentParser) -> None:
    """Add ``--import MODULE``, which may be repeated; the names come as ``modules``."""
    parser.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="module of yours that registers parts or datasets, for example my.parts for my/parts.py in the current "
        "folder; may be given several times",
    )


def import_modules(names: Sequence[str]) -> None:
    """Import modules by name, from the current folder or as Python finds them; their own errors are not caught.

    Raises:
        ConfigError: there is no module of that name.
    """
    folder = os.getcwd()
    if names and folder not in sys.path:
        sys.path.insert(0, folder)  # As `python -m` has it; a script has its own folder there.
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ConfigError(f"--import {name}: this is no module's name; my/parts.py is my.parts.")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            # Another module that is missing is one that this one imports.
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            raise ConfigError(
                f"--import {name}: there is no module {error.name}; it was looked for in the current folder {folder}, "
                "in PYTHONPATH and among the installed packages."
            ) from error
