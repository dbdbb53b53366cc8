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

from dimaskdino.command_line import add_import_flag, at_least, import_modules
from dimaskdino.errors import DatasetError, run_cli


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("name", metavar="NAME", help="for example coco_2017_val, bdd100k_ins_seg_val or shapes_val")
    parser.add_argument("--root", type=Path, help="folder of all datasets; by default $DETECTRON2_DATASETS or datasets")
    parser.add_argument(
        "--draw", type=at_least(0), default=0, metavar="N", help="images to draw with boxes, masks and names"
    )
    parser.add_argument(
        "--augmented",
        action="store_true",
        help="draw images as training sees them (--config-file, --keys)",
    )
    parser.add_argument("--output", type=Path, default=Path("output/check_dataset"), metavar="DIR", help="for files")
    parser.add_argument("--workers", type=at_least(0), default=0, help="processes that read images, beside this one")
    parser.add_argument(
        "--no-exif", action="store_true", help="read photos as stored, as INPUT.APPLY_EXIF False does in training"
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="configuration that names datasets of yours")
    parser.add_argument("--keys", nargs="+", default=[], metavar="KEY VALUE", help="keys that name datasets of yours")
    add_import_flag(parser)
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes end here, before the imports that take seconds

import numpy as np
from detectron2.config import CfgNode
from PIL import Image
from pycocotools import mask as mask_util
from tabulate import tabulate
from tqdm import tqdm

from dimaskdino.config import get_cfg
from dimaskdino.data import build_mapper, register_all
from dimaskdino.data.coco_file import Json
from dimaskdino.data.datasets.registration import load_dataset
from dimaskdino.data.label_maps import read_label_map, read_segment_ids
from dimaskdino.data.orders import Samples
from dimaskdino.data.parallel import Progress
from dimaskdino.data.readers import PilReader, Reader, image_reader
from dimaskdino.data.validation.dataset import Dataset, find_dataset
from dimaskdino.data.validation.files import evenly_spread, inspect_dataset
from dimaskdino.data.validation.report import Finding, problem_table, region_kind
from dimaskdino.data.validation.rules import read_mask
from dimaskdino.data.validation.segmentation import inspect_segmentation, label_file, mapping_truth_of, truth_of
from dimaskdino.structures.rle_masks import Size
from dimaskdino.visualization import Objects, draw_objects, to_picture

PROBLEMS_STATUS = 1


def main() -> None:
    """Check, report, draw."""
    args = parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    register_all(args.root)
    import_modules(args.modules)  # They may add keys.
    cfg = get_cfg()
    if args.config_file:
        cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.keys)
    register_all(cfg=cfg)
    progress = partial(tqdm, desc=args.name, unit="image")
    exif = cfg.INPUT.APPLY_EXIF and not args.no_exif
    reader = image_reader(cfg) if cfg.INPUT.READER else PilReader("RGB", apply_exif=exif)
    find_dataset(args.name)
    if truth_of(args.name) != "instance":
        check_label_maps(args, cfg, reader, progress, exif=exif)
        return
    inspection = inspect_dataset(args.name, apply_exif=exif, reader=reader, num_workers=args.workers, progress=progress)
    dataset, folder = inspection.dataset, args.output / args.name
    empty = sum(not picture.annotations for picture in dataset.pictures)
    print(f"\n{inspection.counts.table()}\n\n{len(dataset.pictures)} images, {empty} of them without any annotation\n")
    if inspection.exif:
        print(f"{inspection.exif}\n")
    if args.draw > 0 and args.augmented:
        paths = draw_augmented(cfg, args.name, list(dataset.classes.values()), args.draw, folder)
        print(f"Drew {len(paths)} augmented images in {folder}")
    elif args.draw > 0:
        paths = draw_samples(dataset, args.draw, folder, reader)
        print(f"Drew {len(paths)} images in {folder}")
    report(inspection.findings, folder)


def check_label_maps(args: argparse.Namespace, cfg: CfgNode, reader: Reader, progress: Progress, *, exif: bool) -> None:
    """Check, report and draw a panoptic or semantic dataset."""
    folder = args.output / args.name
    options = {"apply_exif": exif, "reader": reader, "num_workers": args.workers, "progress": progress}
    ignore = cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
    entries, counts, findings = inspect_segmentation(args.name, ignore=ignore, **options)
    rows = [[label, *numbers] for label, numbers in counts.items()]
    table = tabulate(rows, ["class", "pixels", "segments", "images"], tablefmt="github")
    print(f"\n{table}\n\n{len(entries)} images\n")
    if args.draw > 0 and args.augmented:
        paths = draw_augmented(mapping_truth_of(cfg, args.name), args.name, list(counts), args.draw, folder)
        print(f"Drew {len(paths)} augmented images in {folder}")
    elif args.draw > 0:
        paths = draw_label_maps(entries, list(counts), args.draw, folder, reader)
        print(f"Drew {len(paths)} images in {folder}")
    report(findings, folder)


def report(findings: list[Finding], folder: Path) -> None:
    """Print what is wrong, or that nothing is; exits where something is."""
    if findings:
        print(f"{problem_table(findings)}\n\nAll {len(findings)} are in {write(findings, folder)}")
        sys.exit(PROBLEMS_STATUS)
    print("No problem was found.")


def write(findings: list[Finding], folder: Path) -> Path:
    """Write every problem with its place as CSV; returns the path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "problems.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["problem", "where"])
        writer.writerows(findings)
    return path


def draw_samples(dataset: Dataset, count: int, folder: Path, reader: Reader | None = None) -> list[Path]:
    """Draw images that have annotations, chosen evenly over the dataset; skips those that cannot be read.

    Returns:
        The paths of at most ``count`` pictures, PNG files in ``folder``, which is made if missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    reader = reader or PilReader("RGB")
    annotated = [picture for picture in dataset.pictures if picture.annotations]
    paths: list[Path] = []
    for picture in (annotated[index] for index in evenly_spread(len(annotated), count)):
        try:
            pixels = to_picture(reader.read(picture.path))
        except DatasetError:
            continue
        paths.append(_free_path(folder, Path(picture.path).stem, paths))
        objects = _objects(dataset, picture.annotations, pixels.shape[:2])
        Image.fromarray(draw_objects(pixels, objects, by_instance=True)).save(paths[-1])
    return paths


def draw_augmented(cfg: CfgNode, name: str, class_names: list[str], count: int, folder: Path) -> list[Path]:
    """Draw images as the training mapper gives them; see :func:`draw_samples`. Reads the keys INPUT and SEED."""
    folder.mkdir(parents=True, exist_ok=True)
    cfg = cfg.clone()
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = len(class_names)
    labels = ("annotations", "segments_info", "sem_seg_file_name")
    listed = load_dataset(name, cfg.INPUT.ANNOTATION_FIELDS)
    entries = [entry for entry in listed if any(entry.get(key) for key in labels)]
    samples = Samples(entries, build_mapper(cfg, is_train=True), max(cfg.SEED, 0))
    paths: list[Path] = []
    for place, index in enumerate(evenly_spread(len(entries), count)):
        mapped = samples[place, index]
        pixels = mapped["image"].numpy().transpose(1, 2, 0)
        pixels = to_picture(pixels[..., ::-1] if cfg.INPUT.FORMAT == "BGR" and not cfg.INPUT.READER else pixels)
        paths.append(_free_path(folder, f"{Path(mapped['file_name']).stem}_augmented", paths))
        objects = Objects.from_instances(mapped["instances"], class_names)
        Image.fromarray(draw_objects(np.ascontiguousarray(pixels), objects, by_instance=True)).save(paths[-1])
    return paths


def draw_label_maps(entries: list[Json], names: list[str], count: int, folder: Path, reader: Reader) -> list[Path]:
    """Draw images of a panoptic or semantic dataset with their segments or classes; see :func:`draw_samples`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for entry in (entries[index] for index in evenly_spread(len(entries), count)):
        segments = entry.get("segments_info")
        try:
            pixels = to_picture(reader.read(entry["file_name"]))
            read = read_label_map if segments is None else read_segment_ids
            labels = read(label_file(entry), pixels.shape[:2])
        except DatasetError:
            continue
        classes = {each["id"]: each["category_id"] for each in segments or ()} or dict(enumerate(range(len(names))))
        paths.append(_free_path(folder, Path(entry["file_name"]).stem, paths))
        objects = Objects.from_segments(labels, classes, names)
        Image.fromarray(draw_objects(pixels, objects, by_instance=segments is not None)).save(paths[-1])
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
