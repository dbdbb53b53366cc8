"""Whether an exported file finds what the model finds, and its AP and time."""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances

from dimaskdino.config import Config
from dimaskdino.errors import DatasetError
from dimaskdino.evaluation.build import build_evaluator
from dimaskdino.export.graph import predict
from dimaskdino.modeling.meta_arch import DIMaskDINO
from dimaskdino.modeling.postprocessing import Frame

Result = dict[str, Any]
BOX_PX, SCORE, MASK_IOU = 0.1, 1e-3, 0.99
WARM_UP = 3  # images that are not timed
Graph = Callable[[dict[str, np.ndarray]], Any]
Predict = Callable[[str, Graph], Result]


def reference_results(
    model: DIMaskDINO, inputs: dict[str, np.ndarray], inner: Sequence[tuple[int, int]], sizes: Sequence[tuple[int, int]]
) -> list[Result]:
    """The model's own results, in the form of tools/predict_onnx.py; all sizes are (height, width) in px."""
    tensors = [torch.from_numpy(value).to(model.device) for value in inputs.values()]
    with torch.no_grad():
        prediction = predict(model, tensors[0], tensors[1] if len(tensors) > 1 else None)
        found = []
        for index, (image, size) in enumerate(zip(inner, sizes, strict=True)):
            canvas = image if model.ignores_padding else inputs["images"].shape[-2:]
            found.append(to_arrays(model.post_processor(prediction, index, Frame(canvas, image, size))))
        return found


def to_arrays(result: Result) -> Result:
    """detectron2's results of one image as arrays by name."""
    arrays: Result = {}
    if "instances" in result:
        instances = result["instances"]
        arrays |= {"scores": instances.scores, "labels": instances.pred_classes, "boxes": instances.pred_boxes.tensor}
        if instances.has("pred_masks"):
            masks = instances.pred_masks
            arrays["masks"] = masks if isinstance(masks, torch.Tensor) else torch.from_numpy(masks.numpy())
    if "panoptic_seg" in result:
        arrays["panoptic"], arrays["segments"] = result["panoptic_seg"]
    if "sem_seg" in result:
        arrays["semantic"] = result["sem_seg"]
    return {name: value.cpu().numpy() if hasattr(value, "cpu") else value for name, value in arrays.items()}


def differences(found: Result, expected: Result) -> list[str]:
    """What is beyond the bars between two results of one image; empty where they agree."""
    messages = []
    if "scores" in expected:
        messages += _compare_instances(found, expected)
    if "panoptic" in expected:
        messages += _compare_segments(found, expected)
    if "semantic" in expected:
        largest = float(np.abs(found["semantic"] - expected["semantic"]).max())
        same = float((found["semantic"].argmax(0) == expected["semantic"].argmax(0)).mean())
        if not (largest <= SCORE and same >= MASK_IOU):
            messages.append(f"semantic scores differ by {largest:.2g}, {1 - same:.2%} of the pixels by class")
    return messages


def _compare_instances(found: Result, expected: Result) -> list[str]:
    messages = [] if len(found["scores"]) == len(expected["scores"]) else ["another number of detections"]
    last = expected["scores"].min(initial=1.0)
    free = list(range(len(found["scores"])))
    for index, (score, label, box) in enumerate(
        zip(expected["scores"], expected["labels"], expected["boxes"], strict=True)
    ):
        near = [other for other in free if found["labels"][other] == label]
        distance = [
            max(np.abs(found["boxes"][other] - box).max() / BOX_PX, abs(found["scores"][other] - score) / SCORE)
            for other in near
        ]
        if not near or not min(distance) <= 1:
            if score - last > SCORE:  # rounding may exchange detections at the end of the list
                far = f"off by {min(distance):.3g} times what is allowed" if distance else "missing"
                messages.append(f"a detection of class {label} at score {score:.4f} is {far}")
            continue
        other = near[int(np.argmin(distance))]
        free.remove(other)
        iou = _iou(found["masks"][other], expected["masks"][index]) if "masks" in expected else 1.0
        if iou < MASK_IOU:
            messages.append(f"the mask at score {score:.4f} has IoU {iou:.4f}")
    return messages


def _compare_segments(found: Result, expected: Result) -> list[str]:
    messages = []
    for segment in expected["segments"]:
        mask = expected["panoptic"] == segment["id"]
        candidates = [each for each in found["segments"] if each["category_id"] == segment["category_id"]]
        best = max((_iou(found["panoptic"] == each["id"], mask) for each in candidates), default=0.0)
        if best < MASK_IOU:
            messages.append(f"segment {segment['id']} of class {segment['category_id']} has IoU {best:.4f}")
    if len(found["segments"]) != len(expected["segments"]):
        messages.append(f"{len(found['segments'])} segments instead of {len(expected['segments'])}")
    return messages


def _iou(one: np.ndarray, other: np.ndarray) -> float:
    """1 where both are empty."""
    return float((one & other).sum() / (one | other).sum()) if (one | other).any() else 1.0


def dataset_entries(cfg: Config) -> list[dict[str, Any]]:
    """The images of the first of DATASETS.TEST; raises DatasetError if this machine has no such dataset."""
    name = next(iter(cfg.DATASETS.TEST), "")
    if name not in DatasetCatalog.list():
        raise DatasetError(
            f"DATASETS.TEST names {name or 'no dataset'}, which is not registered; register it (--import)."
        )
    return DatasetCatalog.get(name)


def evaluate(
    cfg: Config, predict: Predict, graph: Graph, folder: Path, entries: Sequence[dict[str, Any]]
) -> tuple[dict[str, float], float]:
    """Score a graph on a dataset: the main figure of each task in percent, and the median seconds of a run."""
    evaluator = build_evaluator(cfg, cfg.DATASETS.TEST[0], str(folder))
    evaluator.reset()
    seconds: list[float] = []

    def timed(inputs: dict[str, np.ndarray]) -> Any:
        started = time.perf_counter()
        outputs = graph(inputs)
        seconds.append(time.perf_counter() - started)
        return outputs

    for entry in entries:
        result = predict(entry["file_name"], timed)
        height, width = result["size"]
        evaluator.process([{"height": height, "width": width, **entry}], [to_detectron2(result)])
    scores = evaluator.evaluate()
    main = {"bbox": "AP", "segm": "AP", "panoptic_seg": "PQ", "sem_seg": "mIoU"}
    return {
        f"{task} {main[task]}": values[main[task]] for task, values in scores.items() if task in main
    }, statistics.median(seconds[WARM_UP:] or seconds)


def to_detectron2(result: Result) -> dict[str, Any]:
    """A result of arrays in detectron2's form."""
    output: dict[str, Any] = {}
    if "scores" in result:
        boxes, scores, labels = (torch.from_numpy(result[name]) for name in ("boxes", "scores", "labels"))
        instances = Instances(tuple(result["size"]), pred_boxes=Boxes(boxes), scores=scores, pred_classes=labels)
        if "masks" in result:
            instances.pred_masks = torch.from_numpy(result["masks"])
        output["instances"] = instances
    if "panoptic" in result:
        output["panoptic_seg"] = torch.from_numpy(result["panoptic"]), result["segments"]
    if "semantic" in result:
        output["sem_seg"] = torch.from_numpy(result["semantic"])
    return output
