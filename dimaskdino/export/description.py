"""What an exported file says of itself: how images are prepared, what the outputs mean, and the class names."""

from typing import Any

import torch

from dimaskdino.export.graph import ExportGraph
from dimaskdino.predictor import Predictor

KEY = "dimaskdino"  # of the description in a file's metadata
VERSION = 1  # raise when the meaning of an entry changes: tools/predict_onnx.py refuses other versions


def describe(
    predictor: Predictor, graph: ExportGraph, *, canvas: tuple[int, int] | None, batch: int | None, form: str
) -> dict[str, Any]:
    """The description of an exported model, which tools/predict_onnx.py reads.

    Args:
        predictor: of the model.
        graph: that is exported.
        canvas: (height, width) in px that a graph of fixed size takes; None for any.
        batch: images that it takes at a time; None for any number.
        form: of deformable attention.
    """
    cfg, model, classes = predictor.cfg, graph.model, predictor.classes
    post = model.post_processor
    options = post.instance_options
    results = {"instances": post.instances, "panoptic": post.panoptic, "semantic": post.semantic}
    return {
        "version": VERSION,
        "architecture": cfg.MODEL.META_ARCHITECTURE,
        "results": [name for name, given in results.items() if given],
        "classes": list(classes.things),
        "category_ids": list(classes.category_ids),
        "segment_classes": list(classes.segments),
        "is_thing": post.is_thing.tolist(),
        "format": cfg.INPUT.FORMAT,
        "exif": predictor.exif,
        "min_size": cfg.INPUT.MIN_SIZE_TEST,
        "max_size": cfg.INPUT.MAX_SIZE_TEST,
        "divisibility": model.size_divisibility,
        "pad_value": model.pixel_mean.flatten().tolist(),
        "canvas": None if canvas is None else list(canvas),
        "batch": batch,
        "ignores_padding": model.ignores_padding,
        "max_detections": options["max_detections"],
        "min_score": options["min_score"],
        "score_by_mask": options["score_by_mask"],
        "temperature": post.temperature,
        "no_object_class": post.no_object_class,
        "crop_first": post.crop_first,
        **post.panoptic_options,
        "deformable_attention": form,
        "torch": torch.__version__,
    }
