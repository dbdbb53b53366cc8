#!/usr/bin/env python
"""Make a COCO file of other label files, with a split if wanted; or label files of predictions or a COCO file.

  convert_dataset.py --from yolo --source my_data --images my_data/images --output my_data --split 0.8 0.2
  convert_dataset.py --from coco --source val.json --predictions coco_instances_results.json --to labelme --output out

Exits with 2 if something cannot be used, naming file and line; --skip-bad leaves it out and lists it.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dimaskdino.command_line import at_least, fraction
from dimaskdino.errors import UserError, run_cli


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    formats = ("yolo", "voc", "labelme", "cvat", "masks", "csv", "coco")
    add("--from", dest="source_format", required=True, choices=formats, help="what the labels are")
    add(
        "--to", dest="target_format", default="coco", choices=("coco", "yolo", "labelme", "csv"), help="coco by default"
    )
    add(
        "--source",
        type=Path,
        required=True,
        metavar="PATH",
        help="folder of the labels, or the file of cvat, csv, coco",
    )
    add("--images", type=Path, metavar="DIR", help="folder of the images; by default SOURCE/images, or SOURCE")
    add("--output", type=Path, required=True, metavar="DIR", help="for the COCO files, or the label files")
    add("--classes", nargs="+", default=[], metavar="NAME", help="class names in their order; masks need them")
    add("--split", nargs="+", type=float, default=[], metavar="SHARE", help="of train, val, test, such as 0.8 0.2")
    add("--seed", type=at_least(0), default=0, metavar="N", help="of the split")
    add("--skip-bad", action="store_true", help="leave out what cannot be used, and list it")
    add("--one-based", action="store_true", help="voc: the first pixel is 1, as in the challenge's own files")
    add("--normalized", action="store_true", help="csv: coordinates are parts of the image")
    add("--instances", action="store_true", help="masks: each value is an object, not a class")
    add("--no-exif", action="store_true", help="labels were drawn on photos as stored (INPUT.APPLY_EXIF False)")
    add("--predictions", type=Path, metavar="FILE", help="coco: results to write in place of annotations")
    add("--score", type=fraction, default=0.0, metavar="X", help="of predictions, the least")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes end here, before the imports that take seconds

from tabulate import tabulate

from dimaskdino.data.conversion import labelme, masks, tables, writing, xml_files, yolo
from dimaskdino.data.conversion.labels import (
    Images,
    LabeledImage,
    Problems,
    check_names,
    checked,
    stratified,
    to_coco,
)

SPLIT_NAMES = ("train", "val", "test")
BAD_LISTED = 20


def main() -> None:
    """Read, check, split, write, count."""
    args = parse_args()
    if (args.source_format == "coco") == (args.target_format == "coco"):
        raise UserError("Either --from or --to is coco, and not both.")
    if not args.source.exists():
        raise UserError(f"{args.source} does not exist; --source names the labels.")
    if args.source_format == "coco":
        write_back(args)
        return
    parts = shares(args.split)
    problems = Problems(skip=args.skip_bad)
    images, classes = read(args, problems)
    check_names(classes)
    images = checked(images, problems)
    problems.check()
    folders = stratified(images, parts, args.seed) if parts else [images]
    names = SPLIT_NAMES if parts else ("annotations",)
    for name, part in zip(names, folders, strict=False):
        path = args.output / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(to_coco(part, classes), ensure_ascii=False), encoding="utf-8")
        print(f"{path}: {len(part)} images, {sum(len(image.objects) for image in part)} objects")
    report(images, folders, problems)


def shares(given: Sequence[float]) -> list[float]:
    """The shares of --split, checked."""
    if given and (len(given) > len(SPLIT_NAMES) or not min(given) > 0 or not abs(sum(given) - 1) <= 1e-6):
        raise UserError(f"--split {' '.join(map(str, given))}: give one to three shares above 0 that sum up to 1.")
    return list(given)


def read(args: argparse.Namespace, problems: Problems) -> tuple[list[LabeledImage], list[str]]:
    """The images and class names of the source."""
    folder = args.source if args.source.is_dir() else args.source.parent
    nested = next((folder / name for name in ("images", "JPEGImages") if (folder / name).is_dir()), folder)
    images = Images(args.images or nested, apply_exif=not args.no_exif)
    given = (args.source, images, args.classes, problems)
    if args.source_format == "voc":
        return xml_files.read_voc(*given, one_based=args.one_based)
    if args.source_format == "csv":
        return tables.read_csv(*given, normalized=args.normalized)
    if args.source_format == "masks":
        return masks.read_masks(*given, instances=args.instances)
    readers = {"yolo": yolo.read_yolo, "labelme": labelme.read_labelme, "cvat": xml_files.read_cvat}
    return readers[args.source_format](*given)


def report(images: Sequence[LabeledImage], parts: Sequence[Sequence[LabeledImage]], problems: Problems) -> None:
    """Print the objects by class and part, what was put right, and what was left out."""
    counts = [Counter(each.label for image in part for each in image.objects) for part in parts]
    columns = [f"of them in {name}" for name, _ in zip(SPLIT_NAMES, parts, strict=False)] if len(parts) > 1 else []
    objects = Counter(each.label for image in images for each in image.objects)
    having = Counter(label for image in images for label in {each.label for each in image.objects})
    rows = [
        [label, objects[label], having[label], *(each[label] for each in counts if columns)]
        for label in sorted(objects)
    ]
    print(f"\n{tabulate(rows, ['class', 'objects', 'images', *columns], tablefmt='github')}\n")
    for note, count in problems.notes.items():
        if count:
            print(f"{count} {note}")
    for line in problems.found[:BAD_LISTED]:
        print(f"left out: {line}")
    if len(problems.found) > BAD_LISTED:
        print(f"left out: {len(problems.found) - BAD_LISTED} more")


def write_back(args: argparse.Namespace) -> None:
    """Write the objects of a COCO file, or predictions for its images, as label files."""
    images = list(writing.read_objects(args.source, args.predictions, args.score))
    if args.target_format == "labelme":
        writing.write_labelme(images, args.output)
    elif args.target_format == "csv":
        writing.write_csv(images, args.output)
    else:
        names = [category["name"] for category in writing.read_coco(str(args.source))["categories"]]
        writing.write_yolo(images, args.output, names)
    print(f"{args.output}: {sum(len(objects) for _, objects in images)} objects")


if __name__ == "__main__":
    run_cli(main)
