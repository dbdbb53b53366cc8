#!/usr/bin/env python
"""Make semantic label maps of COCO's panoptic PNGs: 0 to 132 for the classes, 255 for none and for crowd regions.

This package reads the panoptic PNGs themselves; the maps are for other programs. An interrupted run continues with the
same command.
"""

from functools import partial

from detectron2.data import MetadataCatalog

from dimaskdino.data.coco_file import read_json
from dimaskdino.data.datasets import data_root, register_all
from dimaskdino.data.datasets.label_conversion import Conversion, classes_of_segments, convert_and_report, parse_args
from dimaskdino.data.datasets.panoptic import SPLITS
from dimaskdino.errors import run_cli


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
            for image in read_json(root / "annotations" / f"panoptic_{split}2017.json")["annotations"]
        ]
        print(f"{target}: {convert_and_report(conversions, args)}")


if __name__ == "__main__":
    run_cli(main)
