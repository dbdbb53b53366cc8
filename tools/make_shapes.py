#!/usr/bin/env python
"""Make the synthetic dataset ``shapes`` ahead of its first use, and print the folder that it lies in."""

import argparse
import logging
from pathlib import Path

from dimaskdino.command_line import at_least
from dimaskdino.errors import run_cli


def parse_args() -> argparse.Namespace:
    """The command line; what it leaves out is as the keys of DATASETS.SHAPES are by default."""
    parser = argparse.ArgumentParser(description=__doc__, argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add("--root", type=Path, help="DATASETS.SHAPES.ROOT (default: shapes in the folder of all datasets)")
    add("--num-train", type=int, help="pictures in shapes_train (default: DATASETS.SHAPES.NUM_TRAIN)")
    add("--num-val", type=int, help="pictures in shapes_val (default: DATASETS.SHAPES.NUM_VAL)")
    add("--image-size", type=int, help="side of the square pictures in pixels (default: DATASETS.SHAPES.IMAGE_SIZE)")
    add("--seed", type=int, help="what the pictures are drawn from (default: DATASETS.SHAPES.SEED)")
    add("--workers", type=at_least(0), help="processes that draw; the files do not depend on it (default: 0)")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes end here, before the imports that take seconds

from dimaskdino.data.datasets import data_root
from dimaskdino.data.datasets.shapes import ShapesSpec, make_shapes


def main() -> None:
    """Make the dataset that the command line asks for."""
    given = vars(parse_args())
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    root, workers = given.pop("root", data_root() / "shapes"), given.pop("workers", 0)
    print(make_shapes(root, ShapesSpec(**given), num_workers=workers))


if __name__ == "__main__":
    run_cli(main)
