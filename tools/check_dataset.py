#!/usr/bin/env python
"""Check a registered dataset from end to end: files, sizes, categories, boxes, masks, duplicates; count and draw them.

Exits with 1 if anything is wrong with the dataset, with 2 if it cannot be checked at all.
"""

import argparse
import csv
import itertools
import logging
import sys
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as mask_util
from tqdm import tqdm

from dimaskdino.command_line import add_import_flag, at_least, import_modules
from dimaskdino.data import register_all
from dimaskdino.data.coco_file import Json
from dimaskdino.data.images import read_image
from dimaskdino.data.rle import Size
from dimaskdino.data.validation.dataset import Dataset
from dimaskdino.data.validation.inspection import Inspection, inspect_dataset
from dimaskdino.data.validation.report import problem_table, region_kind
from dimaskdino.data.validation.rules import read_mask
from dimaskdino.errors import DatasetError, run_cli
from dimaskdino.visualization import Objects, draw_objects

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


def draw_samples(dataset: Dataset, count: int, folder: Path, *, apply_exif: bool = True) -> list[Path]:
    """Draw images that have annotations, chosen evenly over the dataset; skips those that cannot be read.

    Args:
        dataset: what to draw.
        count: pictures to draw; fewer if fewer images have annotations.
        folder: where they go, as PNG; made if missing.
        apply_exif: read photos as INPUT.APPLY_EXIF says.

    Returns:
        The pictures' paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    annotated = [picture for picture in dataset.pictures if picture.annotations]
    chosen = np.unique(np.linspace(0, len(annotated) - 1, min(count, len(annotated))).astype(int))
    paths: list[Path] = []
    for picture in (annotated[index] for index in chosen.tolist()):
        try:
            pixels = read_image(picture.path, "RGB", apply_exif=apply_exif)
        except DatasetError:
            continue
        paths.append(_free_path(folder, Path(picture.path).stem, paths))
        objects = _objects(dataset, picture.annotations, pixels.shape[:2])
        Image.fromarray(draw_objects(pixels, objects, by_instance=True)).save(paths[-1])
    return paths


def _free_path(folder: Path, stem: str, taken: list[Path]) -> Path:
    """A picture's path by the image's name, numbered from the second of a name on: 0.png, 0_2.png."""
    names = itertools.chain([stem], (f"{stem}_{number}" for number in itertools.count(2)))
    return next(path for name in names if (path := folder / f"{name}.png") not in taken)


def _objects(dataset: Dataset, annotations: list[Json], size: Size) -> Objects:
    """The annotations of known classes; a box or mask that cannot be used is empty."""
    rules = dataset.rules(with_masks=False, scored=False)
    shown = [annotation for annotation in annotations if rules.class_name(annotation, [])]
    order = list(dataset.classes)
    kinds = [region_kind(annotation) for annotation in shown]
    names = [dataset.classes[annotation["category_id"]] for annotation in shown]
    return Objects(
        classes=[order.index(annotation["category_id"]) for annotation in shown],
        names=[name if kind == "objects" else f"{name} ({kind})" for name, kind in zip(names, kinds, strict=True)],
        boxes=np.array([rules.box(each, size, []) or [0.0] * 4 for each in shown], dtype=float).reshape(-1, 4),
        masks=np.array([_pixels_of(each, size) for each in shown], dtype=bool).reshape(-1, *size),
    )


def _pixels_of(annotation: Json, size: Size) -> np.ndarray:
    """The mask (H, W) bool; empty if it cannot be used."""
    try:
        mask = read_mask(annotation.get("segmentation"), size)
    except ValueError:
        mask = None
    if mask is None or not (mask.polygons or mask.rle):
        return np.zeros(size, dtype=bool)
    return mask_util.decode(mask.rasterized(size)).astype(bool)


if __name__ == "__main__":
    run_cli(main)
