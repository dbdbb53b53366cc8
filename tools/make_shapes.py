#!/usr/bin/env python
"""Make the synthetic dataset ``shapes`` ahead of its first use, and print the folder that it lies in."""

import argparse
import logging
from pathlib import Path

from dimaskdino.command_line import at_least
from dimaskdino.data.datasets import data_root
from dimaskdino.data.datasets.shapes import ShapesSpec, make_shapes
from dimaskdino.errors import run_cli


def parse_args() -> argparse.Namespace:
    """The command line; the defaults are those of DATASETS.SHAPES."""
    spec = ShapesSpec()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--root", type=Path, default=data_root() / "shapes", help="DATASETS.SHAPES.ROOT")
    parser.add_argument("--num-train", type=int, default=spec.num_train, help="pictures in shapes_train")
    parser.add_argument("--num-val", type=int, default=spec.num_val, help="pictures in shapes_val")
    parser.add_argument("--image-size", type=int, default=spec.image_size, help="side of the square pictures in pixels")
    parser.add_argument("--seed", type=int, default=spec.seed, help="what the pictures are drawn from")
    parser.add_argument(
        "--workers", type=at_least(0), default=0, help="processes that draw; the files do not depend on it"
    )
    return parser.parse_args()


def main() -> None:
    """Make the dataset that the command line asks for."""
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    spec = ShapesSpec(num_train=args.num_train, num_val=args.num_val, image_size=args.image_size, seed=args.seed)
    print(make_shapes(args.root, spec, num_workers=args.workers))


if __name__ == "__main__":
    run_cli(main)
