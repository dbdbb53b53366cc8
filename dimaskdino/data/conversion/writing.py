"""Predictions, or a COCO file's objects, as label files to correct by hand."""

import base64
import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as mask_util

from dimaskdino.data.coco_file import Json, below, read_coco, read_json
from dimaskdino.data.conversion.labels import check_names
from dimaskdino.data.validation.rules import has_mask, read_mask, why_refused
from dimaskdino.errors import DatasetError


def read_objects(annotations: Path, predictions: Path | None, score: float) -> Iterator[tuple[Json, list[Json]]]:
    """Each image of a COCO file, with its annotations or, from a results file, its predictions of at least a score.

    Raises:
        DatasetError: a file, or an object in it, cannot be used.
    """
    coco = read_coco(str(annotations))
    objects = list(coco.get("annotations", ())) if predictions is None else read_json(predictions)
    if not isinstance(objects, list):
        raise DatasetError(f"{predictions} holds a {type(objects).__name__}, not a list of results in COCO's format.")
    names = {category["id"]: category["name"] for category in coco["categories"]}
    check_names(list(names.values()))
    sizes = {image["id"]: (image["height"], image["width"]) for image in coco["images"]}
    of_image: dict[Any, list[Json]] = {key: [] for key in sizes}
    for index, each in enumerate(objects):
        if wrong := _problem(each, sizes, names):
            raise DatasetError(f"{predictions or annotations}, object {index}, counted from 0: {wrong}.")
        if each.get("score", 1.0) >= score:
            of_image[each["image_id"]].append({**each, "label": names[each["category_id"]]})
    yield from ((image, of_image[image["id"]]) for image in coco["images"])


def _problem(item: Any, sizes: Mapping[Any, tuple[int, int]], names: Mapping[Any, str]) -> str:
    """Why an object cannot be written; "" if it can."""
    if not isinstance(item, dict):
        return f"{item!r:.40} is not a dictionary"
    if not isinstance(key := item.get("image_id"), int | str) or key not in sizes:
        return f"its image_id, {key!r:.40}, is not among the images"
    score = item.get("score", 1.0)
    if not isinstance(score, int | float) or not math.isfinite(score):
        return f"its score, {score!r:.40}, is not a number"
    return why_refused(item, sizes[key], names)


def write_labelme(images: Iterable[tuple[Json, list[Json]]], output: Path) -> None:
    """A JSON file for each image: masks pixel by pixel, else rectangles; with the score as description."""
    written = set[Path]()
    for image, objects in images:
        content = {
            "version": "5.5.0",
            "flags": {},
            "shapes": [_shape(each, (image["height"], image["width"])) for each in objects],
            "imagePath": image["file_name"],
            "imageData": None,
            "imageHeight": image["height"],
            "imageWidth": image["width"],
        }
        _write(output, image["file_name"], ".json", json.dumps(content, ensure_ascii=False, indent=1), written)


def _write(folder: Path, file_name: str, ending: str, text: str, written: set[Path]) -> None:
    path = (folder / below(file_name)).with_suffix(ending)
    if path in written:
        raise DatasetError(f"{path} would hold the labels of two images, one of them {file_name}; rename it.")
    written.add(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _shape(item: Json, size: tuple[int, int]) -> Json:
    description = f"{item['score']:.3f}" if "score" in item else ""
    shape = {"label": item["label"], "group_id": None, "description": description, "flags": {}}
    mask = mask_of(item, size)
    if mask is None or not mask.any():
        left, top, width, height = item["bbox"]
        return {**shape, "points": [[left, top], [left + width, top + height]], "shape_type": "rectangle", "mask": None}
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, bottom, left, right = (int(value) for value in (rows[0], rows[-1], columns[0], columns[-1]))
    picture = io.BytesIO()
    Image.fromarray(mask[top : bottom + 1, left : right + 1]).save(picture, format="PNG")
    encoded = base64.b64encode(picture.getvalue()).decode()
    return {**shape, "points": [[left, top], [right, bottom]], "shape_type": "mask", "mask": encoded}


def write_yolo(images: Iterable[tuple[Json, list[Json]]], output: Path, names: Sequence[str]) -> None:
    """A text file for each image and a data.yaml: polygons where there are masks, else boxes.

    A polygon joins the parts of a mask and the edges of its holes by lines of no width, as YOLO has one for an object.
    """
    (output / "labels").mkdir(parents=True, exist_ok=True)
    lines = [f"  {number}: {json.dumps(name, ensure_ascii=False)}" for number, name in enumerate(names)]
    (output / "data.yaml").write_text("\n".join(["names:", *lines, ""]), encoding="utf-8")
    written = set[Path]()
    for image, objects in images:
        size = image["height"], image["width"]
        rows = [f"{names.index(each['label'])} {' '.join(f'{x:.6f}' for x in _yolo(each, size))}" for each in objects]
        _write(output / "labels", image["file_name"], ".txt", "".join(f"{row}\n" for row in rows), written)


def _yolo(item: Json, size: tuple[int, int]) -> list[float]:
    height, width = size
    mask = mask_of(item, size)
    if mask is not None and mask.any():
        return (outline(mask) / (width, height)).clip(0, 1).ravel().tolist()
    left, top, w, h = item["bbox"]
    return [(left + w / 2) / width, (top + h / 2) / height, w / width, h / height]


def outline(mask: np.ndarray) -> np.ndarray:
    """One polygon (n, 2) along the edges of pixels, through all parts and holes of a mask (H, W)."""
    # Four times as large, so that contours, which run through centers of pixels, come close to their edges.
    scale = 4
    large = np.kron(np.pad(mask, 1), np.ones((scale, scale), dtype=np.uint8))
    contours, _ = cv2.findContours(large, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    parts = [(contour[:, 0] + 0.5) / scale - 1 for contour in contours]
    path = np.concatenate([*(np.concatenate((part, part[:1])) for part in parts)])
    # Back through the first points, so that each line between parts is drawn twice and encloses nothing.
    return np.concatenate((path, *(part[:1] for part in parts[-2::-1]))) if len(parts) > 1 else path


def write_csv(images: Iterable[tuple[Json, list[Json]]], output: Path) -> None:
    """A row for each box, with its score."""
    output.mkdir(parents=True, exist_ok=True)
    with (output / "objects.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "class", "xmin", "ymin", "xmax", "ymax", "score"])
        for image, objects in images:
            for each in objects:
                left, top, width, height = each["bbox"]
                box = [round(value, 3) for value in (left, top, left + width, top + height)]
                writer.writerow([image["file_name"], each["label"], *box, each.get("score", "")])


def mask_of(item: Json, size: tuple[int, int]) -> np.ndarray | None:
    """The mask (H, W) bool of an annotation or a result; None where it has a box alone."""
    mask = read_mask(item["segmentation"], size) if has_mask(item) else None
    return mask_util.decode(mask.rasterized(size)).astype(bool) if mask else None
