#!/usr/bin/env python
"""Join what several runs found in the same images, and evaluate it.

  tools/ensemble.py output/fold0 output/fold1 --dataset coco_2017_val --output output/ensemble
  tools/ensemble.py a/coco_results.json b/coco_results.json --weights 2 1 --method nms

Each run is a folder with results of an evaluation or of tools/predict.py, or a file in COCO's results format.
"""

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from dimaskdino.command_line import add_model_flags, at_least, fraction, import_modules
from dimaskdino.errors import UserError, run_cli


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or results file")
    add("--output", type=Path, default=Path("output/ensemble"), help="folder (default: output/ensemble)")
    add("--weights", nargs="+", type=float, metavar="W", help="of each run (default: equal ones)")
    methods = ("wbf", "nms", "soft-nms")
    add("--method", choices=methods, default="wbf", help="average boxes and masks (default), or keep the best")
    add("--iou", type=fraction, default=0.55, help="least overlap of detections of one object (default: 0.55)")
    add("--max-detections", type=at_least(1), default=100, metavar="N", help="of an image (default: 100)")
    add("--dataset", metavar="NAME", help="registered dataset on which each run and the ensemble are evaluated")
    add_model_flags(parser, device=False)
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes end here, before the imports that take seconds

from dimaskdino.config import get_cfg
from dimaskdino.data.datasets import register_all
from dimaskdino.data.validation.dataset import find_dataset
from dimaskdino.evaluation import CocoEvaluator, build_evaluator, run_table, write_results
from dimaskdino.prediction.ensemble import RESULTS_FILE, check_images, find_results, join_results, read_results
from dimaskdino.prediction.fusion import Fusion


def main() -> None:
    """Read, join, write, evaluate."""
    args = parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    import_modules(args.modules)
    weights = args.weights or [1.0] * len(args.runs)
    if len(weights) != len(args.runs) or not all(0 < weight < 1e9 for weight in weights):
        raise UserError(f"--weights has {len(weights)} numbers for {len(args.runs)} runs; give each a positive one.")
    files = [find_results(run, args.dataset) for run in args.runs]
    check_images(files)
    evaluator = build(args) if args.dataset else None
    sources = [read_results(file) for file in files]
    scores = {}
    for run, file, source in zip(args.runs, files, sources, strict=True):
        if evaluator:
            scores[str(run)] = evaluate(evaluator, source, file)
    fusion = Fusion(method=args.method, iou=args.iou, weights=weights, max_detections=args.max_detections)
    joined = join_results(sources, fusion)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / RESULTS_FILE).write_text(json.dumps(joined))
    if evaluator:
        scores["ensemble"] = evaluate(evaluator, joined, args.output / RESULTS_FILE)
        write_results(scores, str(args.output / "results.json"))
        print(run_table(scores))
    print(f"{len(joined)} detections: {args.output / RESULTS_FILE}")


def build(args: argparse.Namespace) -> CocoEvaluator:
    """What scores the dataset, which the configuration of the first run's evaluation, or of the run, may describe."""
    cfg = get_cfg()
    written = [args.runs[0] / "inference" / "config.yaml", args.runs[0] / "config.yaml"]
    for described in [path for path in written if path.is_file()][:1]:
        cfg.merge_from_file(str(described))
    cfg.merge_from_list(args.opts)
    cfg.TEST.EVAL_LAYERS, cfg.TEST.EVALUATORS, cfg.TEST.DETECTIONS_PER_IMAGE = [], [], args.max_detections
    register_all(cfg=cfg)
    find_dataset(args.dataset)
    args.output.mkdir(parents=True, exist_ok=True)
    evaluator = build_evaluator(cfg, args.dataset, str(args.output))
    if not isinstance(evaluator, CocoEvaluator):
        raise UserError(f"--dataset {args.dataset} is not scored by AP alone; name a dataset of objects.")
    return evaluator


def evaluate(evaluator: CocoEvaluator, results: list[dict[str, Any]], file: Path) -> dict[str, dict[str, float]]:
    """Scores of the detections in a file."""
    try:
        return evaluator.score_results(results)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


if __name__ == "__main__":
    run_cli(main)
