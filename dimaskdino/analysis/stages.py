"""What every stage of a model predicts for an image, compared with the objects of the truth."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from pycocotools import mask as mask_util
from torch import nn

from dimaskdino.analysis.missed import StageView
from dimaskdino.config import Config
from dimaskdino.data.datasets import register_all
from dimaskdino.data.datasets.registration import load_dataset
from dimaskdino.data.validation.dataset import find_dataset
from dimaskdino.data.validation.segmentation import truth_of
from dimaskdino.errors import DatasetError
from dimaskdino.evaluation.truth import Truth, truth_of_entries
from dimaskdino.modeling.meta_arch.maskdino import DIMaskDINO
from dimaskdino.modeling.postprocessing import Frame, MaskRendering
from dimaskdino.modeling.postprocessing.instances import scale_boxes
from dimaskdino.prediction.fusion import overlaps
from dimaskdino.structures import DecoderOutput, StagePrediction
from dimaskdino.structures.rle_masks import Rle
from dimaskdino.structures.stages import Stage
from dimaskdino.visualization import Objects

KINDS = ("interm", "selection", "initial", "layer")  # stages of token interaction predict no masks
_RENDERED_IOU = 0.1  # masks are made of queries whose boxes have at least this IoU with an object


@dataclass(frozen=True)
class TrueObjects:
    """The G objects of an image, without crowd regions."""

    classes: Sequence[int]  # (G,) class index of each
    boxes: np.ndarray  # (G, 4) xywh px
    rles: Sequence[Rle] | None  # mask of each; None if not every object has one
    image_id: Any = 0  # of the image


@dataclass(frozen=True)
class SeenStage:
    """A stage of an image."""

    stage: Stage  # which
    view: StageView  # its comparison with the truth
    boxes: np.ndarray  # (Q, 4) xyxy px of the result
    rles: Mapping[int, Rle] = field(default_factory=dict)  # masks by query, of queries near an object


@contextmanager
def watched(model: DIMaskDINO) -> Iterator[list[Any]]:
    """Inside the block, the list holds the decoder's output and the sizes (:class:`Frame`) of the last image."""
    seen: list[Any] = [None, None]

    def keep_output(module: nn.Module, args: tuple, output: DecoderOutput) -> None:
        seen[0] = output

    def keep_frame(module: nn.Module, args: tuple, output: Any) -> None:
        seen[1] = args[2]

    with (
        model.sem_seg_head.register_forward_hook(keep_output),
        model.post_processor.register_forward_hook(keep_frame),
    ):
        yield seen


def compare_stages(output: DecoderOutput, frame: Frame, truth: TrueObjects, model: DIMaskDINO) -> list[SeenStage]:
    """Compare every stage of the only image of a batch with its truth, which is in px of the result."""
    options = model.post_processor.instance_options
    rendering = replace(options["rendering"], format="rle")
    by_mask = options["score_by_mask"]
    return [_compare(each, frame, truth, rendering, by_mask) for each in output.stages if each.stage.kind in KINDS]


def _compare(
    predicted: StagePrediction, frame: Frame, truth: TrueObjects, rendering: MaskRendering, score_by_mask: bool
) -> SeenStage:
    boxes = scale_boxes(predicted.boxes[0].float(), frame).cpu().double().numpy()
    box_iou = overlaps(BoxMode.convert(boxes, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS), truth.boxes)
    quality, mask_iou, rles = np.ones(len(boxes)), None, {}
    if predicted.masks is not None and (score_by_mask or truth.rles is not None):
        near = np.flatnonzero((box_iou >= _RENDERED_IOU).any(1))
        masks, rendered = rendering(predicted.masks, 0, torch.from_numpy(near).to(predicted.boxes.device), frame)
        if score_by_mask:  # of a dataset without masks, too
            quality[near] = rendered.cpu().numpy()
        if truth.rles is not None:
            rles = dict(zip(near.tolist(), masks.rles, strict=True))  # type: ignore[union-attr]
            mask_iou = np.zeros_like(box_iou)
            mask_iou[near] = overlaps(list(rles.values()), list(truth.rles))
    scores = predicted.logits[0].float().sigmoid().cpu().numpy()
    view = StageView(scores=scores, quality=quality, box_iou=box_iou, mask_iou=mask_iou)
    return SeenStage(predicted.stage, view, boxes, rles)


def selections_of(stages: Sequence[SeenStage]) -> list[SeenStage]:
    """The first selection and, where fewer tokens are selected again, the last; none of a model without selections.

    The last selection is the stage of that kind, or the queries before layer 0, which are its tokens.
    """
    first = [each for each in stages if each.stage.kind == "interm"]
    again = [each for each in stages if each.stage.kind == "selection"]
    initial = [each for each in stages if each.stage.kind == "initial"]
    last = again[-1:] or initial
    return [*first, *(each for each in last if first and len(each.boxes) < len(first[0].boxes))]


def read_dataset(cfg: Config, name: str, count: int) -> tuple[list[str], list[dict[str, Any]], Truth]:
    """Class names, the first images, and their truth, whose category ids are class indices plus one.

    Raises DatasetError if the dataset is not there, has no annotated objects, or other classes than the model.
    """
    register_all(cfg=cfg)
    find_dataset(name)
    entries = load_dataset(name)[:count]
    if (labels := truth_of(name)) != "instance":
        raise DatasetError(f"{name} has {labels} labels, of which no objects are read; choose a --dataset of objects.")
    names = list(MetadataCatalog.get(name).get("thing_classes") or [])
    objects = (each for entry in entries for each in entry.get("annotations", ()))
    if not names or all(each.get("iscrowd") for each in objects):
        raise DatasetError(f"{name} has no objects in its first {count} images; choose another --dataset.")
    if len(names) != cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES:
        raise DatasetError(
            f"{name} has {len(names)} classes, but the model predicts {cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES} "
            "(MODEL.SEM_SEG_HEAD.NUM_CLASSES); choose another --dataset."
        )
    entries = [entry if "annotations" in entry else {**entry, "annotations": []} for entry in entries]
    return names, entries, truth_of_entries(entries, name, names, range(1, len(names) + 1))


def true_objects(truth: Truth, entries: list[dict[str, Any]]) -> Iterator[TrueObjects]:
    """The objects of each image, without crowd regions."""
    of_image: dict[int, list[dict[str, Any]]] = {}
    for annotation in truth.annotations or ():
        if not annotation["iscrowd"]:
            of_image.setdefault(annotation["image_id"], []).append(annotation)
    for entry in entries:
        own = of_image.get(truth.image_numbers[entry["image_id"]], [])
        yield TrueObjects(
            classes=[annotation["category_id"] - 1 for annotation in own],
            boxes=np.array([annotation["bbox"] for annotation in own], dtype=np.float64).reshape(-1, 4),
            rles=[truth.coco.ann_to_rle(annotation) for annotation in own] if truth.has_masks else None,
            image_id=entry["image_id"],
        )


def drawn_truth(objects: TrueObjects, names: list[str], size: tuple[int, int]) -> Objects:
    """True objects of an image of ``size`` (height, width), to be drawn."""
    boxes = objects.boxes.copy()
    boxes[:, 2:] += boxes[:, :2]
    masks = None
    if objects.rles is not None:
        masks = np.array([mask_util.decode(rle) for rle in objects.rles], dtype=bool).reshape(-1, *size)
    return Objects(classes=objects.classes, names=[names[label] for label in objects.classes], boxes=boxes, masks=masks)
