"""The results of several runs on the same images, joined to those of one."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.structures import Boxes, BoxMode, Instances
from pycocotools import mask as mask_util

from dimaskdino.data.coco_file import below, read_json
from dimaskdino.errors import DatasetError, UserError
from dimaskdino.prediction.fusion import Fusion
from dimaskdino.structures.rle_masks import RleMasks, checked_rle, instances_to_coco

logger = logging.getLogger(__name__)

Result = dict[str, Any]

_LARGEST_PX = 1e7  # more than any image has, and fewer than float32 has exactly

RESULTS_FILE = "coco_instances_results.json"
# Where a folder may hold its results: a run, an evaluation, or tools/predict.py's.
_PLACES = ("inference/{dataset}/" + RESULTS_FILE, "inference/" + RESULTS_FILE, RESULTS_FILE, "coco_results.json")


def find_results(path: Path, dataset: str | None) -> Path:
    """The results file of a run, or the file itself; raises UserError if the run has none."""
    if not path.is_dir():
        return path
    places = [path / place.format(dataset=below(dataset or "")) for place in _PLACES if dataset or "{" not in place]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        several = sorted(each.parent.name for each in path.glob(f"inference/*/{RESULTS_FILE}"))
        hint = f"name one of {', '.join(several)} with --dataset" if several else "evaluate the run (--eval-only) first"
        raise UserError(f"{path} holds no results (inference/{RESULTS_FILE}); {hint}.")
    return found


def check_images(files: Sequence[Path]) -> None:
    """Raise DatasetError if an id is of several images in the results of tools/predict.py, which list their images."""
    known: dict[Any, tuple[str, Path]] = {}
    for file in files:
        listing = file.with_name("coco_images.json")
        there = file.name == "coco_results.json" and listing.is_file()
        for image in read_json(listing)["images"] if there else ():
            name = Path(image["file_name"]).name
            other, where = known.setdefault(image["id"], (name, listing))
            if name != other:
                raise DatasetError(
                    f"{listing}: image {image['id']} is {name}, but in {where} it is {other}; join predictions of the "
                    "same images (--annotations of tools/predict.py gives them ids)."
                )


def read_results(path: Path) -> list[Result]:
    """Read detections in COCO's results format, each with a box, a mask (RLE), or both; a missing box is the mask's.

    A UserError names what is something else: the file, or an entry of it.
    """
    content = read_json(path)
    if not isinstance(content, list):
        raise UserError(f"{path} holds no list of detections, as COCO's results are; give {RESULTS_FILE} of a run.")
    return [_checked(each, f"{path}: detection number {number}") for number, each in enumerate(content, start=1)]


def _checked(result: Any, name: str) -> Result:
    missing = [key for key in ("image_id", "category_id", "score") if not isinstance(result, dict) or key not in result]
    if missing:
        raise UserError(f"{name} has no {missing[0]}; give detections in COCO's results format.")
    for key in ("image_id", "category_id"):
        if not isinstance(result[key], int | float | str) or isinstance(result[key], bool):
            raise UserError(f"{name} has the {key} {result[key]!r:.40}; ids are numbers or text.")
    if not isinstance(result["score"], int | float) or not 0 <= result["score"] <= 1:
        raise UserError(f"{name} has the score {result['score']!r:.40}; scores are numbers from 0 to 1.")
    mask = result.get("segmentation")
    if mask is not None:
        size: Any = mask.get("size", ()) if isinstance(mask, dict) else ()
        try:
            mask = checked_rle(mask, size)
        except (TypeError, ValueError) as error:
            raise UserError(f"{name} has a mask that cannot be used ({error}); masks are RLE.") from error
    box = result.get("bbox", mask and mask_util.toBbox(mask).tolist())
    numbers = isinstance(box, list) and all(isinstance(side, int | float) and math.isfinite(side) for side in box)
    if not numbers or len(box) != 4:
        raise UserError(f"{name} has neither a box of four numbers (x, y, width, height) nor a mask.")
    if min(box[2:]) < 0 or max(map(abs, box)) > _LARGEST_PX:
        raise UserError(f"{name} has the box {box}; give x, y, width, height in pixels.")
    kept = {key: result[key] for key in ("image_id", "category_id", "score")} | {"bbox": box}
    return kept if mask is None else kept | {"segmentation": mask}


def join_results(sources: Sequence[Sequence[Result]], fusion: Fusion) -> list[Result]:
    """Join the detections of several runs, image by image, in COCO's results format.

    They have masks if all detections have one; else a warning says how many have none.

    Raises:
        DatasetError: the runs have no image in common, or masks of one image have different sizes.
    """
    by_image: dict[Any, list[list[Result]]] = {}
    for number, source in enumerate(sources):
        for result in source:
            by_image.setdefault(result["image_id"], [[] for _ in sources])[number].append(result)
    if by_image and not any(all(parts) for parts in by_image.values()):
        raise DatasetError(
            "The runs have no image in common (image_id): they were evaluated on different images, so there is nothing "
            "to join."
        )
    boxes_alone = [sum("segmentation" not in result for result in source) for source in sources]
    with_masks = not any(boxes_alone)
    if not with_masks and any("segmentation" in result for source in sources for result in source):
        logger.warning("Masks are left out: in the runs, in their order, %s detections have none.", boxes_alone)
    of_runs = [{result["category_id"]: None for result in source} for source in sources]
    if len(of_runs) > 1 and all(of_runs) and not set.intersection(*map(set, of_runs)):
        first = [next(iter(each)) for each in of_runs]
        logger.warning("The runs have no category_id in common (they begin with %s), so no objects are joined.", first)
    categories = list({category: None for each in of_runs for category in each})
    index_of = {category: index for index, category in enumerate(categories)}
    joined: list[Result] = []
    for image, parts in by_image.items():
        sizes = {tuple(each["segmentation"]["size"]) for part in parts for each in part} if with_masks else {(0, 0)}
        if len(sizes) > 1:
            raise DatasetError(
                f"Masks of image {image!r} have different sizes, {sorted(sizes)}; join runs on one dataset."
            )
        size = sizes.pop()
        found = fusion([_instances(part, index_of, size, with_masks=with_masks) for part in parts])
        joined += instances_to_coco(found, image, categories)
    return joined


def _instances(results: Sequence[Result], index_of: dict[Any, int], size: Any, *, with_masks: bool) -> Instances:
    """Detections of one image of ``size`` (height, width), which boxes alone do not need."""
    boxes = torch.tensor([result["bbox"] for result in results], dtype=torch.float32).reshape(-1, 4)
    found = Instances(size, pred_boxes=Boxes(BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)))
    found.scores = torch.tensor([float(result["score"]) for result in results])
    found.pred_classes = torch.tensor([index_of[result["category_id"]] for result in results], dtype=torch.int64)
    if with_masks:
        found.pred_masks = RleMasks([result["segmentation"] for result in results], size)
    return found
