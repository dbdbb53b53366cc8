"""Time and memory of the whole model against image size, objects, queries and threads: `python -m benchmarks.scaling`.

Draws a picture and prints its numbers. Every point is a process of its own (benchmarks/one_pass.py) on the CPU, with
random weights: a training step where objects vary, inference elsewhere. Peaks are those of the process.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from tabulate import tabulate

from benchmarks.against import ROOT, Case, measure
from dimaskdino.errors import UserError

mpl.use("Agg")  # no display
from matplotlib import pyplot as plt

CONFIG = ROOT / "configs" / "coco" / "dimaskdino_r50_12ep.yaml"
OBJECTS = 10  # of the smallest training step
AXES = {
    "sizes": "side of the image, px",
    "objects": "objects (training step)",
    "queries": "queries",
    "threads": "threads",
}


def point(axis: str, number: int, side: int) -> tuple[Case, list[str]]:
    """What is measured at one point, and the options of its process beside those of all.

    Args:
        axis: one of :data:`AXES`.
        number: on that axis.
        side: of the image where it does not vary, px.
    """
    if axis == "sizes":
        return Case(number, number), []
    return Case(side, side, number if axis == "objects" else 0), (
        [] if axis == "objects" else [f"--{axis}", str(number)]
    )


def measure_axis(axis: str, numbers: Sequence[int], config_file: Path, side: int, runs: int) -> list[dict[str, float]]:
    """Seconds and GiB of every point of an axis."""
    rows = []
    for number in numbers:
        case, options = point(axis, number, side)
        found = measure(ROOT, case, config_file, ["--runs", str(runs), *options])
        rows.append({axis: number, "seconds": found["seconds"], "peak GiB": found["peak"] / 2**30})
        print(f"{AXES[axis]} {number}: {found['seconds']:.3g} s", file=sys.stderr, flush=True)
    return rows


def draw(measured: dict[str, list[dict[str, float]]], output: Path) -> None:
    """One panel an axis: seconds to the left, memory to the right."""
    figure, panels = plt.subplots(1, len(measured), figsize=(4 * len(measured), 3), squeeze=False)
    for panel, (axis, rows) in zip(panels[0], measured.items(), strict=True):
        x = [row[axis] for row in rows]
        panel.plot(x, [row["seconds"] for row in rows], "o-", color="C0")
        panel.set(xlabel=AXES[axis], ylim=(0, None), xticks=x)
        panel.set_ylabel("seconds", color="C0")
        memory = panel.twinx()
        memory.plot(x, [row["peak GiB"] for row in rows], "s--", color="C1")
        memory.set_ylim(0, None)
        memory.set_ylabel("peak GiB", color="C1")
    figure.tight_layout()
    figure.savefig(output)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", type=Path, default=CONFIG)
    parser.add_argument("--sizes", nargs="*", type=int, default=[256, 512])
    parser.add_argument("--objects", nargs="*", type=int, default=[OBJECTS, 100])
    parser.add_argument("--queries", nargs="*", type=int, default=[100, 300])
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--side", type=int, default=256, help="of the image where it does not vary, px (default: 256)")
    parser.add_argument("--runs", type=int, default=1, help="of the model in a process, of which the median counts")
    parser.add_argument("--output", type=Path, default=Path("scaling.png"), help="picture (default: scaling.png)")
    args = parser.parse_args()
    measured = {}
    try:
        for axis in (axis for axis in AXES if getattr(args, axis)):
            numbers = getattr(args, axis)
            measured[axis] = measure_axis(axis, numbers, args.config_file.resolve(), args.side, args.runs)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    for rows in measured.values():
        print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".3g"), end="\n\n")
    draw(measured, args.output)
    print(f"picture: {args.output}")


if __name__ == "__main__":
    main()
