"""What is exported: a model's own parts, from images to a fixed number of results, and what the file says of itself."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dimaskdino.config import Config
from dimaskdino.errors import ConfigError, UserError
from dimaskdino.layers.boxes import cxcywh_to_xyxy
from dimaskdino.layers.exporting import tensor_of_sizes
from dimaskdino.layers.ms_deform_attn import SpatialShapes
from dimaskdino.layers.padding import PaddedBatch, ValidCells
from dimaskdino.modeling.meta_arch import DIMaskDINO
from dimaskdino.predictor import Predictor
from dimaskdino.structures import StagePrediction, take

KEY = "dimaskdino"  # of the description in a file's metadata
VERSION = 1  # raise when the meaning of an entry changes: tools/predict_onnx.py refuses other versions


@dataclass(frozen=True)
class TracedBatch(PaddedBatch):
    """Images on a common canvas, whose sizes are inputs of the graph: ``image_sizes`` is (B, 2) int64."""

    def valid_cells(self, spatial_shapes: SpatialShapes, device: torch.device) -> ValidCells:
        """The cells of levels of these sizes that lie on the images."""
        assert isinstance(self.image_sizes, Tensor)
        levels = tensor_of_sizes([(width, height) for height, width in spatial_shapes], torch.int64, device)
        canvas = tensor_of_sizes([self.canvas[::-1]], torch.int64, device)
        counts = (self.image_sizes.flip(1)[:, None] * levels + canvas - 1).div(canvas, rounding_mode="floor")
        return ValidCells(counts.float(), counts.float() / levels, spatial_shapes)


class ExportGraph(nn.Module):
    """Images to results of a fixed count.

    Args:
        model: in evaluation.

    A model of objects alone gives its best pairs of query and class: ``scores`` (B, k), ``labels`` (B, k) int64,
    ``boxes`` (B, k, 4) and, with masks, ``masks`` (B, k, h, w). Any other gives all queries: ``scores`` (B, Q, K) of
    the classes, ``boxes`` (B, Q, 4) and ``masks`` (B, Q, h, w). Boxes are xyxy in parts of the canvas, or of the image
    in a model that ignores padding; masks are logits on the canvas.
    """

    def __init__(self, model: DIMaskDINO) -> None:
        super().__init__()
        self.model = model
        post = model.post_processor
        self.best_pairs = not (post.panoptic or post.semantic)

    @property
    def input_names(self) -> list[str]:
        """``images``, and ``image_sizes`` for a model that ignores padding."""
        return ["images", *(["image_sizes"] if self.model.ignores_padding else [])]

    @property
    def output_names(self) -> list[str]:
        """As the class says."""
        masks = ["masks"] if self.model.predicts_masks else []
        return ["scores", *(["labels"] if self.best_pairs else []), "boxes", *masks]

    def forward(self, images: Tensor, image_sizes: Tensor | None = None) -> tuple[Tensor, ...]:
        """Compute the outputs.

        Args:
            images: (B, 3, H, W) float32, 0 to 255 in the channel order of INPUT.FORMAT; around each image PIXEL_MEAN.
            image_sizes: (B, 2) int64 (height, width) of the images on the canvas, for a model that ignores padding.
        """
        return self.outputs(predict(self.model, images, image_sizes))

    def outputs(self, prediction: StagePrediction) -> tuple[Tensor, ...]:
        """The outputs of a prediction."""
        logits, boxes = prediction.logits.float(), cxcywh_to_xyxy(prediction.boxes.float())
        post, masks = self.model.post_processor, prediction.masks
        if not self.best_pairs:
            scores = logits.softmax(-1)[..., :-1] if post.no_object_class else logits.sigmoid()
            return (scores, boxes, *([] if masks is None else [masks.dense()]))
        num_queries, num_classes = logits.shape[1:]
        count = min(post.instance_options["max_detections"], num_queries * num_classes)
        scores, index = logits.sigmoid().flatten(1).topk(count, dim=1)
        query, labels = index.div(num_classes, rounding_mode="floor"), index % num_classes
        if masks is None:
            return scores, labels, take(boxes, query)
        logits_of_masks = torch.einsum("bqc,bchw->bqhw", take(masks.embed, query), masks.features)
        return scores, labels, take(boxes, query), logits_of_masks


def predict(model: DIMaskDINO, images: Tensor, image_sizes: Tensor | None = None) -> StagePrediction:
    """The last stage's prediction; arguments as of :meth:`ExportGraph.forward`."""
    features = model.backbone((images - model.pixel_mean) / model.pixel_std)
    padding: dict[str, Any] = {}
    if model.ignores_padding:
        padding["batch"] = TracedBatch(image_sizes, images.shape[-2:])  # type: ignore[arg-type]
    return model.sem_seg_head(features, **padding).stages[-1]


def check_exportable(model: nn.Module, cfg: Config) -> None:
    """Raise UserError with the reason if no graph can do what the model does."""
    if not isinstance(model, DIMaskDINO):
        raise UserError(
            f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE} cannot be exported: only DIMaskDINO, MaskDINO, "
            "DINO and models derived from them can."
        )
    if getattr(model.sem_seg_head.predictor, "random_position", False):
        raise ConfigError(
            "MODEL.MaskDINO.DI.RANDOM_POSITION cannot be exported: the boxes of the queries are drawn at random, so no "
            "two runs agree; export a model without it."
        )
    if cfg.MODEL.EXTRA_HEADS:
        raise ConfigError(
            f"MODEL.EXTRA_HEADS {cfg.MODEL.EXTRA_HEADS} cannot be exported: the runner does not know what their "
            "outputs mean; set it to []."
        )
    if cfg.TEST.AUG.ENABLED:
        raise ConfigError("TEST.AUG.ENABLED cannot be exported: a graph sees one view of an image; set it to False.")
    if cfg.INPUT.READER:
        raise ConfigError(f"INPUT.READER {cfg.INPUT.READER} cannot be exported: the runner reads RGB images alone.")
    if cfg.INPUT.FORMAT not in ("RGB", "BGR"):
        raise ConfigError(f"INPUT.FORMAT {cfg.INPUT.FORMAT} cannot be exported: images must be RGB or BGR.")


def has_enough_tokens(model: DIMaskDINO, height: int, width: int) -> bool:
    """Whether an image of this size in px has as many tokens as the model selects, so that their number is fixed."""
    least = least_tokens(model)
    return not least or sum(rows * columns for rows, columns in level_sizes(model, height, width)) >= least


def least_tokens(model: DIMaskDINO) -> int:
    """How many tokens the model selects; 0 for one without selection."""
    predictor: Any = model.sem_seg_head.predictor
    return 0 if getattr(predictor, "selection", None) is None else predictor.num_first_selected


@torch.no_grad()
def level_sizes(model: DIMaskDINO, height: int, width: int) -> list[tuple[int, int]]:
    """The (rows, columns) of tokens that each level has of an image of this size in px."""
    head: Any = model.sem_seg_head
    return [level.shape[-2:] for level in head.pixel_decoder(model.backbone(torch.zeros(1, 3, height, width))).levels]


def describe(
    predictor: Predictor, graph: ExportGraph, *, canvas: tuple[int, int] | None, batch: int | None, form: str
) -> dict[str, Any]:
    """The description of an exported model, which tools/predict_onnx.py reads.

    It takes images on a ``canvas`` of (height, width) px, or of any size, ``batch`` at a time, or any number. ``form``
    is that of deformable attention.
    """
    cfg, model, classes = predictor.cfg, graph.model, predictor.classes
    post = model.post_processor
    options = post.instance_options
    side = 8 * max(model.size_divisibility, 32)  # a multiple of every stride
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
        "strides": [side // rows for rows, _ in level_sizes(model, side, side)],
        "least_tokens": least_tokens(model),
        "ignores_padding": model.ignores_padding,
        "max_detections": options["max_detections"],
        "min_score": options["min_score"],
        "score_by_mask": options["score_by_mask"],
        "mask_interpolation": options["rendering"].interpolation,
        "temperature": post.temperature,
        "no_object_class": post.no_object_class,
        "crop_first": post.crop_first,
        **post.panoptic_options,
        "deformable_attention": form,
        "torch": torch.__version__,
    }
