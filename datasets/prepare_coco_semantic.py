#!/usr/bin/env python
"""Make semantic label maps of COCO's panoptic PNGs: 0 to 132 for the classes, 255 for none and for crowd regions.

This package reads the panoptic PNGs themselves; the maps are for other programs. An interrupted run continues with the
same command.
"""

from functools import partial
from pathlib import Path
from typing import Any

from detectron2.data import MetadataCatalog

from dimaskdino.data.coco_file import read_json
from dimaskdino.data.datasets import data_root, register_all
from dimaskdino.data.datasets.label_conversion import Conversion, classes_of_segments, convert_and_report, parse_args
from dimaskdino.data.datasets.registration import SPLITS
from dimaskdino.errors import DatasetError, run_cli


def main() -> None:
    """Convert what the command line asks for."""
    args = parse_args(__doc__, data_root(), SPLITS)
    root = args.root.expanduser() / "coco"
    register_all()
    metadata = MetadataCatalog.get("coco_2017_val_panoptic")
    classes = metadata.stuff_dataset_id_to_contiguous_id | metadata.thing_dataset_id_to_contiguous_id
    for split in args.splits:
        target = root / f"panoptic_semseg_{split}2017"
        conversions = [
            Conversion(
                root / f"panoptic_{split}2017" / image["file_name"],
                target / image["file_name"],
                partial(classes_of_segments, segments=image["segments_info"], classes=classes),
            )
            for image in annotations_of(root / "annotations" / f"panoptic_{split}2017.json")
        ]
        print(f"{target}: {convert_and_report(conversions, args)}")


def annotations_of(path: Path) -> list[dict[str, Any]]:
    """What a panoptic file says of each image.

    Raises:
        DatasetError: it is missing, or not in COCO's panoptic form.
    """
    annotations = read_json(path).get("annotations", [])
    if not all("segments_info" in each for each in annotations):
        raise DatasetError(f"{path} is not in COCO's panoptic form: annotations have no segments_info.")
    return annotations


if __name__ == "__main__":
    run_cli(main)
