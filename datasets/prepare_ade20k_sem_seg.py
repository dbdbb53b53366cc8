#!/usr/bin/env python
"""Make ADE20K's label maps for training: 0 to 149 for the classes, 255 for no class.

As downloaded, 0 means no class and 1 to 150 are the classes. An interrupted run continues with the same command.
"""

from dimaskdino.data.datasets import data_root
from dimaskdino.data.datasets.label_conversion import (
    Conversion,
    convert_and_report,
    label_files,
    parse_args,
    shift_ade20k,
)
from dimaskdino.data.datasets.semantic import ADE20K_FOLDER, ADE20K_SPLITS
from dimaskdino.errors import run_cli


def main() -> None:
    """Convert what the command line asks for."""
    args = parse_args(__doc__, data_root(), list(ADE20K_SPLITS))
    folder = args.root.expanduser() / ADE20K_FOLDER
    for split in args.splits:
        source, target = (folder / name / ADE20K_SPLITS[split] for name in ("annotations", "annotations_detectron2"))
        files = label_files(source, ".png")
        conversions = [Conversion(file, target / file.relative_to(source), shift_ade20k) for file in files]
        print(f"{target}: {convert_and_report(conversions, args)}")


if __name__ == "__main__":
    run_cli(main)
