#!/usr/bin/env python
"""Convert BDD100K's instance segmentation labels to the COCO files of bdd100k_ins_seg_train and bdd100k_ins_seg_val.

An interrupted run resumes with the same command. The files do not depend on the number of workers.
"""

import argparse
import json
import logging
from functools import partial
from pathlib import Path

from tqdm import tqdm

from dimaskdino.command_line import at_least
from dimaskdino.data.datasets import data_root
from dimaskdino.data.datasets.bdd100k import SOURCES, SPLITS, annotation_file, image_folder
from dimaskdino.data.datasets.bdd100k_convert import convert_split
from dimaskdino.data.validation.dataset import open_file
from dimaskdino.data.validation.report import problem_table
from dimaskdino.errors import run_cli

logger = logging.getLogger(__name__)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--root", type=Path, default=data_root(), help="the folder that holds bdd100k/")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=SPLITS, help="what to convert")
    parser.add_argument("--source", choices=SOURCES, default=SOURCES[0], help="which of the official labels to read")
    parser.add_argument("--workers", type=at_least(0), default=0, help="processes that convert, beside this one")
    parser.add_argument("--force", action="store_true", help="convert again what exists already")
    return parser.parse_args()


def made_from(output: Path) -> str:
    """The labels that an annotation file was made from."""
    try:
        return json.loads(output.read_bytes())["info"]["source"]
    except (ValueError, KeyError, TypeError):
        return "something else"


def main() -> None:
    """Convert what the command line asks for, and report on it."""
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = args.root.expanduser() / "bdd100k"
    for split in args.splits:
        output = annotation_file(folder, split)
        if output.is_file() and not args.force:
            logger.info("%s exists already, made from %s; --force makes it again", output, made_from(output))
            continue
        progress = partial(tqdm, desc=f"bdd100k {split}", unit="image")
        _, problems = convert_split(folder, split, args.source, num_workers=args.workers, progress=progress)
        counts = open_file("bdd100k", str(output), str(image_folder(folder, split))).counts()
        logger.info("\n%s\n\n%s\n", output, counts.table())
        logger.info("%s\n", problem_table(problems) if problems else "No problem was found.")


if __name__ == "__main__":
    run_cli(main)
