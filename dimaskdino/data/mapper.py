"""From one entry of a dataset to what the model takes."""

import logging
from typing import Any

import numpy as np
import torch
from detectron2.data import transforms as T

from dimaskdino.data.annotations import annotations_to_instances
from dimaskdino.data.images import read_image
from dimaskdino.errors import DatasetError

logger = logging.getLogger(__name__)


class InstanceMapper:
    """Reads an image, augments it and turns its annotations into targets in the augmented image's frame.

    Args:
        augmentations: applied in order; they must move coordinates linearly.
        image_format: channel order, as in INPUT.FORMAT.
        num_classes: category ids must lie in [0, num_classes).
        with_instances: whether the annotations become "instances"; they are dropped otherwise.
    """

    def __init__(
        self, *, augmentations: list[T.Augmentation], image_format: str, num_classes: int, with_instances: bool
    ) -> None:
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        self.num_classes = num_classes
        self.with_instances = with_instances
        logger.info("Augmentations: %s", augmentations)

    def __call__(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Map one entry of a dataset in detectron2's format; the entry stays as it is.

        Returns:
            The entry without "annotations", with "image" (3, H, W) uint8 as augmented, "height" and "width" of the
            file, and, if wanted, "instances" (see :func:`annotations_to_instances`); an entry without annotations is
            background.

        Raises:
            DatasetError: for an image that cannot be read or has another size than the entry says, and for an
                annotation that cannot be used.
        """
        image = read_image(entry["file_name"], self.image_format)
        source_size = image.shape[:2]
        _check_size(entry, source_size)
        augmented = T.AugInput(image)
        transforms = self.augmentations(augmented)
        mapped = {key: value for key, value in entry.items() if key != "annotations"}
        mapped["height"], mapped["width"] = source_size
        mapped["image"] = torch.from_numpy(np.ascontiguousarray(augmented.image.transpose(2, 0, 1)))
        if self.with_instances:
            mapped["instances"] = annotations_to_instances(
                entry.get("annotations", []),
                transforms=transforms,
                source_size=source_size,
                target_size=augmented.image.shape[:2],
                num_classes=self.num_classes,
                file_name=entry["file_name"],
            )
        return mapped


def _check_size(entry: dict[str, Any], size: tuple[int, int]) -> None:
    expected = (entry.get("height", size[0]), entry.get("width", size[1]))
    if expected != tuple(size):
        raise DatasetError(
            f"Image {entry['file_name']} is {size[0]}x{size[1]} (height x width), but its dataset says "
            f"{expected[0]}x{expected[1]}; correct the size in the annotations or replace the image."
        )
