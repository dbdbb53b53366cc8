"""DINO's figures over epochs: scores from the records of runs (Figures 4 and 7), and the average top-k distance."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from matplotlib.figure import Figure
from torch import Tensor, nn

from dimaskdino.checkpoint import Checkpointer
from dimaskdino.config.reader import config_of_run
from dimaskdino.data import build_mapper
from dimaskdino.data.datasets import register_all
from dimaskdino.data.datasets.registration import load_dataset
from dimaskdino.data.parallel import Progress, no_progress
from dimaskdino.data.validation.dataset import find_dataset
from dimaskdino.devices import default_device
from dimaskdino.engine.writers import METRICS_FILE, records
from dimaskdino.errors import UserError
from dimaskdino.modeling.meta_arch import build_model
from dimaskdino.reproduction.charts import RUN_STYLES
from dimaskdino.reproduction.tables import EPOCH_IMAGES
from dimaskdino.structures import Targets

SMALL_PX2 = 32**2
DISTANCES_FILE = "anchor_distances.json"
# Distances of each checkpoint by its name, each list in decreasing order.
Distances = dict[str, dict[str, list[float]]]


class ObjectDistances(NamedTuple):
    """Distances of an image's objects from their anchors, and which objects are small, each (n,)."""

    distance: Tensor
    is_small: Tensor


def average_top_k(distances: Sequence[float], k: int) -> float:
    """ATD(k): the mean of the k largest distances, of all where there are fewer; UserError where there are none."""
    if not distances:
        raise UserError("No object was measured, so there is no average top-k distance.")
    largest = sorted(distances, reverse=True)[:k]
    return sum(largest) / len(largest)


@contextmanager
def _recorded(decoder: Any) -> Iterator[dict[str, Any]]:
    """Inside the block, the dictionary holds the anchors that the decoder last started from, and its last stage."""
    kept: dict[str, Any] = {}

    def keep_anchors(layer: nn.Module, given: tuple[Any, ...]) -> None:
        kept["anchors"] = given[2].float()  # content, position, reference boxes

    def keep_output(decoder: nn.Module, given: Any, output: Any) -> None:
        kept["stage"] = output.stages[-1]

    with decoder.layers[0].register_forward_pre_hook(keep_anchors), decoder.register_forward_hook(keep_output):
        yield kept


@torch.no_grad()
def object_distances(model: Any, images: Iterable[Mapping[str, Any]]) -> Iterator[ObjectDistances]:
    """Match the final boxes of each image with its objects, and measure from where their queries started.

    The model is a DINO in evaluation mode; images are as the mapper gives them with ``instances``. Objects are small
    below 32 x 32 px of the original image, by the area of their box.

    Yields:
        The L1 distances of boxes cxcywh in parts of the image.

    Source: DINO, section 3.3.
    """
    with _recorded(model.sem_seg_head.predictor) as kept:
        for image in images:
            height, width = image["image"].shape[-2:]
            frame = height, width, model.num_classes, model.device
            targets = Targets.from_instances(image["instances"], *frame, with_masks=False)
            model([image])
            ((queries, objects),) = model.criterion.matcher([kept["stage"]], [targets])[0]
            boxes = targets.boxes[objects]
            area_px2 = boxes[:, 2:].prod(-1) * image["height"] * image["width"]
            distance = (kept["anchors"][0, queries] - boxes).abs().sum(-1)
            yield ObjectDistances(distance.cpu(), (area_px2 < SMALL_PX2).cpu())


def measure_run(folder: Path, progress: Progress = no_progress) -> Distances:
    """Distances of every checkpoint of a run of DINO on its test set; checkpoints that were measured are not again.

    These are, by the name of the checkpoint ("model_0007374"), of "all" and of "small" objects.

    Raises:
        UserError: the folder holds no run of DINO, or its test set is not registered.
    """
    cfg, file = _config_of(folder), folder / "inference" / DISTANCES_FILE
    found: Distances = json.loads(file.read_bytes()) if file.is_file() else {}
    missing = [path for path in sorted(folder.glob("model_[0-9]*.pth")) if path.stem not in found]
    if not missing:
        return found
    register_all(cfg=cfg)
    find_dataset(cfg.DATASETS.TEST[0])
    model, mapper = build_model(cfg).eval(), build_mapper(cfg, is_train=False, with_instances=True, with_masks=False)
    entries = [entry for entry in load_dataset(cfg.DATASETS.TEST[0]) if entry.get("annotations")]
    for path in missing:
        Checkpointer(model).load(str(path))
        images = progress((mapper(dict(entry)) for entry in entries), total=len(entries))
        distances = list(object_distances(model, images))
        every, small = (torch.cat([each[index] for each in distances]) for index in (0, 1))
        kinds = {"all": every, "small": every[small]}
        found[path.stem] = {kind: sorted(values.tolist(), reverse=True) for kind, values in kinds.items()}
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(found))
    return found


def _config_of(folder: Path) -> CfgNode:
    cfg = config_of_run(folder)
    if cfg.MODEL.META_ARCHITECTURE != "DINO":
        raise UserError(
            f"{folder} holds a run of {cfg.MODEL.META_ARCHITECTURE}; the average top-k distance is measured of DINO "
            "(MODEL.META_ARCHITECTURE)."
        )
    cfg.MODEL.DEVICE = default_device()
    cfg.MODEL.WEIGHTS, cfg.MODEL.TIMM.PRETRAINED, cfg.TEST.EVAL_LAYERS = "", False, []
    return cfg


@dataclass(frozen=True)
class Curve:
    """Scores of one run."""

    label: str  # of the run
    epochs: Sequence[float]  # at which it was evaluated
    scores: Sequence[float]  # one for each


def score_curve(folder: Path, label: str, metric: str, epoch_images: int | None = None) -> Curve:
    """A score, as metrics.json names it, of every evaluation in a training; UserError if there is none."""
    path = folder / METRICS_FILE
    if not path.is_file():
        raise UserError(f"{folder} is not the folder of a training: it has no metrics.json.")
    # An evaluation that was repeated counts once.
    found = {record["iteration"]: record.get(metric) for _, record in records(path, f'"{metric}"')}
    scores = {iteration: score for iteration, score in found.items() if isinstance(score, int | float)}
    if not scores:
        raise UserError(
            f"{path} has no {metric}: evaluate during the training (TEST.EVAL_PERIOD), or name another score."
        )
    per_epoch = _iterations_of_epoch(folder, epoch_images)
    return Curve(label, [iteration / per_epoch for iteration in scores], list(scores.values()))


def distance_curves(
    folder: Path, label: str, k: int, epoch_images: int | None = None, progress: Progress = no_progress
) -> dict[str, Curve]:
    """ATD(k) of every checkpoint of a run, on "all" and on "small" objects; see :func:`measure_run`."""
    per_epoch = _iterations_of_epoch(folder, epoch_images)
    found = measure_run(folder, progress)
    if not found:
        raise UserError(f"{folder} has no checkpoint model_*.pth of an iteration (SOLVER.CHECKPOINT_PERIOD).")
    curves = {}
    for kind in ("all", "small"):
        names = [name for name in sorted(found) if found[name][kind]]
        epochs = [(int(re.findall(r"\d+", name)[0]) + 1) / per_epoch for name in names]
        curves[kind] = Curve(label, epochs, [average_top_k(found[name][kind], k) for name in names])
    return curves


def _iterations_of_epoch(folder: Path, epoch_images: int | None) -> float:
    cfg = config_of_run(folder)
    if epoch_images is None:
        name = cfg.DATASETS.TRAIN[0] if cfg.DATASETS.TRAIN else ""
        known = EPOCH_IMAGES | {"shapes": cfg.DATASETS.SHAPES.NUM_TRAIN}
        epoch_images = known.get(name.partition("_")[0])
        if epoch_images is None:
            raise UserError(f"How many images {name or 'DATASETS.TRAIN'} has is not known; give --epoch-images.")
    return epoch_images / cfg.SOLVER.IMS_PER_BATCH


def draw_curves(panels: Mapping[str, Sequence[Curve]], path: Path) -> None:
    """Draw curves over epochs, a panel for each score, and write a picture."""
    figure = Figure(figsize=(0.6 + 3.8 * len(panels), 3.4), layout="constrained")
    for axes, (score, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for index, curve in enumerate(curves):
            style = RUN_STYLES[index % len(RUN_STYLES)]
            axes.plot(curve.epochs, curve.scores, style, label=curve.label, markersize=4, linewidth=1.2)
        axes.set_xlabel("epoch")
        axes.set_ylabel(score)
        axes.grid(color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=200)
