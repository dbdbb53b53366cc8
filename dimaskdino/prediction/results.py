"""What was found in one image, and the forms that people want it in."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from detectron2.structures import Instances
from PIL import Image
from pycocotools import mask as mask_util

from dimaskdino.data.label_maps import labels_present
from dimaskdino.errors import UserError, require
from dimaskdino.prediction.canvases import LARGEST_COPY_PX, Canvas
from dimaskdino.structures import RleMasks, instances_to_coco
from dimaskdino.structures.rle_masks import crop_of
from dimaskdino.visualization import Objects, draw_objects


@dataclass(frozen=True)
class Classes:
    """The classes of a model.

    Attributes:
        things: names of the classes of objects, by class index.
        category_ids: their ids in the dataset, by class index.
        stuff: names of all classes of semantic and panoptic maps; () for a model of objects.
    """

    things: Sequence[str]
    category_ids: Sequence[int]
    stuff: Sequence[str] = ()

    @property
    def segments(self) -> Sequence[str]:
        """Names of the classes of segments."""
        return self.stuff or self.things


class Prediction(dict):
    """detectron2's result of one image ("instances", "panoptic_seg", "sem_seg"), on the CPU, and what to do with it.

    Args:
        result: what the model gave.
        image: (H, W, 3) uint8 RGB, which is drawn on.
        classes: of the model.
        source: where the image is from; "" where nobody said.
        canvas: the picture that ``image`` is a reduced copy of; None if it is the picture itself.
    """

    def __init__(
        self,
        result: dict[str, Any],
        *,
        image: np.ndarray,
        classes: Classes,
        source: str = "",
        canvas: Canvas | None = None,
    ) -> None:
        super().__init__(result)
        self.image, self.classes, self.source = image, classes, source
        self.size: tuple[int, int] = image.shape[:2] if canvas is None else canvas.size
        self.to_map = None if canvas is None else canvas.to_map
        self._canvas = canvas

    def with_result(self, result: dict[str, Any]) -> "Prediction":
        """Another result of the same image, such as some of its objects or one of its tasks."""
        return Prediction(result, image=self.image, classes=self.classes, source=self.source, canvas=self._canvas)

    def at(self, stage: str) -> "Prediction":
        """What the model found after an earlier stage, such as "layer.0".

        Raises:
            UserError: the predictor was not asked for it (``layers``).
        """
        layers = self.get("layers", {})
        if stage not in layers:
            known = ", ".join(layers) or "none"
            raise UserError(f"There are no results of stage {stage}, but of {known}; name it in Predictor's layers.")
        return self.with_result(layers[stage])

    @property
    def instances(self) -> Instances:
        """detectron2's Instances: pred_boxes (xyxy px), scores, pred_classes, pred_masks if the model has masks.

        Raises:
            UserError: the model reports no objects.
        """
        if "instances" not in self:
            raise UserError(f"This model reports {', '.join(self)}, and no objects.")
        return self["instances"]

    @property
    def class_names(self) -> list[str]:
        """The class name of each detection."""
        return [self.classes.things[index] for index in self.instances.pred_classes.tolist()]

    def draw(self, *, width: int | None = None, by_instance: bool = False, labels: Sequence[str] = ()) -> Image.Image:
        """Draw the result: segments of a panoptic map if there is one, else objects, else a semantic map.

        Args:
            width: of the picture in px; None enlarges small images, so that labels can be read, and reduces huge ones.
            by_instance: a color of its own for each object instead of each class.
            labels: put before each object's class name, such as the number of its track.
        """
        return Image.fromarray(self.drawn(width=width, by_instance=by_instance, labels=labels))

    def drawn(self, *, width: int | None = None, by_instance: bool = False, labels: Sequence[str] = ()) -> np.ndarray:
        """:meth:`draw` as an array (H, W, 3) uint8 RGB."""
        size = _drawn_size(self.size, width)
        if "panoptic_seg" in self:
            objects = self._panoptic_objects()
        elif "instances" in self:
            objects = self._detected_objects(size, labels)
        else:
            objects = self._semantic_objects()
        same = size is None or size == self.image.shape[1::-1]
        reduced = self.image if same else cv2.resize(self.image, size, interpolation=cv2.INTER_AREA)
        return draw_objects(reduced, objects, width=width, by_instance=by_instance)

    def _detected_objects(self, size: tuple[int, int] | None, labels: Sequence[str]) -> Objects:
        """The objects in the frame of the image as drawn: reduced to ``size`` (width, height), or as it is."""
        found, names = self.instances, self.class_names
        names = [f"{label} {name}" for label, name in zip(labels, names, strict=True)] if labels else names
        boxes = found.pred_boxes.tensor.numpy()
        masks: Any = None
        if found.has("pred_masks"):
            masks = found.pred_masks
            if size is None and not isinstance(masks, RleMasks):
                masks = masks.numpy()
            else:
                masks = _DrawnMasks(RleMasks.of(masks), size or self.size[::-1])
        return Objects(
            classes=found.pred_classes.tolist(),
            names=names,
            scores=found.scores.tolist(),
            boxes=boxes if size is None else boxes * (size[0] / self.size[1]),
            masks=masks,
        )

    def _panoptic_objects(self) -> Objects:
        ids, segments = self["panoptic_seg"]
        classes = {segment["id"]: segment["category_id"] for segment in segments}
        return Objects.from_segments(ids.numpy(), classes, self.classes.segments)

    def _semantic_objects(self) -> Objects:
        ids = self["sem_seg"].argmax(0).numpy()
        return Objects.from_segments(ids, {label: label for label in labels_present(ids)}, self.classes.segments)

    def to_coco(self, image_id: Any = 0) -> list[dict[str, Any]]:
        """Detections in COCO's results format, with the category ids of the dataset that the model was trained on."""
        return instances_to_coco(self.instances, image_id, self.classes.category_ids)

    def to_supervision(self) -> Any:
        """Detections of the package supervision, which must be installed; class names are in ``data["class_name"]``."""
        supervision = require("supervision", "to_supervision()", "supervision")
        found = supervision.Detections.from_detectron2({"instances": self.instances})
        found.data["class_name"] = np.array(self.class_names)
        return found

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON holds it: file, height, width, and objects with their class, score, box and mask (RLE).

        Boxes are xyxy px. "segments" are there for a panoptic model.
        """
        height, width = self.size
        content: dict[str, Any] = {"file": self.source, "height": height, "width": width}
        if "instances" in self:
            content["objects"] = [
                {"class": name, "class_index": label, "score": result["score"], "box": box}
                | ({"mask": result["segmentation"]} if "segmentation" in result else {})
                for name, label, box, result in zip(
                    self.class_names,
                    self.instances.pred_classes.tolist(),
                    self.instances.pred_boxes.tensor.tolist(),
                    self.to_coco(),
                    strict=True,
                )
            ]
        if "panoptic_seg" in self:
            names = self.classes.segments
            content["segments"] = [
                {"class": names[segment["category_id"]], **segment} for segment in self["panoptic_seg"][1]
            ]
        return content

    def to_json(self) -> str:
        """:meth:`to_dict` as text."""
        return json.dumps(self.to_dict())


def _drawn_size(size: tuple[int, ...], width: int | None) -> tuple[int, int] | None:
    """(width, height) that an image is reduced to before it is drawn on; None for one that is small enough."""
    height, full_width = size
    longest = LARGEST_COPY_PX if width is None else max(1, round(width * max(1.0, height / full_width)))
    scale = longest / max(height, full_width)
    return None if scale >= 1 else (max(1, round(full_width * scale)), max(1, round(height * scale)))


class _DrawnMasks(Sequence[np.ndarray]):
    """Masks at their own size (width, height) or that of a smaller picture, each made when it is asked for."""

    def __init__(self, masks: RleMasks, size: tuple[int, int]) -> None:
        self._masks, self._size = masks, size

    def __len__(self) -> int:
        return len(self._masks)

    def __getitem__(self, index: Any) -> Any:
        """A mask (H, W) bool; a thin object keeps a pixel."""
        if self._size == self._masks.size[::-1]:
            return mask_util.decode(self._masks.rles[index]).view(bool)
        crop, top, left = crop_of(self._masks.rles[index])
        scale = self._size[0] / self._masks.size[1]
        x, y = int(left * scale), int(top * scale)
        mask = np.zeros(self._size[::-1], dtype=bool)
        room = mask[y : y + max(1, round(crop.shape[0] * scale)), x : x + max(1, round(crop.shape[1] * scale))]
        if crop.size and room.size:
            area = cv2.resize(crop.astype(np.float32), room.shape[::-1], interpolation=cv2.INTER_AREA)
            room[:] = area >= min(0.5, float(area.max()))
        return mask
