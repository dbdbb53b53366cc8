"""What the command lines of train_net.py and the tools share."""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence

from dimaskdino.errors import ConfigError


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: an integer that is at least ``least``."""

    def integer(text: str) -> int:
        number = int(text)
        if number < least:
            raise argparse.ArgumentTypeError(f"{number} is too small; it must be at least {least}")
        return number

    return integer  # argparse shows this name if the text is not a number.


def add_import_flag(parser: argparse.ArgumentParser) -> None:
    """Add ``--import MODULE``, which may be repeated; the parsed names are in ``modules``."""
    parser.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="your module that registers parts or datasets, such as my.parts for my/parts.py in the current folder; "
        "can be repeated",
    )


def import_modules(names: Sequence[str]) -> None:
    """Import modules by name from the current folder, or from where Python finds them.

    Raises:
        ConfigError: a name is not a module's. Errors inside a module are not caught.
    """
    folder = os.getcwd()
    if names and folder not in sys.path:
        sys.path.insert(0, folder)  # As with `python -m`; for a script, its own folder is first.
    for name in names:
        if name.endswith(".py") or not all(part.isidentifier() for part in name.split(".")):
            module = name.removesuffix(".py").strip("./").replace("/", ".")
            raise ConfigError(f"--import {name}: give a module's name, not a path: {module or 'my.parts'}.")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            # Any other missing module is one that this module imports.
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            raise ConfigError(
                f"--import {name}: there is no module {error.name} in the current folder {folder}, in PYTHONPATH, or "
                "among the installed packages."
            ) from error
