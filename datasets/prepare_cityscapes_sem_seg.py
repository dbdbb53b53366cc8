#!/usr/bin/env python
"""Make Cityscapes' label maps for training: 0 to 18 for the classes that are evaluated, 255 for everything else.

Writes *_gtFine_labelTrainIds.png beside *_gtFine_labelIds.png. An interrupted run continues with the same command.
"""

from dimaskdino.data.datasets import data_root
from dimaskdino.data.datasets.label_conversion import (
    Conversion,
    cityscapes_train_ids,
    convert_and_report,
    label_files,
    parse_args,
)
from dimaskdino.data.datasets.registration import SPLITS
from dimaskdino.errors import run_cli


def main() -> None:
    """Convert what the command line asks for."""
    args = parse_args(__doc__, data_root(), SPLITS)
    for split in args.splits:
        folder = args.root.expanduser() / "cityscapes" / "gtFine" / split
        conversions = [
            Conversion(file, file.with_name(file.name.replace("labelIds", "labelTrainIds")), cityscapes_train_ids)
            for file in label_files(folder, "_gtFine_labelIds.png")
        ]
        print(f"{folder}: {convert_and_report(conversions, args)}")


if __name__ == "__main__":
    run_cli(main)
