"""Evaluation on BDD100K gives the official toolkit's numbers, recorded on a constructed set.

The toolkit (bdd100k.eval.run) evaluates RLE, where crowd and ignored regions are what COCO calls crowd, or bitmasks,
where crowd regions count as objects and ignored ones are matched by IoU. Without such regions the two agree; with them
ours follows the former, which is what the dataset's documentation describes.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from pycocotools import mask as mask_util

from dimaskdino.data import register_all
from dimaskdino.data.datasets.bdd100k import CLASSES
from dimaskdino.data.datasets.bdd100k_convert import convert_split
from dimaskdino.evaluation import CocoEvaluator
from tests.data_pipeline.bdd100k import bitmask_of, is_region, record, write_bitmask, write_frames, write_images
from tests.data_pipeline.conftest import registrations  # noqa: F401  (a fixture)

pytestmark = pytest.mark.usefixtures("registrations")

NAME = "bdd100k_ins_seg_val"
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def predictions_of(frame: dict[str, Any], size: tuple[int, int]) -> Instances:
    """A frame of the recorded predictions as a model returns it."""
    labels = frame["labels"]
    found = Instances(size)
    masks = [mask_util.decode(label["rle"]).astype(bool) for label in labels]
    found.pred_masks = torch.from_numpy(np.array(masks).reshape(-1, *size))
    found.pred_boxes = Boxes(torch.zeros(len(labels), 4))
    found.pred_classes = torch.tensor([CLASSES.index(label["category"]) for label in labels], dtype=torch.int64)
    # COCO's evaluation only compares scores; float64 keeps the recorded ones.
    found.scores = torch.tensor([label["score"] for label in labels], dtype=torch.float64)
    return found


def evaluate(root: Path, frames: list[dict[str, Any]], source: str) -> dict[str, float]:
    """Mask scores of the recorded predictions against ``frames``, by the way that a user's data takes."""
    size = tuple(record()["size"])
    folder = write_images(root, "val", [frame["name"] for frame in frames], size)
    if source == "rles":
        write_frames(folder, "val", "rles", frames)
    else:
        for frame in frames:
            write_bitmask(folder, "val", frame["name"], bitmask_of(frame, size))
    coco, problems = convert_split(folder, "val", source)
    assert problems == []
    register_all(root)
    evaluator = CocoEvaluator(dataset_name=NAME, output_dir=str(root / "out"))
    predictions = {frame["name"]: frame for frame in record()["predictions"]}
    for image in coco["images"]:
        instances = predictions_of(predictions[image["file_name"]], size)
        evaluator.process([{"image_id": image["id"]}], [{"instances": instances}])
    return evaluator.evaluate()["segm"]


def expected(kind: str, evaluation: str) -> dict[str, float]:
    """The toolkit's scores by our names."""
    scores = record()["scores"][kind][evaluation]
    by_class = {f"AP-{name}": scores["AP"][name] for name in CLASSES}
    named = {**{metric: scores[metric]["OVERALL"] for metric in METRICS}, **by_class}
    return {name: np.nan if value is None else value for name, value in named.items()}


def without_regions() -> list[dict[str, Any]]:
    return [
        {**frame, "labels": [label for label in frame["labels"] if not is_region(label)]}
        for frame in record()["frames"]
    ]


@pytest.mark.parametrize("source", ["rles", "bitmasks"])
def test_scores_with_crowd_and_ignored_regions_are_the_toolkits(tmp_path: Path, source: str) -> None:
    scores = evaluate(tmp_path, record()["frames"], source)
    assert scores == pytest.approx(expected("all", "rle"), abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("evaluation", ["rle", "bitmask"])
def test_scores_without_regions_match_both_evaluations(tmp_path: Path, evaluation: str) -> None:
    scores = evaluate(tmp_path, without_regions(), "rles")
    assert scores == pytest.approx(expected("objects", evaluation), abs=1e-9, nan_ok=True)


def test_constructed_set_is_sensitive_to_regions(tmp_path: Path) -> None:
    right = expected("all", "rle")["AP"]
    as_objects = [
        {**frame, "labels": [{**label, "attributes": {}} for label in frame["labels"]]} for frame in record()["frames"]
    ]
    assert abs(evaluate(tmp_path / "objects", as_objects, "rles")["AP"] - right) > 0.5
    assert abs(evaluate(tmp_path / "nothing", without_regions(), "rles")["AP"] - right) > 0.5
