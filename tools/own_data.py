#!/usr/bin/env python
"""Train on photos of your own: from a folder and a COCO file to a checkpoint, a table and drawings.

  tools/own_data.py photos/ labels.json
  tools/own_data.py photos/ labels.json --val-images more/ --val-json more.json --weights dimaskdino_r50_12ep.pth

The same as train_net.py with configs/own_data.yaml and DATASETS.TRAIN_JSON, and pictures at the end.
"""

import argparse
import json
import os
import time
from pathlib import Path

from dimaskdino.command_line import at_least
from dimaskdino.errors import UserError, run_cli

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "own_data.yaml"


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("images", help="folder that the annotation file's names are relative to")
    add("json", help="annotations in COCO's format, with masks")
    add("--val-images", default="", help="the same of the images to evaluate on (default: those of the training)")
    add("--val-json", default="", help="their annotations")
    add("--weights", default="", metavar="FILE", help="start from these weights, for example of a release")
    add("--config-file", default=str(CONFIG), help="model and schedule (default: configs/own_data.yaml)")
    add("--output", type=Path, default=Path("output/own"), help="folder for all files (default: output/own)")
    add("--num-gpus", type=int, metavar="N", help="number of GPUs (default: one if there is one)")
    add("--pictures", type=at_least(1), default=6, help="rows of the picture grid (default: 6)")
    add("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    add("opts", nargs="*", metavar="KEY VALUE", help="keys of the configuration and their values")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes end here, before the imports that take seconds

from dimaskdino.engine import argument_parser, launch, train_or_evaluate
from dimaskdino.engine.launch import cpu_processes
from dimaskdino.engine.pictures import save_pictures
from dimaskdino.engine.setup import load_config
from dimaskdino.evaluation import coco_table


def main() -> None:
    """Train, evaluate, report, draw."""
    own = parse_args()
    check_paths(own)
    started = time.perf_counter()
    args = run_arguments(own)
    launch(train_or_evaluate, args, cpu_processes=cpu_processes())
    results = own.output / "inference" / "results.json"
    print(f"\nAP in percent, on {own.val_json or own.json}\n\n{coco_table(json.loads(results.read_text()))}\n")
    weights, picture = own.output / "model_final.pth", own.output / "predictions.png"
    save_pictures(load_config(args), weights, picture, own.pictures)
    print(f"checkpoint: {weights}")
    print(f"results:    {results}")
    print(f"pictures:   {picture}")
    print(f"time:       {(time.perf_counter() - started) / 60:.1f} min")


def check_paths(own: argparse.Namespace) -> None:
    """Refuse what is not there before processes start, which takes many seconds."""
    for key, path, kind, is_there in (
        ("TRAIN_JSON", own.json, "file", os.path.isfile),
        ("VAL_JSON", own.val_json, "file", os.path.isfile),
        ("TRAIN_IMAGES", own.images, "folder", os.path.isdir),
        ("VAL_IMAGES", own.val_images, "folder", os.path.isdir),
    ):
        if path and "://" not in path and not is_there(path):
            raise UserError(f"DATASETS.{key} names {path}, which is not a {kind}; correct the path.")


def run_arguments(own: argparse.Namespace) -> argparse.Namespace:
    """The command line of train_net.py that does the same."""
    keys = {
        "DATASETS.TRAIN_JSON": own.json,
        "DATASETS.TRAIN_IMAGES": own.images,
        "DATASETS.VAL_JSON": own.val_json,
        "DATASETS.VAL_IMAGES": own.val_images,
        "OUTPUT_DIR": str(own.output),
        **({"MODEL.WEIGHTS": own.weights} if own.weights else {}),
    }
    flags = ["--config-file", own.config_file, *(["--resume"] if own.resume else [])]
    flags += [] if own.num_gpus is None else ["--num-gpus", str(own.num_gpus)]
    return argument_parser().parse_args([*flags, *(item for pair in keys.items() for item in pair), *own.opts])


if __name__ == "__main__":
    run_cli(main)
