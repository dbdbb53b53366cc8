"""The command line of train_net.py, and what those of the tools share with it. Loads no torch, so --help is quick."""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dimaskdino.errors import ConfigError, where_raised

EXAMPLES = """
Without --num-gpus, one GPU is used if there is one, else the CPU; --num-gpus 0 always means the CPU.

  train on 8 GPUs      train_net.py --config-file FILE --num-gpus 8
  change keys          train_net.py --config-file FILE SOLVER.BASE_LR 0.0002 OUTPUT_DIR output/run
  go on                train_net.py --config-file FILE --resume
  evaluate             train_net.py --config-file FILE --eval-only MODEL.WEIGHTS model.pth
  two on the CPU       train_net.py --config-file FILE --num-gpus 0 --cpu-processes 2
  two machines         train_net.py --config-file FILE --num-gpus 8 --num-machines 2 --machine-rank 0|1 --dist-url URL
  under torchrun       torchrun --nproc_per_node 8 train_net.py --config-file FILE
  your parts and data  train_net.py --config-file FILE --import my_parts MODEL.MaskDINO.BATO.NAME MyBato
"""


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


def add_model_flags(parser: argparse.ArgumentParser, *, device: bool = True) -> None:
    """Add what tools that run a model share: ``--device`` if wanted, ``--import``, and ``--opts KEY VALUE``."""
    if device:
        parser.add_argument("--device", help='such as "cpu" or "cuda:1" (default: a GPU if there is one)')
    add_import_flag(parser)
    metavar = ("KEY", "VALUE")
    parser.add_argument(
        "--opts", nargs="+", default=[], metavar=metavar, help="keys of the configuration, after all else"
    )


def names_of_runs(runs: Sequence[Path]) -> list[str]:
    """What runs are called: by their folder, or their file without its suffix; another of one name is numbered."""
    names: list[str] = []
    for number, path in enumerate((run.resolve() for run in runs), start=1):
        name = own = path.name if path.is_dir() else path.stem  # folders such as lr_0.01 have no suffix
        while name in names:
            name, number = f"{own} {number}", number + 1
        names.append(name)
    return names


class CommandLine(argparse.ArgumentParser):
    """Parses a command line and says what to do if nothing is given, or a key of the configuration as a flag."""

    # Flags of other programs whose keys have another name.
    KEYS = {"BATCH_SIZE": "IMS_PER_BATCH", "LR": "BASE_LR", "LEARNING_RATE": "BASE_LR", "EPOCHS": "MAX_ITER"}

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse ``args``, by default the program's."""
        if args is None and not sys.argv[1:]:
            self.error("give --config-file FILE, for example configs/coco/dimaskdino_r50_12ep.yaml; see --help.")
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Exit with usage, message and status 2."""
        if message.startswith("unrecognized arguments: --"):
            flag = message.split()[2].partition("=")[0]
            name = flag.lstrip("-").replace("-", "_").upper()
            from dimaskdino.config import get_cfg  # loads torch

            try:
                get_cfg().merge_from_list([self.KEYS.get(name, name), ""])
            except ConfigError as error:
                message = f"there is no flag {flag}; keys follow the flags as KEY VALUE, without dashes. {error}"
        super().error(message)


def argument_parser() -> argparse.ArgumentParser:
    """detectron2's command line plus ``--eval-layers`` and ``--import``.

    ``num_gpus`` is None unless given. ``--dist-url`` is "auto" by default: detectron2's default is a port that depends
    on the user only, so a second job on the same machine would fail.
    """
    parser = CommandLine(epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config-file", default="", metavar="FILE", help="configuration")
    add("--resume", action="store_true", help="go on from the last checkpoint in OUTPUT_DIR")
    add("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS, with --resume the last checkpoint")
    add("--eval-layers", default="", metavar="STAGES", help="evaluate after these stages too: all, or layer.0,layer.5")
    add_import_flag(parser)
    add("--num-gpus", type=int, metavar="N", help="number of GPUs of this machine")
    add("--cpu-processes", type=at_least(1), default=1, metavar="N", help="processes of this machine without a GPU")
    add("--num-machines", type=int, default=1, metavar="N", help="number of machines")
    add("--machine-rank", type=int, default=0, metavar="N", help="number of this machine, from 0 on")
    add("--dist-url", default="auto", metavar="URL", help="where the processes meet; tcp://HOST:PORT of machine 0")
    add("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="keys of the configuration and their values")
    return parser


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
        except (Exception, SystemExit) as error:  # a module of the user's may raise anything
            raise _broken(name, error) from error


def _broken(name: str, error: BaseException) -> ConfigError:
    return ConfigError(
        f"--import {name}: the module does not import. {where_raised(error)}{' '.join(str(error).split())}"
    )


def _check_name(name: str) -> None:
    as_module = name.removesuffix(".py").removeprefix("./").replace("/", ".").replace("\\", ".")
    if name == as_module and all(part.isidentifier() for part in name.split(".")):
        return
    suggestion = f"write --import {as_module}" if name.endswith(".py") else "write my.parts for my/parts.py"
    raise ConfigError(f"--import {name} is not the name of a module; {suggestion}.")
