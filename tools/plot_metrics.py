#!/usr/bin/env python
"""Draw the losses and scores of one or several runs over their iterations.

  tools/plot_metrics.py output/run
  tools/plot_metrics.py output/a output/b_seed1 output/b_seed2 --metrics total_loss bbox/AP --output curves.png

Runs whose settings differ by SEED alone become one curve: their mean, and a band from the lowest to the highest. A
dashed line is the loss of the validation (TEST.LOSS).
"""

import argparse
from pathlib import Path

from dimaskdino.errors import run_cli


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run (OUTPUT_DIR)")
    parser.add_argument("--metrics", nargs="+", metavar="NAME", help="names in metrics.json (default: losses and AP)")
    parser.add_argument("--output", type=Path, default=Path("metrics.png"), help="picture (default: metrics.png)")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes end here, before the imports that take seconds

from dimaskdino.analysis.curves import Group, default_metrics, draw_curves, read_groups


def main() -> None:
    """Read the runs, and draw."""
    args = parse_args()
    groups = read_groups(args.runs)
    draw_curves(groups, args.metrics or default_metrics(groups), args.output)
    for group in groups:
        print(f"{group.name}: {', '.join(_last(group, metric) for metric in args.metrics or default_metrics(groups))}")
    print(f"picture: {args.output}")


def _last(group: Group, metric: str) -> str:
    curve = group.curve(metric)
    return f"{metric} {curve[-1, 1]:.4g}" if len(curve) else f"{metric} -"


if __name__ == "__main__":
    run_cli(main)
