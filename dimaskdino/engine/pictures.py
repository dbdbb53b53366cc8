"""Pictures of what a model finds in test images, beside their truth."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from torch import nn

from dimaskdino.checkpoint import Checkpointer
from dimaskdino.data import build_mapper, register_all
from dimaskdino.data.datasets.registration import class_names, load_dataset
from dimaskdino.data.validation.segmentation import mapping_truth_of
from dimaskdino.engine.devices import whole_weights
from dimaskdino.engine.hooks import EvaluateWhenTrained
from dimaskdino.engine.nonfinite import unwrapped
from dimaskdino.modeling.meta_arch import build_model
from dimaskdino.prediction.results import Classes, Prediction
from dimaskdino.structures import on_cpu
from dimaskdino.visualization import Objects, draw_objects, save_grid, to_picture

logger = logging.getLogger(__name__)

MIN_SCORE = 0.35
WIDTH_PX = 384
COLUMNS = ("input", "ground truth", "prediction")
# What an entry of a dataset has if it is labeled; an image without objects shows little.
_LABELS = ("annotations", "segments_info", "sem_seg_file_name")


Input = dict[str, Any]


class DrawPredictions(EvaluateWhenTrained):
    """Puts pictures of predictions beside truth among the records, after each evaluation.

    Register it on the main process, after the hook that evaluates and before that of the writers; in every process
    where these hold shards of the weights.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module) -> None:
        super().__init__(cfg.TEST.EVAL_PERIOD, None)
        self._cfg, self._model = cfg, model
        self._inputs: list[Input] | None = None

    def _do_eval(self) -> None:
        with whole_weights(self._model):
            if comm.is_main_process():
                self._draw_alone()

    def _draw_alone(self) -> None:
        name = self._cfg.DATASETS.TEST[0]
        try:
            if self._inputs is None:
                self._inputs = picture_inputs(self._cfg, name, self._cfg.LOG.PICTURES)
            for index, row in enumerate(picture_rows(self._cfg, unwrapped(self._model), name, self._inputs)):
                picture = np.concatenate(row[1:], axis=1)
                self.trainer.storage.put_image(f"{name}/{index}", picture.transpose(2, 0, 1))
        except Exception:  # A model of your own may give results of another form; the run is worth more than pictures.
            logger.warning("No pictures of %s are drawn; LOG.PICTURES 0 does not try.", name, exc_info=True)


def save_pictures(cfg: CfgNode, weights: Path, path: Path, number: int) -> None:
    """Write the pictures of :func:`rows_of_checkpoint` as one; the suffix of ``path`` decides the format."""
    save_grid(rows_of_checkpoint(cfg, weights, number), COLUMNS, path)


def rows_of_checkpoint(cfg: CfgNode, weights: Path, number: int) -> list[list[np.ndarray]]:
    """Draw the first images of the first DATASETS.TEST that hold objects, on the CPU: a row of :data:`COLUMNS` each."""
    cfg = cfg.clone()
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "TEST.EVAL_LAYERS", []])
    register_all(cfg=cfg)
    model, name = build_model(cfg), cfg.DATASETS.TEST[0]
    Checkpointer(model).load(str(weights))
    return list(picture_rows(cfg, model, name, picture_inputs(cfg, name, number)))


def picture_inputs(cfg: CfgNode, dataset_name: str, number: int) -> list[Input]:
    """The first images of a dataset that hold objects, as :func:`picture_rows` draws them."""
    mapper = build_mapper(mapping_truth_of(cfg, dataset_name), is_train=False, with_instances=True)
    entries = [entry for entry in load_dataset(dataset_name) if any(entry.get(key) for key in _LABELS)]
    mapped = [mapper(entry) for entry in entries[:number]]
    # Results are asked for in the frame of the truth, that of the resized image.
    return [given | dict(zip(("height", "width"), given["image"].shape[1:], strict=True)) for given in mapped]


@torch.no_grad()
def picture_rows(
    cfg: CfgNode, model: nn.Module, dataset_name: str, inputs: Sequence[Input], *, min_score: float = MIN_SCORE
) -> Iterator[list[np.ndarray]]:
    """Draw images of :func:`picture_inputs`: a row of :data:`COLUMNS` each, (H, W, 3) uint8 RGB of :data:`WIDTH_PX`."""
    metadata = MetadataCatalog.get(dataset_name)
    names = class_names(dataset_name)
    classes = Classes(names, range(len(names)), metadata.get("stuff_classes", ()))
    was_training = model.training
    model.eval()
    try:
        for given in inputs:
            result = on_cpu(model([given])[0])
            if "instances" in result:
                result["instances"] = result["instances"][result["instances"].scores >= min_score]
            image = given["image"].permute(1, 2, 0).numpy()[..., :: -1 if cfg.INPUT.FORMAT == "BGR" else 1]
            image = np.ascontiguousarray(to_picture(image))
            nothing, truth = Objects(classes=[], names=[]), Objects.from_instances(given["instances"], names)
            found = Prediction(result, image=image, classes=classes).draw(width=WIDTH_PX)
            yield [*(draw_objects(image, each, width=WIDTH_PX) for each in (nothing, truth)), np.asarray(found)]
    finally:
        model.train(was_training)
