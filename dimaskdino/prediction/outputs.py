"""The files that are written for each image: a picture, masks, query features."""

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

from dimaskdino.prediction.inputs import Source
from dimaskdino.prediction.results import Prediction
from dimaskdino.structures import RleMasks
from dimaskdino.structures.rle_masks import crop_of

JPEG_QUALITY = 90


class Outputs:
    """Writes the files of one image at a time; several threads may do so at once.

    Args:
        folder: of the results.
        kinds: of "pictures" (JPEG), "masks" (PNG), "features" (safetensors) and "geojson"; each has a subfolder.
        by_instance: a color for each object in pictures.
    """

    def __init__(self, folder: Path, kinds: Collection[str], *, by_instance: bool = False) -> None:
        self.folder, self._kinds, self._by_instance = folder, kinds, by_instance

    def path(self, kind: str, name: str, suffix: str) -> Path:
        """Where an output goes; its folder is made."""
        path = self.folder / kind / f"{name}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write(self, source: Source, found: Prediction, image_id: Any) -> dict[str, Any]:
        """Write the files of an image and return its record."""
        if "pictures" in self._kinds:
            picture = cv2.cvtColor(found.drawn(by_instance=self._by_instance), cv2.COLOR_RGB2BGR)
            content = cv2.imencode(".jpg", picture, (cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY))[1]
            self.path("pictures", source.name, ".jpg").write_bytes(content.tobytes())
        if "masks" in self._kinds:
            mask_map(found).save(self.path("masks", source.name, ".png"))
        if "features" in self._kinds:
            self.path("features", source.name, ".safetensors").write_bytes(save(query_features(found)))
        if "geojson" in self._kinds:
            path = self.path("geojson", source.name, ".geojson")
            path.write_text(json.dumps(geojson(found)), encoding="utf-8")
        height, width = found.size
        record = {"number": source.number, "id": image_id, "file": source.path, "height": height, "width": width}
        return record | results_of(found, image_id)


def results_of(found: Prediction, image_id: Any) -> dict[str, Any]:
    """The COCO results of an image or frame, none for a model without objects, and the segments of a panoptic one."""
    segments = {"segments": found.to_dict()["segments"]} if "panoptic_seg" in found else {}
    return segments | {"results": found.to_coco(image_id) if "instances" in found else []}


def mask_map(found: Prediction) -> Image.Image:
    """The masks of an image as one 16-bit PNG: 0 is background, n the n-th best object, which covers worse ones.

    For a panoptic model the segments' ids; for a semantic model the class index plus one.
    """
    if "panoptic_seg" in found:
        ids = found["panoptic_seg"][0].numpy()
    elif "instances" in found:
        ids = np.zeros(found.size, dtype=np.uint16)
        rles = RleMasks.of(found.instances.pred_masks).rles if found.instances.has("pred_masks") else []
        for number, rle in reversed(list(enumerate(rles, start=1))):
            crop, top, left = crop_of(rle)
            ids[top : top + crop.shape[0], left : left + crop.shape[1]][crop] = number
    else:
        ids = found["sem_seg"].argmax(0).numpy() + 1
    return Image.fromarray(ids.astype(np.uint16, copy=False))


def query_features(found: Prediction) -> dict[str, torch.Tensor]:
    """The query behind each detection (index, features, class score), and the mean feature of the image."""
    instances = found.instances
    return {
        "query_indices": instances.query_indices.contiguous(),
        "query_features": instances.query_features.contiguous(),
        "class_scores": instances.class_scores.contiguous(),
        "classes": instances.pred_classes.contiguous(),
        "image_feature": found["image_feature"].contiguous(),
    }


def geojson(found: Prediction) -> dict[str, Any]:
    """The objects of a picture whose ``to_map`` is known, as polygons in longitude and latitude; needs rasterio."""
    from rasterio.features import shapes
    from rasterio.warp import transform_geom

    assert found.to_map is not None
    transform, crs = found.to_map["transform"], found.to_map["crs"]
    features = []
    for name, score, rle in zip(
        found.class_names, found.instances.scores.tolist(), RleMasks.of(found.instances.pred_masks).rles, strict=True
    ):
        crop, top, left = crop_of(rle)
        place = transform @ type(transform).translation(left, top)
        parts = [part for part, _ in shapes(crop.astype(np.uint8), mask=crop, connectivity=8, transform=place)]
        outline = {"type": "MultiPolygon", "coordinates": [part["coordinates"] for part in parts]}
        geometry = transform_geom(crs, "OGC:CRS84", outline)
        features.append({"type": "Feature", "properties": {"class": name, "score": score}, "geometry": geometry})
    return {"type": "FeatureCollection", "features": features}


def check_writable(folder: Path) -> None:
    """Make a folder and try to write in it, before anything is computed.

    Raises:
        OSError: naming the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".writable.{os.getpid()}"
    probe.touch()
    probe.unlink(missing_ok=True)  # processes of other machines may have this number, too
