#!/usr/bin/env python
"""Draw the paper's Figure 1 from evaluated runs: box and mask AP, and PQ, at the first and the last decoder layer.

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

from dimaskdino.reproduction.charts import StageResults, draw_imbalance, picture_path
from dimaskdino.reproduction.runs import read_stages


def main() -> None:
    """Read and draw."""
    args = parse_args()
    labels = args.labels or [folder_of(run).name for run in args.runs]
    if len(labels) != len(args.runs):
        raise UserError(f"--labels names {len(labels)} runs, but there are {len(args.runs)}.")
    runs = [StageResults(label, read_stages(run)) for label, run in zip(labels, args.runs, strict=True)]
    output = picture_path(args.output, "imbalance.png")
    output.parent.mkdir(parents=True, exist_ok=True)
    draw_imbalance(runs, output, with_paper=args.paper, lines=args.all_layers)
    print(output)


def folder_of(run: Path) -> Path:
    """The folder of a run, given itself or its inference/layers.json."""
    return run.resolve().parents[1] if run.is_file() else run.resolve()


if __name__ == "__main__":
    run_cli(main)
