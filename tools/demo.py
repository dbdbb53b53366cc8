#!/usr/bin/env python
"""Train a small DI-MaskDINO on synthetic pictures, on the CPU, in minutes; print its results and draw what it finds."""

import argparse
import json
import logging
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Instances

from dimaskdino.checkpoint import Checkpointer
from dimaskdino.command_line import at_least
from dimaskdino.config import get_cfg
from dimaskdino.data import build_mapper, register_all
from dimaskdino.engine import Trainer, argument_parser, launch, setup
from dimaskdino.engine.launch import num_cores
from dimaskdino.engine.setup import load_config
from dimaskdino.errors import UserError, run_cli
from dimaskdino.evaluation import coco_table, layer_table
from dimaskdino.structures.stages import Stage
from dimaskdino.visualization import Objects, Row, save_grid

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "demo"
# Gradients are averaged over this many processes: two cores are used better so than by two threads.
MAX_PROCESSES = 2
OUTPUT = Path("output/demo")
QUICK_OUTPUT = Path("output/demo_quick")
MIN_SCORE = 0.35
QUICK = [
    *("DATASETS.SHAPES.NUM_TRAIN", "64", "DATASETS.SHAPES.NUM_VAL", "16"),
    *("SOLVER.MAX_ITER", "20", "SOLVER.STEPS", "(15,)", "SOLVER.WARMUP_ITERS", "5"),
]


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--output",
        type=Path,
        default=argparse.SUPPRESS,
        help=f"folder for everything that is made (default: {OUTPUT}, with --quick {QUICK_OUTPUT})",
    )
    parser.add_argument("--config-file", default=str(CONFIGS / "dimaskdino_shapes.yaml"), help="model and schedule")
    parser.add_argument("--seed", type=at_least(0), default=1, help="of the pictures, the weights and the training")
    parser.add_argument("--pictures", type=at_least(1), default=6, help="rows of the picture grid")
    parser.add_argument("--quick", action="store_true", help="one minute that tries the machinery and learns nothing")
    demo = parser.parse_args()
    if "output" not in demo:
        demo.output = QUICK_OUTPUT if demo.quick else OUTPUT
    return demo


def main() -> None:
    """Generate, train, evaluate, report, draw."""
    demo = parse_args()
    started = time.perf_counter()
    run = demo.output / "run"
    args = training_arguments(demo, run)
    load_config(args)
    earlier = set_earlier_aside(run)
    print(f"1. Training and evaluating on the CPU; all details are in {run}/log.txt", flush=True)
    try:
        launch(train, args, cpu_processes=min(MAX_PROCESSES, num_cores()))
    finally:
        settle_earlier(run, earlier)
    print(f"\n{report(run)}\n")
    print("2. Drawing what the model finds", flush=True)
    picture = draw(args, run, demo.output / "predictions.png", demo.pictures)
    print(f"pictures: {picture}")
    print(f"results:  {run / 'inference' / 'results.json'}, {run / 'inference' / 'layers.csv'}")
    print(f"time:     {(time.perf_counter() - started) / 60:.1f} min")


def set_earlier_aside(run: Path) -> Path:
    """Give an earlier run, which would be mixed with this one, another name, and say so.

    Returns:
        Where it lies until :func:`settle_earlier`; nothing is there where there was none.

    Raises:
        UserError: what is there is something else.
    """
    if run.exists() and not (run.is_dir() and is_run(run)):
        raise UserError(f"{run} is not the folder of an earlier run, so it is not replaced; give another --output.")
    earlier = run.with_name(f".{run.name}_set_aside")
    settle_earlier(run, earlier)  # What a demo that was killed left.
    if run.exists():
        print(f"The earlier run in {run} is replaced", flush=True)
        run.rename(earlier)
    return earlier


def settle_earlier(run: Path, earlier: Path) -> None:
    """Remove the run that was set aside if the training of the new one has begun, else put it back and say so."""
    if not earlier.exists():
        return
    # The trainer writes this file once nothing is left that could keep it from training.
    if (run / "config.yaml").is_file():
        shutil.rmtree(earlier)
        return
    if run.exists():
        shutil.rmtree(run)
    earlier.rename(run)
    print(f"The training did not begin, so the earlier run is in {run} again", flush=True)


def is_run(folder: Path) -> bool:
    """Whether the folder is a run's; one that ended before it began holds nothing but what every start writes."""
    written = ("log.txt*", "events.out.tfevents.*")
    return (folder / "config.yaml").is_file() or all(
        any(path.match(pattern) for pattern in written) for path in folder.iterdir()
    )


def training_arguments(demo: argparse.Namespace, run: Path) -> argparse.Namespace:
    """The command line of train_net.py that does the same training."""
    opts = [
        *("OUTPUT_DIR", str(run), "SEED", str(demo.seed)),
        *("DATASETS.SHAPES.ROOT", str(demo.output / "shapes"), "DATASETS.SHAPES.SEED", str(demo.seed)),
        *(QUICK if demo.quick else []),
    ]
    return argument_parser().parse_args(["--config-file", demo.config_file, "--num-gpus", "0", *opts])


def train(args: argparse.Namespace) -> None:
    """What every process does; detectron2's own messages go to the log file alone."""
    cfg = setup(args)
    for name in ("fvcore", "detectron2"):
        for handler in logging.getLogger(name).handlers:
            if getattr(handler, "stream", None) is sys.stdout:
                handler.setLevel(logging.WARNING)
    Trainer(cfg).train()


def report(run: Path) -> str:
    """The COCO table and the table by stage, with the imbalance at the first and the last decoder layer."""
    results = json.loads((run / "inference" / "results.json").read_text())
    rows = json.loads((run / "inference" / "layers.json").read_text())
    layers = [row for row in rows if Stage.from_name(row["stage"]).kind == "layer"]
    return "\n".join(
        [
            "shapes_val, AP in percent",
            coco_table(results),
            "",
            "after every stage",
            layer_table(rows),
            "",
            f"box minus mask AP at the first decoder layer: {layers[0]['gap']:+.1f}",
            f"box minus mask AP at the last decoder layer:  {layers[-1]['gap']:+.1f}",
        ]
    )


@torch.no_grad()
def draw(args: argparse.Namespace, run: Path, path: Path, num_pictures: int) -> Path:
    """Draw the first pictures of shapes_val that hold objects, beside their truth and what the model finds."""
    cfg = get_cfg()
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list([*args.opts, "MODEL.DEVICE", "cpu", "TEST.EVAL_LAYERS", "[]"])
    register_all(cfg=cfg)
    name = cfg.DATASETS.TEST[0]
    class_names = MetadataCatalog.get(name).thing_classes
    model = Trainer.build_model(cfg).eval()
    Checkpointer(model).load(str(run / "model_final.pth"))
    mapper = build_mapper(cfg, is_train=False, with_instances=True)
    rows = []
    for entry in [entry for entry in DatasetCatalog.get(name) if entry["annotations"]][:num_pictures]:
        image = mapper(entry)
        truth = image["instances"]
        found = model([image])[0]["instances"]
        found = found[found.scores >= MIN_SCORE]
        rows.append(
            Row(
                image=image["image"].permute(1, 2, 0).numpy(),
                truth=objects(truth, "gt", [class_names[label] for label in truth.gt_classes.tolist()]),
                found=objects(found, "pred", [f"{class_names[c]} {s:.2f}" for c, s in labels_and_scores(found)]),
            )
        )
    save_grid(rows, path, num_classes=len(class_names))
    return path


def labels_and_scores(found: Instances) -> list[tuple[int, float]]:
    """Class index and score of every detection."""
    return list(zip(found.pred_classes.tolist(), found.scores.tolist(), strict=True))


def objects(instances: Instances, prefix: str, texts: list[str]) -> Objects:
    """True (``gt``) or predicted (``pred``) instances for the picture."""
    fields: dict[str, Any] = instances.get_fields()
    masks = fields[f"{prefix}_masks"]
    return Objects(
        masks=getattr(masks, "tensor", masks).numpy(),
        boxes=fields[f"{prefix}_boxes"].tensor.numpy(),
        classes=fields[f"{prefix}_classes"].tolist(),
        texts=texts,
    )


if __name__ == "__main__":
    run_cli(main)
