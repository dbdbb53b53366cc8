"""Pictures of what a model finds in test images, beside their truth."""

from collections.abc import Iterator

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from torch import nn

from dimaskdino.data import build_mapper
from dimaskdino.data.datasets.registration import load_dataset
from dimaskdino.prediction.results import Classes, Prediction, on_cpu
from dimaskdino.visualization import Objects, draw_objects

MIN_SCORE = 0.35
WIDTH_PX = 384
COLUMNS = ("input", "ground truth", "prediction")
# What an entry of a dataset has if it is labeled; an image without objects shows little.
_LABELS = ("annotations", "segments_info", "sem_seg_file_name")


@torch.no_grad()
def picture_rows(
    cfg: CfgNode, model: nn.Module, dataset_name: str, number: int, *, min_score: float = MIN_SCORE
) -> Iterator[list[np.ndarray]]:
    """Draw the first images of a dataset that hold objects; one row of :data:`COLUMNS` an image.

    Args:
        cfg: of the model; reads INPUT and MODEL.SEM_SEG_HEAD.
        model: not wrapped; in evaluation while its pictures are drawn.
        dataset_name: registered, with labels.
        number: of images.
        min_score: detections with a lower score are not drawn.

    Yields:
        Pictures (H, W, 3) uint8 RGB of :data:`WIDTH_PX`.
    """
    metadata = MetadataCatalog.get(dataset_name)
    names = metadata.get("thing_classes") or metadata.get("stuff_classes")
    classes = Classes(names, range(len(names)), metadata.get("stuff_classes", ()))
    mapper = build_mapper(cfg, is_train=False, with_instances=True)
    entries = [entry for entry in load_dataset(dataset_name) if any(entry.get(key) for key in _LABELS)][:number]
    was_training = model.training
    model.eval()
    try:
        for given in map(mapper, entries):
            height, width = given["image"].shape[1:]
            # Results in the frame of the truth, that of the resized image.
            result = on_cpu(model([{**given, "height": height, "width": width}])[0])
            if "instances" in result:
                result["instances"] = result["instances"][result["instances"].scores >= min_score]
            image = given["image"].permute(1, 2, 0).numpy()[..., :: -1 if cfg.INPUT.FORMAT == "BGR" else 1]
            image = np.ascontiguousarray(image)
            nothing, truth = Objects(classes=[], names=[]), Objects.from_instances(given["instances"], names)
            found = Prediction(result, image=image, classes=classes).draw(width=WIDTH_PX)
            yield [*(draw_objects(image, each, width=WIDTH_PX) for each in (nothing, truth)), np.asarray(found)]
    finally:
        model.train(was_training)
