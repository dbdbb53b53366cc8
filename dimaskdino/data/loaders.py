"""Loaders from the configuration."""

import logging
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.data.detection_utils import check_metadata_consistency
from detectron2.structures import Instances
from detectron2.utils import comm
from torch import Tensor
from torch.utils.data import DataLoader

from dimaskdino.data.coco_file import forget_files, has_objects
from dimaskdino.data.datasets import register_all
from dimaskdino.data.datasets.panoptic import forget_panoptic_files
from dimaskdino.data.datasets.registration import CATEGORY_LISTS, is_coco_file, load_dataset, share_classes
from dimaskdino.data.json_file import without_collecting
from dimaskdino.data.mapper import build_mapper
from dimaskdino.data.orders import (
    BatchSampler,
    Samples,
    check_folds,
    check_sampler,
    endless_order,
    image_keys,
    nothing_to_train_on,
    take_fold,
)
from dimaskdino.data.readers import image_reader
from dimaskdino.data.shared import PackedEntries, once_a_machine
from dimaskdino.errors import ConfigError, check_range

logger = logging.getLogger(__name__)

Batches = Iterable[list[dict[str, Any]]]


def build_train_loader(
    cfg: CfgNode,
    *,
    with_masks: bool = True,
    first_batch: int = 0,
    group_size: int = 0,
) -> Batches:
    """Endless batches of SOLVER.IMS_PER_BATCH / processes mapped training images, after ``first_batch`` of them.

    Images without objects, or with only crowd regions, are left out if DATALOADER.FILTER_EMPTY_ANNOTATIONS says so, and
    counted in the log. Crowd regions, and with them BDD100K's ignored regions, are never trained on.

    Batches and augmentations follow from SEED (see :mod:`dimaskdino.data.orders`); a negative one draws a seed.
    ``group_size`` is in place of DATALOADER.ASPECT_RATIO_GROUP_SIZE where it is not 0.

    Raises:
        ConfigError: if DATALOADER.SAMPLER_TRAIN is not the name of a sampler.
        DatasetError: if no image is left.
    """
    check_sampler(cfg)
    register_all(cfg=cfg)
    entries, group_of = _train_entries(cfg)
    mapper = build_mapper(cfg, is_train=True, with_masks=with_masks)
    logger.info("Augmentations: %s", getattr(mapper, "augmentations", mapper))
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    batches = BatchSampler(
        endless_order(cfg, entries, seed),
        batch_size=cfg.SOLVER.IMS_PER_BATCH,
        group_of=group_of,
        group_size=group_size or images_in_a_group(cfg),
        first=first_batch,
        rank=comm.get_rank(),
        num_processes=comm.get_world_size(),
    )
    return DataLoader(
        Samples(entries, mapper, seed),
        batch_sampler=batches,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=partial(
            _checked_batch,
            mapper_name=cfg.INPUT.DATASET_MAPPER_NAME,
            needs_instances=cfg.MODEL.META_ARCHITECTURE in ("DIMaskDINO", "MaskDINO", "DINO"),
        ),
    )


@without_collecting()
def _train_entries(cfg: CfgNode) -> tuple[PackedEntries, list[bool]]:
    """The images to train on, and for DATALOADER.ASPECT_RATIO_GROUPING which of them are wide.

    One process of a machine reads COCO files for all. What a user's function lists, each process calls it for.
    """
    group_of: list[bool] = []

    def entries() -> list[dict[str, Any]]:
        listed = _entries(cfg, cfg.DATASETS.TRAIN, train=True)
        if cfg.INPUT.PARTIAL_LABELS and not any(key in entry for entry in listed for key in CATEGORY_LISTS):
            names = " or ".join(CATEGORY_LISTS)
            logger.warning("INPUT.PARTIAL_LABELS has no effect: no training image has %s; add them.", names)
        if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS and any("annotations" in entry for entry in listed[:1]):
            number = len(listed)
            listed = [entry for entry in listed if has_objects(entry.get("annotations", ()))]
            left = len(listed)
            logger.info("Removed %d images with no usable annotations. %d images left.", number - left, left)
        if not listed:
            raise nothing_to_train_on(cfg.DATASETS.TRAIN)
        if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
            group_of[:] = [_is_wide(entry, cfg) for entry in listed]
        return listed

    if not all(map(is_coco_file, cfg.DATASETS.TRAIN)):
        packed = PackedEntries(entries())
    else:
        packed = PackedEntries.once_a_machine(entries)
        group_of = once_a_machine(lambda: group_of)
        share_classes(cfg.DATASETS.TRAIN)
    forget_files()
    forget_panoptic_files()
    return packed, group_of


def _checked_batch(batch: list[dict[str, Any]], mapper_name: str, needs_instances: bool) -> list[dict[str, Any]]:
    """A batch, if the mapper gives what the model takes; else ConfigError names it and what it should give."""
    for mapped in batch:
        image = mapped.get("image") if isinstance(mapped, dict) else None
        instances = mapped.get("instances") if isinstance(mapped, dict) else None
        if not (isinstance(image, Tensor) and image.ndim == 3):
            found = f"{type(image).__name__} {tuple(getattr(image, 'shape', ()))}"
            problem = f'gives "image" as {found}; it must be a tensor (C, H, W)'
        elif instances is None and not needs_instances:
            continue
        elif not isinstance(instances, Instances):
            problem = f'gives "instances" as {type(instances).__name__}; it must be detectron2\'s Instances'
        elif instances.image_size != image.shape[-2:]:
            problem = f"gives instances of {instances.image_size} (height, width) in an image of {tuple(image.shape)}"
        elif not (instances.has("gt_classes") and instances.has("gt_boxes")):
            problem = "gives instances without gt_classes or gt_boxes"
        else:
            continue
        raise ConfigError(f"The mapper {mapper_name} (INPUT.DATASET_MAPPER_NAME) {problem}.")
    return batch


def images_in_a_group(cfg: CfgNode) -> int:
    """Images that DATALOADER.ASPECT_RATIO_GROUPING brings together; ConfigError if that does not divide the batch."""
    size = cfg.DATALOADER.ASPECT_RATIO_GROUP_SIZE
    if size < 0 or (size and cfg.SOLVER.IMS_PER_BATCH % size):
        raise ConfigError(
            f"DATALOADER.ASPECT_RATIO_GROUP_SIZE is {size}; it must divide SOLVER.IMS_PER_BATCH "
            f"({cfg.SOLVER.IMS_PER_BATCH}), or be 0 for the share of a process."
        )
    return size or cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()


def _is_wide(entry: dict[str, Any], cfg: CfgNode) -> bool:
    if "width" in entry and "height" in entry:
        return entry["width"] > entry["height"]
    height, width = image_reader(cfg).header(entry["file_name"]).size(apply_exif=cfg.INPUT.APPLY_EXIF)
    return width > height


def build_test_loader(cfg: CfgNode, dataset_name: str) -> Batches:
    """Every image of one dataset once, in order, one per batch, divided between the processes."""
    loader = build_detection_test_loader(
        dataset=test_entries(cfg, dataset_name),
        mapper=build_mapper(cfg, is_train=False),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
    forget_files()
    forget_panoptic_files()
    return loader


def test_entries(cfg: CfgNode, dataset_name: str) -> list[dict[str, Any]]:
    """What :func:`build_test_loader` maps, in detectron2's format."""
    register_all(cfg=cfg)
    return _entries(cfg, [dataset_name], train=False)


def _entries(cfg: CfgNode, names: Sequence[str], *, train: bool) -> list[dict[str, Any]]:
    """Images of the named datasets in detectron2's format; the first DATASETS.MAX_IMAGES of them unless that is 0.

    An image without annotations is background, other than in detectron2's own function, if the first image has some.
    """
    number = cfg.DATASETS.MAX_IMAGES
    check_range("DATASETS.MAX_IMAGES", number, 0, meaning="a number of images, or 0 for all")
    check_folds(cfg)
    fields, keys = cfg.INPUT.ANNOTATION_FIELDS, image_keys(cfg)
    loaded = [
        entry
        for name in names
        for entry in take_fold(cfg, name, load_dataset(name, fields, keys, packed=train), train=train)
    ]
    labeled = ("annotations", "segments_info", "sem_seg_file_name")
    entries = [entry if any(key in entry for key in labeled) else {**entry, "annotations": []} for entry in loaded]
    if all(MetadataCatalog.get(name).get("thing_classes") is not None for name in names):  # not so of semantic ones
        check_metadata_consistency("thing_classes", names)
    return entries[:number] if number else entries
