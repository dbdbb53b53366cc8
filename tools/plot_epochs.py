#!/usr/bin/env python
"""Draw scores against epochs from runs' records: DINO's Figure 7 (AP), and with --atd its Figure 4.

--atd K measures the average top-k distance of DINO on all and on small objects, of every checkpoint of a run on its
test set. What was measured is kept in the run's inference/anchor_distances.json.
"""

import argparse
from functools import partial
from pathlib import Path

from dimaskdino.command_line import add_import_flag, at_least, import_modules
from dimaskdino.errors import UserError, run_cli


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a training")
    parser.add_argument("--labels", nargs="+", metavar="LABEL", help="a name for each run; default: its folder's")
    parser.add_argument(
        "--metrics", nargs="+", metavar="NAME", help="scores as metrics.json names them (default: bbox/AP)"
    )
    parser.add_argument("--atd", type=at_least(1), metavar="K", help="the average top-k distance, in two panels")
    parser.add_argument(
        "--epoch-images", type=at_least(1), metavar="N", help="images of an epoch; default: known for the sets here"
    )
    parser.add_argument("--output", type=Path, default=Path("epochs.png"), help="picture: .png, .pdf, or .svg")
    add_import_flag(parser)
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes end here, before the imports that take seconds

from tqdm import tqdm

from dimaskdino.reproduction.charts import picture_path
from dimaskdino.reproduction.epochs import Curve, distance_curves, draw_curves, score_curve


def main() -> None:
    """Read or measure, and draw."""
    args = parse_args()
    import_modules(args.modules)
    labels = args.labels or [run.resolve().name for run in args.runs]
    if len(labels) != len(args.runs):
        raise UserError(f"--labels names {len(labels)} runs, but there are {len(args.runs)}.")
    runs = dict(zip(labels, args.runs, strict=True))
    metrics = args.metrics or ([] if args.atd else ["bbox/AP"])
    panels = {
        metric: [score_curve(run, label, metric, args.epoch_images) for label, run in runs.items()]
        for metric in metrics
    }
    if args.atd:
        panels |= distances(runs, args.atd, args.epoch_images)
    output = picture_path(args.output, "epochs.png")
    output.parent.mkdir(parents=True, exist_ok=True)
    draw_curves(panels, output)
    for score, curves in panels.items():
        for curve in curves:
            print(f"{score}, {curve.label}, epoch {curve.epochs[-1]:.1f}: {curve.scores[-1]:.3f}")
    print(output)


def distances(runs: dict[str, Path], k: int, epoch_images: int | None) -> dict[str, list[Curve]]:
    """ATD(k) of all runs, on all objects and on small ones."""
    measured = []
    for label, run in runs.items():
        progress = partial(tqdm, desc=label, unit="image")
        measured.append(distance_curves(run, label, k, epoch_images, progress))
    return {f"ATD({k}) on {kind} objects": [curves[kind] for curves in measured] for kind in ("all", "small")}


if __name__ == "__main__":
    run_cli(main)
