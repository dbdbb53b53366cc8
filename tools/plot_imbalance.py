#!/usr/bin/env python
"""Draw the paper's Figure 1 from evaluated runs: box and mask AP at the first and the last decoder layer.

A run is a folder (OUTPUT_DIR of train_net.py --eval-layers all) or its inference/layers.json.
"""

import argparse
from pathlib import Path

from dimaskdino.errors import UserError, run_cli


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or a layers.json")
    parser.add_argument("--labels", nargs="+", metavar="LABEL", help="a name for each run; default: its folder's")
    parser.add_argument("--output", type=Path, default=Path("imbalance.png"), help="picture: .png, .pdf, or .svg")
    parser.add_argument("--all-layers", action="store_true", help="a second panel with every stage as lines")
    parser.add_argument(
        "--paper", action="store_true", help="the paper's bars beside those of runs named MaskDINO or DI-MaskDINO"
    )
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes end here, before the imports that take seconds

from dimaskdino.reproduction.charts import StageResults, draw_imbalance
from dimaskdino.reproduction.runs import read_stages

SUFFIXES = (".png", ".pdf", ".svg")


def main() -> None:
    """Read and draw."""
    args = parse_args()
    labels = args.labels or [folder_of(run).name for run in args.runs]
    if len(labels) != len(args.runs):
        raise UserError(f"--labels names {len(labels)} runs, but there are {len(args.runs)}.")
    runs = [StageResults(label, read_stages(run)) for label, run in zip(labels, args.runs, strict=True)]
    output = picture_path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    draw_imbalance(runs, output, with_paper=args.paper, lines=args.all_layers)
    print(output)


def picture_path(path: Path) -> Path:
    """The picture to write, a PNG if no format is named.

    Raises:
        UserError: it is a folder, or another format.
    """
    if not (path.suffix or path.is_dir()):
        path = path.with_name(f"{path.name}.png")
    if path.is_dir():
        raise UserError(f"--output {path} is a folder; name the picture in it: {path / 'imbalance.png'}.")
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"--output {path} must end in {', '.join(SUFFIXES)}, not in {path.suffix}.")
    return path


def folder_of(run: Path) -> Path:
    """The folder of a run, given itself or its inference/layers.json."""
    return run.resolve().parents[1] if run.is_file() else run.resolve()


if __name__ == "__main__":
    run_cli(main)
