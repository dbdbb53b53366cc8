"""What the command lines of train_net.py and of the tools have in common."""

import argparse
from collections.abc import Callable


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
