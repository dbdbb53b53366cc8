#!/usr/bin/env python
"""Train a small DI-MaskDINO on synthetic pictures, on the CPU, in minutes; print its results and draw what it finds.

With --quick, evaluate and draw the trained model that comes with the repository, in a minute. With --all, train a model
of every task, one after the other, and draw one picture that shows all tasks; the same command continues a stopped run.
"""

import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple

from dimaskdino.command_line import at_least
from dimaskdino.errors import UserError, run_cli

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "demo"
MODEL = Path(__file__).resolve().with_name("demo_model.pth")  # trained by `make demo`
OUTPUT = Path("output/demo")


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--quick", action="store_true", help=f"evaluate and draw {MODEL.name} instead of training")
    kind.add_argument("--smoke", action="store_true", help="train a few iterations: tests the code, learns nothing")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--all", action="store_true", help="boxes, instances, panoptic, semantic: over an hour")
    config = CONFIGS / "dimaskdino_shapes.yaml"
    what.add_argument("--config-file", default=str(config), help="model and schedule (default: the demo's)")
    parser.add_argument(
        "--output",
        type=Path,
        help=f"folder for all files (default: {OUTPUT}; {OUTPUT}_all, {OUTPUT}_quick, and {OUTPUT}_smoke)",
    )
    parser.add_argument(
        "--seed", type=at_least(0), default=1, help="of the pictures, the weights, and the training (default: 1)"
    )
    parser.add_argument("--pictures", type=at_least(1), default=6, help="rows of the picture grid (default: 6)")
    demo = parser.parse_args()
    if demo.all and demo.quick:
        parser.error("--quick has a trained model of instances alone; --all trains, with --smoke for a few iterations.")
    suffix = "_all" * demo.all + ("_quick" if demo.quick else "_smoke" if demo.smoke else "")
    demo.output = demo.output or OUTPUT.with_name(OUTPUT.name + suffix)
    return demo


if __name__ == "__main__":
    parse_args()  # --help and mistakes end here, before the imports that take seconds

import numpy as np

from dimaskdino.engine import argument_parser, launch, train_or_evaluate
from dimaskdino.engine.launch import cpu_processes
from dimaskdino.engine.pictures import rows_of_checkpoint, save_pictures
from dimaskdino.engine.setup import load_config
from dimaskdino.evaluation import coco_table, layer_table
from dimaskdino.evaluation.report import panoptic_table, semantic_table
from dimaskdino.structures.stages import Stage
from dimaskdino.visualization import save_grid

# --quick evaluates on the pictures of the demo and trains on none.
QUICK = ["DATASETS.SHAPES.NUM_TRAIN", "1"]
SMOKE = [
    *("DATASETS.SHAPES.NUM_TRAIN", "64", "DATASETS.SHAPES.NUM_VAL", "16"),
    *("SOLVER.MAX_ITER", "20", "SOLVER.STEPS", "(15,)", "SOLVER.WARMUP_ITERS", "5"),
]


class Task(NamedTuple):
    """One of the trainings of --all: its configuration, and its column in the picture, if it has one."""

    config: str
    column: str = ""


TASKS = (
    Task("dino_shapes", "boxes (DINO)"),
    Task("dimaskdino_shapes", "instances (DI-MaskDINO)"),
    Task("dimaskdino_panoptic_shapes", "panoptic (DI-MaskDINO)"),
    Task("maskdino_panoptic_shapes"),
    Task("maskdino_semantic_shapes", "semantic (Mask DINO)"),
)


def main() -> None:
    """Train or load, evaluate, report, draw."""
    demo = parse_args()
    started = time.perf_counter()
    if demo.all:
        show_all(demo)
    else:
        show_one(demo)
    print(f"time:     {(time.perf_counter() - started) / 60:.1f} min")


def show_one(demo: argparse.Namespace) -> None:
    """One configuration: its results, and its pictures beside the truth."""
    run = demo.output / "run"
    args = run_arguments(demo, demo.config_file, run)
    what = f"Evaluating {MODEL.name}" if demo.quick else "Training and evaluating"
    print(f"1. {what} on the CPU; all details are in {run}/log.txt", flush=True)
    launch(train_or_evaluate, args, cpu_processes=cpu_processes())
    print(f"\n{report(run)}\n")
    print("2. Drawing what the model finds", flush=True)
    picture = demo.output / "predictions.png"
    save_pictures(load_config(args), MODEL if demo.quick else run / "model_final.pth", picture, demo.pictures)
    print(f"pictures: {picture}")
    written = [path for name in ("results.json", "layers.csv") if (path := run / "inference" / name).is_file()]
    print(f"results:  {', '.join(map(str, written))}")


def show_all(demo: argparse.Namespace) -> None:
    """Every task: the results of each, and one picture."""
    columns: dict[str, list[np.ndarray]] = {}
    for number, task in enumerate(TASKS, start=1):
        run = demo.output / task.config / "run"
        args = run_arguments(demo, str(CONFIGS / f"{task.config}.yaml"), run, resume=True)
        print(f"{number} of {len(TASKS)}. Training and evaluating {task.config}; details: {run}/log.txt", flush=True)
        launch(train_or_evaluate, args, cpu_processes=cpu_processes())
        print(f"\n{report(run)}\n", flush=True)
        if task.column:
            rows = rows_of_checkpoint(load_config(args), run / "model_final.pth", demo.pictures)
            images, _, found = zip(*rows, strict=True)
            # Models of boxes and instances see pictures without stuff.
            with_stuff = "panoptic" in task.config or "semantic" in task.config
            columns.setdefault("input with stuff" if with_stuff else "input", list(images))
            columns[task.column] = list(found)
    picture = demo.output / "tasks.png"
    save_grid(list(zip(*columns.values(), strict=True)), list(columns), picture)
    print(f"pictures: {picture}")
    print(f"results:  {demo.output}/*/run/inference/results.json")


def run_arguments(demo: argparse.Namespace, config_file: str, run: Path, *, resume: bool = False) -> argparse.Namespace:
    """The command line of train_net.py that does the same.

    Raises:
        UserError: --quick, but the trained model is not there.
    """
    arguments = ["--config-file", config_file, "--num-gpus", "0", *(["--resume"] if resume else [])]
    options = [
        *("OUTPUT_DIR", str(run), "SEED", str(demo.seed)),
        *("DATASETS.SHAPES.ROOT", str(demo.output / "shapes"), "DATASETS.SHAPES.SEED", str(demo.seed)),
    ]
    if demo.quick:
        if not MODEL.is_file():
            raise UserError(
                f"--quick evaluates {MODEL}, which does not exist; take it from the repository, or train a model with "
                "tools/demo.py (15 to 20 minutes on two cores)."
            )
        arguments.append("--eval-only")
        options += [*QUICK, "MODEL.WEIGHTS", str(MODEL)]
    return argument_parser().parse_args([*arguments, *options, *(SMOKE if demo.smoke else [])])


def report(run: Path) -> str:
    """The tables of what was scored and the table by stage, with the imbalance at the first and the last layer."""
    results = json.loads((run / "inference" / "results.json").read_text())
    tables = {"bbox": lambda _: coco_table(results), "panoptic_seg": panoptic_table, "sem_seg": semantic_table}
    parts = ["Percent:", *(table(results[task]) for task, table in tables.items() if task in results)]
    by_stage = run / "inference" / "layers.json"
    if by_stage.is_file():
        rows = json.loads(by_stage.read_text())
        layers = [row for row in rows if Stage.from_name(row["stage"]).kind == "layer" and "gap" in row]
        ends = {"first": layers[0], "last": layers[-1]} if layers else {}
        gaps = [f"box minus mask AP at the {name} decoder layer: {row['gap']:+.1f}" for name, row in ends.items()]
        parts += [f"after every stage\n{layer_table(rows)}", *(["\n".join(gaps)] if gaps else [])]
    return "\n\n".join(parts)


if __name__ == "__main__":
    run_cli(main)
