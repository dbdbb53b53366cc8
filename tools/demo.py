#!/usr/bin/env python
"""Train a small DI-MaskDINO on synthetic pictures, on the CPU, in minutes; print its results and draw what it finds.

With --quick, evaluate and draw the trained model that comes with the repository, in a minute.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from dimaskdino.checkpoint import Checkpointer
from dimaskdino.command_line import at_least
from dimaskdino.config import get_cfg
from dimaskdino.data import build_mapper, register_all
from dimaskdino.engine import Trainer, argument_parser, evaluate, launch, setup
from dimaskdino.engine.launch import num_cores
from dimaskdino.errors import UserError, run_cli
from dimaskdino.evaluation import coco_table, layer_table
from dimaskdino.structures.stages import Stage
from dimaskdino.visualization import Objects, draw_objects, save_grid

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "demo"
MODEL = Path(__file__).resolve().with_name("demo_model.pth")  # trained by `make demo`
# Two processes that average gradients use two cores better than two threads do.
MAX_PROCESSES = 2
OUTPUT = Path("output/demo")
MIN_SCORE = 0.35
COLUMNS = ("input", "ground truth", "prediction")
PICTURE_WIDTH_PX = 384
# --quick evaluates on the pictures of the demo and trains on none.
QUICK = ["DATASETS.SHAPES.NUM_TRAIN", "1"]
SMOKE = [
    *("DATASETS.SHAPES.NUM_TRAIN", "64", "DATASETS.SHAPES.NUM_VAL", "16"),
    *("SOLVER.MAX_ITER", "20", "SOLVER.STEPS", "(15,)", "SOLVER.WARMUP_ITERS", "5"),
]


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--quick", action="store_true", help=f"evaluate and draw {MODEL.name} instead of training")
    kind.add_argument("--smoke", action="store_true", help="train a few iterations: tests the code, learns nothing")
    parser.add_argument(
        "--output", type=Path, help=f"folder for all files (default: {OUTPUT}; {OUTPUT}_quick and {OUTPUT}_smoke)"
    )
    config = CONFIGS / "dimaskdino_shapes.yaml"
    parser.add_argument("--config-file", default=str(config), help="model and schedule (default: the demo's)")
    parser.add_argument(
        "--seed", type=at_least(0), default=1, help="of the pictures, the weights, and the training (default: 1)"
    )
    parser.add_argument("--pictures", type=at_least(1), default=6, help="rows of the picture grid (default: 6)")
    demo = parser.parse_args()
    kind_suffix = "_quick" if demo.quick else "_smoke" if demo.smoke else ""
    demo.output = demo.output or OUTPUT.with_name(OUTPUT.name + kind_suffix)
    return demo


def main() -> None:
    """Train or load, evaluate, report, draw."""
    demo = parse_args()
    started = time.perf_counter()
    run = demo.output / "run"
    args = run_arguments(demo, run)
    what = f"Evaluating {MODEL.name}" if demo.quick else "Training and evaluating"
    print(f"1. {what} on the CPU; all details are in {run}/log.txt", flush=True)
    launch(work, args, cpu_processes=min(MAX_PROCESSES, num_cores()))
    print(f"\n{report(run)}\n")
    print("2. Drawing what the model finds", flush=True)
    picture = draw(
        args, MODEL if demo.quick else run / "model_final.pth", demo.output / "predictions.png", demo.pictures
    )
    print(f"pictures: {picture}")
    print(f"results:  {run / 'inference' / 'results.json'}, {run / 'inference' / 'layers.csv'}")
    print(f"time:     {(time.perf_counter() - started) / 60:.1f} min")


def run_arguments(demo: argparse.Namespace, run: Path) -> argparse.Namespace:
    """The command line of train_net.py that does the same.

    Raises:
        UserError: --quick, but the trained model is not there.
    """
    arguments = ["--config-file", demo.config_file, "--num-gpus", "0"]
    options = [
        *("OUTPUT_DIR", str(run), "SEED", str(demo.seed)),
        *("DATASETS.SHAPES.ROOT", str(demo.output / "shapes"), "DATASETS.SHAPES.SEED", str(demo.seed)),
    ]
    if demo.quick:
        if not MODEL.is_file():
            raise UserError(
                f"--quick evaluates {MODEL}, which does not exist; take it from the repository, or train a model with "
                "tools/demo.py (12 minutes on two cores)."
            )
        arguments.append("--eval-only")
        options += [*QUICK, "MODEL.WEIGHTS", str(MODEL)]
    return argument_parser().parse_args([*arguments, *options, *(SMOKE if demo.smoke else [])])


def work(args: argparse.Namespace) -> None:
    """Do what every process does."""
    cfg = setup(args)
    if args.eval_only:
        evaluate(cfg)
    else:
        Trainer(cfg).train()


def report(run: Path) -> str:
    """The COCO table and the table by stage, with the imbalance at the first and the last decoder layer."""
    results = json.loads((run / "inference" / "results.json").read_text())
    rows = json.loads((run / "inference" / "layers.json").read_text())
    layers = [row for row in rows if Stage.from_name(row["stage"]).kind == "layer" and "gap" in row]
    ends = {"first": layers[0], "last": layers[-1]} if layers else {}
    gaps = [f"box minus mask AP at the {name} decoder layer: {row['gap']:+.1f}" for name, row in ends.items()]
    tables = ["shapes_val, AP in percent", coco_table(results), "", "after every stage", layer_table(rows), ""]
    return "\n".join([*tables, *gaps])


@torch.no_grad()
def draw(args: argparse.Namespace, weights: Path, path: Path, num_pictures: int) -> Path:
    """Draw the first pictures of shapes_val that hold objects, beside their truth and what the model finds."""
    cfg = get_cfg()
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list([*args.opts, "MODEL.DEVICE", "cpu", "TEST.EVAL_LAYERS", "[]"])
    register_all(cfg=cfg)
    name = cfg.DATASETS.TEST[0]
    class_names = MetadataCatalog.get(name).thing_classes
    model = Trainer.build_model(cfg).eval()
    Checkpointer(model).load(str(weights))
    mapper = build_mapper(cfg, is_train=False, with_instances=True)
    rows = []
    for entry in [entry for entry in DatasetCatalog.get(name) if entry["annotations"]][:num_pictures]:
        given = mapper(entry)
        found = model([given])[0]["instances"]
        image = given["image"].permute(1, 2, 0).numpy()
        shown = (None, given["instances"], found[found.scores >= MIN_SCORE])
        objects = [
            Objects.from_instances(each, class_names) if each else Objects(classes=[], names=[]) for each in shown
        ]
        rows.append([draw_objects(image, each, width=PICTURE_WIDTH_PX) for each in objects])
    save_grid(rows, COLUMNS, path)
    return path


if __name__ == "__main__":
    run_cli(main)
