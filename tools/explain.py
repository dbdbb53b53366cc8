#!/usr/bin/env python
"""Explain why objects are not found: the stage of the model that lost each, in tables, figures, and examples.

The causes: no token was selected near it; its token was dropped by a later selection; its class is wrong; its box or
mask is off; its score is below the threshold; its detection belongs to another object. docs/explain.md defines them.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from dimaskdino.command_line import add_model_flags, at_least, fraction, import_modules
from dimaskdino.cpu import keep_freed_memory
from dimaskdino.errors import UserError, run_cli


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run folder, saved model, or configuration (then give --weights)")
    add("--weights", type=Path, help="weight file (default: the run's last one)")
    add("--dataset", metavar="NAME", help="registered dataset with boxes or masks (default: the run's test set)")
    add("--output", type=Path, default=Path("output/explain"), help="folder (default: output/explain)")
    add("--score", type=fraction, default=0.35, help="of a detection that counts (default: 0.35)")
    add("--fit", type=fraction, default=0.5, help="IoU of a detection that is right (default: 0.5)")
    add("--near", type=fraction, default=0.3, help="IoU of a token or query that is near an object (default: 0.3)")
    add("--max-images", type=at_least(1), default=500, help="the first ones (default: 500)")
    add("--examples", type=at_least(0), default=4, help="objects of each cause in the report (default: 4)")
    add_model_flags(parser)
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes end here, before the imports that take seconds

import torch
from tabulate import tabulate
from tqdm import tqdm

from dimaskdino import Predictor
from dimaskdino.analysis.explanation import (
    Explained,
    by_stage,
    explain_image,
    outcome_table,
    write_objects,
)
from dimaskdino.analysis.figures import draw_outcomes, png, score_results
from dimaskdino.analysis.missed import Limits
from dimaskdino.analysis.report import BOXES_ALONE, Examples, write_report
from dimaskdino.analysis.stages import compare_stages, read_dataset, true_objects, watched
from dimaskdino.data import build_mapper
from dimaskdino.evaluation.truth import Truth
from dimaskdino.prediction.outputs import check_writable
from dimaskdino.structures import instances_to_coco
from dimaskdino.visualization import to_picture


def main() -> None:
    """Judge every object, print the table by stage, and write the report."""
    args = parse_args()
    import_modules(args.modules)
    check_writable(args.output)
    predictor = Predictor(args.run, args.weights, options=args.opts, device=args.device, score=0.0)
    model, cfg = predictor.model.float(), predictor.cfg
    if not getattr(model.post_processor, "instances", False):
        raise UserError(f"{args.run} is a model without objects (MODEL.MaskDINO.TEST.INSTANCE_ON); nothing is missed.")
    keep_freed_memory(model.device.type)
    name = args.dataset or cfg.DATASETS.TEST[0]
    names, entries, truth = read_dataset(cfg, name, args.max_images)
    limits = Limits(score=args.score, fit=args.fit, near=args.near, max_detections=cfg.TEST.DETECTIONS_PER_IMAGE)
    examples, explained, results = Examples(names=names, limit=args.examples), list[Explained](), list[dict]()
    mapper = build_mapper(cfg, is_train=False)
    for entry, objects in tqdm(
        list(zip(entries, true_objects(truth, entries), strict=True)), unit="image", disable=None
    ):
        with watched(model) as seen, torch.inference_mode():
            found = model([mapper(entry)])[0]["instances"].to("cpu")
            stages = compare_stages(*seen, objects, model)
        results += instances_to_coco(found, truth.image_numbers[entry["image_id"]], range(1, len(names) + 1))
        own = explain_image(stages, objects, limits)
        explained += own
        image = to_picture(predictor.read(entry["file_name"]))
        examples.add(image, objects, stages[-1], own)
    write(args, name, names, explained, examples, limits, truth, results)


def write(
    args: argparse.Namespace,
    name: str,
    names: list[str],
    explained: list[Explained],
    examples: Examples,
    limits: Limits,
    truth: Truth,
    results: list[dict[str, Any]],
) -> None:
    """Print the table by stage, and write the report, its figure, and the tables as files."""
    with_masks = truth.has_masks and all("segmentation" in result for result in results)
    tasks = [*(["box"] if results else []), *(["mask"] if results and with_masks else [])]
    scores = [score_results(truth.coco, results, task, limits.score) for task in tasks]
    stages = by_stage(explained)
    if not with_masks:
        print(f"{BOXES_ALONE}\n")
    print(tabulate(*outcome_table(stages, "stage"), tablefmt="github"))
    counts = {stage: {outcome.value: count for outcome, count in each.items()} for stage, each in stages.items()}
    content = {"limits": vars(limits), "stages": counts, "tide": {each.task: each.tide for each in scores}}
    (args.output / "missed.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    (args.output / "missed.png").write_bytes(png(draw_outcomes(stages)))
    write_objects(explained, names, args.output / "objects.csv")
    report = args.output / "report.html"
    write_report(
        report,
        title=f"What {args.weights or args.run} misses in {name}",
        explained=explained,
        names=names,
        scores=scores,
        examples=examples,
        limits=limits,
        with_masks=with_masks,
    )
    print(f"\n{report}, missed.png, missed.json, objects.csv")


if __name__ == "__main__":
    run_cli(main)
