#!/usr/bin/env python
"""Draw what two runs find side by side, after the first and the last decoder layer, beside the truth.

A row for each image: the truth (of a dataset; else the image), the first run's first and last layer, the second run's.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from dimaskdino.command_line import add_model_flags, at_least, fraction, import_modules, names_of_runs
from dimaskdino.cpu import keep_freed_memory
from dimaskdino.errors import BAD_INPUT_STATUS, UserError, run_cli


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs=2, type=Path, metavar="RUN", help="run folder, saved model, or configuration")
    add("--images", nargs="+", type=Path, metavar="FILE", help="images to draw")
    add("--dataset", metavar="NAME", help="draw images of a registered dataset, beside their truth")
    add("--number", type=at_least(1), default=4, help="of images of the dataset that have objects (default: 4)")
    add("--labels", nargs=2, metavar="LABEL", help="names of the runs (default: their folders')")
    add("--score", type=fraction, default=0.35, help="least score of a detection (default: 0.35)")
    add("--width", type=at_least(64), default=420, help="of each picture, px (default: 420)")
    add("--output", type=Path, default=Path("comparison.png"), help="picture (default: comparison.png)")
    add_model_flags(parser)
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes end here, before the imports that take seconds

import numpy as np
from PIL import Image

from dimaskdino import Predictor
from dimaskdino.analysis.stages import drawn_truth, read_dataset, true_objects
from dimaskdino.prediction.outputs import check_writable
from dimaskdino.visualization import Objects, draw_objects, save_grid, to_picture

Truth = Callable[[tuple[int, ...]], Objects]  # from the (height, width) of the image


def main() -> None:
    """Predict and draw; the exit status is 3 if some images could not be read."""
    args = parse_args()
    import_modules(args.modules)
    if (args.images is None) == (args.dataset is None):
        raise UserError("Name either --images or --dataset.")
    check_picture(args.output)
    common = {"options": args.opts, "device": args.device, "layers": ["all"], "score": args.score}
    predictors = [Predictor(run, **common) for run in args.runs]
    keep_freed_memory(predictors[0].model.device.type)
    labels = args.labels or names_of_runs(args.runs)
    rows, bad = [], 0
    for path, truth in pictures(args, predictors[0]):
        try:
            rows.append(draw_row(path, truth, predictors, args.width))
        except UserError as error:
            print(error, file=sys.stderr)
            bad += 1
    titles = [f"{label}, {which} layer" for label in labels for which in ("first", "last")]
    if rows:
        save_grid(rows, ["image" if args.images else "truth", *titles], args.output)
        print(args.output)
    if bad:
        print(f"{bad} could not be drawn; they are named above", file=sys.stderr)
        sys.exit(BAD_INPUT_STATUS)


def check_picture(path: Path) -> None:
    """Check that a picture can be written, before anything is computed.

    Raises:
        UserError: Pillow knows no such format.
        OSError: naming the folder that cannot be written.
    """
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise UserError(f"--output {path} has no suffix of a picture; give one, such as .png or .jpg.")
    check_writable(path.parent)


def draw_row(path: Path, truth: Truth, predictors: list[Predictor], width: int) -> list[np.ndarray]:
    """The image with its truth, and what each run finds."""
    image = to_picture(predictors[0].read(path))
    row = [draw_objects(image, truth(image.shape[:2]), width=width)]
    for predictor in predictors:
        found = predictor(path)
        row += [found.at(stage).drawn(width=width) for stage in first_and_last(predictor)]
    return row


def first_and_last(predictor: Predictor) -> tuple[str, str]:
    """Names of the first and the last decoder layer."""
    layers = [stage.name for stage in predictor.model.stages if stage.kind == "layer"]
    return layers[0], layers[-1]


def pictures(args: argparse.Namespace, predictor: Predictor) -> Iterator[tuple[Path, Truth]]:
    """The path of each image, and its truth."""
    if args.images:
        yield from ((path, lambda size: Objects(classes=[], names=[])) for path in args.images)
        return
    names, entries, truth = read_dataset(predictor.cfg, args.dataset, 100 * args.number)
    described = zip(entries, true_objects(truth, entries), strict=True)
    chosen = [(entry, objects) for entry, objects in described if len(objects.classes)][: args.number]
    yield from ((Path(entry["file_name"]), partial(drawn_truth, objects, names)) for entry, objects in chosen)


if __name__ == "__main__":
    run_cli(main)
