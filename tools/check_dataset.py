#!/usr/bin/env python
"""Check a registered dataset from end to end: files, sizes, categories, boxes, masks, duplicates; count and draw them.

Exits with 1 if anything is wrong with the dataset, with 2 if it cannot be checked at all.
"""

import argparse
import csv
import logging
import sys
from functools import partial
from pathlib import Path

from tqdm import tqdm

from dimaskdino.command_line import add_import_flag, at_least, import_modules
from dimaskdino.data import register_all
from dimaskdino.data.drawing import draw_samples
from dimaskdino.data.validation.inspection import Inspection, inspect_dataset
from dimaskdino.data.validation.report import problem_table
from dimaskdino.errors import run_cli

PROBLEMS_STATUS = 1


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("name", metavar="NAME", help="for example coco_2017_val, bdd100k_ins_seg_val or shapes_val")
    parser.add_argument("--root", type=Path, help="folder of all datasets; by default $DETECTRON2_DATASETS or datasets")
    parser.add_argument(
        "--draw", type=at_least(0), default=0, metavar="N", help="images to draw with boxes, masks and names"
    )
    parser.add_argument("--output", type=Path, default=Path("output/check_dataset"), metavar="DIR", help="for files")
    parser.add_argument("--workers", type=at_least(0), default=0, help="processes that read images, beside this one")
    parser.add_argument(
        "--no-exif", action="store_true", help="read photos as stored, as INPUT.APPLY_EXIF False does in training"
    )
    add_import_flag(parser)
    return parser.parse_args()


def main() -> None:
    """Check, report, draw."""
    args = parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    register_all(args.root)
    import_modules(args.modules)
    progress = partial(tqdm, desc=args.name, unit="image")
    exif = not args.no_exif
    inspection = inspect_dataset(args.name, apply_exif=exif, num_workers=args.workers, progress=progress)
    dataset, folder = inspection.dataset, args.output / args.name
    empty = sum(not picture.annotations for picture in dataset.pictures)
    print(f"\n{inspection.counts.table()}\n\n{len(dataset.pictures)} images, {empty} of them without any annotation\n")
    if inspection.exif:
        print(f"{inspection.exif}\n")
    if args.draw > 0:
        paths = draw_samples(dataset, args.draw, folder, apply_exif=exif)
        print(f"Drew {len(paths)} images in {folder}")
    if inspection.findings:
        print(
            f"{problem_table(inspection.findings)}\n\nAll {len(inspection.findings)} are in {write(inspection, folder)}"
        )
        sys.exit(PROBLEMS_STATUS)
    print("No problem was found.")


def write(inspection: Inspection, folder: Path) -> Path:
    """Write every problem with its place as CSV; returns the path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "problems.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["problem", "where"])
        writer.writerows(inspection.findings)
    return path


if __name__ == "__main__":
    run_cli(main)
