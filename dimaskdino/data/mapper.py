"""From one entry of a dataset to what the model takes, and the mappers by name."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.utils.registry import Registry

from dimaskdino.data.annotations import Annotation, annotations_to_instances, boxes_of, crowd_regions
from dimaskdino.data.augmentations import copy_paste, own_augmentations
from dimaskdino.data.copy_paste import CopyPaste
from dimaskdino.data.fields import unlabeled_classes
from dimaskdino.data.images import size_problem
from dimaskdino.data.label_maps import panoptic_annotations, read_segments, read_semantic, semantic_annotations
from dimaskdino.data.pixels import augment
from dimaskdino.data.readers import PilReader, Reader, image_reader
from dimaskdino.data.transforms import large_scale_jitter, semantic_crop, shortest_edge, test_resize
from dimaskdino.errors import ConfigError, DatasetError, check_choice, make_part
from dimaskdino.structures.rle_masks import Size

Mapper = Callable[[dict[str, Any]], dict[str, Any]]

MAPPER_REGISTRY = Registry("DATASET_MAPPER")
MAPPER_REGISTRY.__doc__ = """
Builders of mappers by INPUT.DATASET_MAPPER_NAME. Each is called as ``builder(cfg, *, is_train, with_instances)`` and
returns a callable that maps an entry of a dataset to the model's input; ``with_masks=False`` comes with it for a model
without masks.
"""


class InstanceMapper:
    """Reads an image, augments it and turns its annotations into targets in the augmented image's frame.

    The augmentations are applied in order and must move coordinates linearly; category ids must lie in [0,
    num_classes). Annotations are dropped unless ``with_instances``, and their masks unless ``with_masks``. Without a
    reader, images are PIL's, by ``image_format`` and ``apply_exif``. ``crowd`` gives the crowd regions. ``copy_paste``
    puts objects of another image, which the loader draws and maps likewise, over an image. All else is as the keys of
    INPUT of these names.
    """

    def __init__(
        self,
        *,
        augmentations: list[T.Augmentation],
        image_format: str,
        num_classes: int,
        with_instances: bool,
        with_masks: bool = True,
        apply_exif: bool = True,
        fields: Sequence[str] = (),
        reader: Reader | None = None,
        annotated_boxes: bool = False,
        partial_labels: bool = False,
        crowd: bool = False,
        copy_paste: CopyPaste | None = None,
    ) -> None:
        self.augmentations, self.copy_paste = T.AugmentationList(augmentations), copy_paste
        self._needs_boxes = any(getattr(each, "needs_boxes", False) for each in augmentations)
        self.annotated_boxes, self.partial_labels, self.crowd = annotated_boxes, partial_labels, crowd
        self.image_format, self.fields = image_format, tuple(fields)
        self.reader = reader or PilReader(image_format, apply_exif=apply_exif)
        self.num_classes = num_classes
        self.with_instances, self.with_masks, self.apply_exif = with_instances, with_masks, apply_exif

    def __call__(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Map one entry of a dataset in detectron2's format; the entry stays as it is.

        Returns:
            The entry without "annotations", with "image" (C, H, W), uint8 or float32, as augmented, "height" and
            "width" of the file, and, if wanted, "instances" (see :func:`annotations_to_instances`); an entry without
            annotations is background. Also, if wanted, "unlabeled_classes", the classes that are no false positives,
            and "crowd_regions" (see :func:`crowd_regions`).

        Raises:
            DatasetError: for an image or annotation that cannot be used, or an image of another size than the entry
                says.
        """
        image = self.reader.read(entry["file_name"])
        source_size = image.shape[:2]
        self._check_size(entry, source_size)
        annotations, label_map = self.read_labels(entry, source_size) if self.with_instances else ([], None)
        boxes = boxes_of(annotations, source_size) if self._needs_boxes else None
        transforms, pixels = augment(self.augmentations, image, boxes=boxes, sem_seg=label_map)
        mapped = {key: value for key, value in entry.items() if key != "annotations"}
        mapped["height"], mapped["width"] = source_size
        mapped["image"] = pixels
        if self.with_instances:
            frame = {"transforms": transforms, "source_size": source_size, "target_size": tuple(pixels.shape[1:])}
            mapped |= self._targets(entry, annotations, **frame)
        return mapped

    def _targets(self, entry: dict[str, Any], annotations: list[Annotation], **frame: Any) -> dict[str, Any]:
        """What the model is trained on; ``frame`` is what the image went through, and its sizes before and after."""
        place: dict[str, Any] = {**frame, "num_classes": self.num_classes, "file_name": entry["file_name"]}
        options: dict[str, Any] = {"with_masks": self.with_masks, "annotated_boxes": self.annotated_boxes}
        targets: dict[str, Any] = {
            "instances": annotations_to_instances(annotations, fields=self.fields, **place, **options)
        }
        if self.crowd:
            targets["crowd_regions"] = crowd_regions(annotations, **place)
        if self.partial_labels:
            targets["unlabeled_classes"] = unlabeled_classes(entry, annotations, self.num_classes)
        return targets

    def read_labels(self, entry: dict[str, Any], size: Size) -> tuple[list[Annotation], np.ndarray | None]:
        """The objects of an image of ``size``, and a map of their classes for augmentations that look at it."""
        return entry.get("annotations", []), None

    def _check_size(self, entry: dict[str, Any], size: tuple[int, ...]) -> None:
        listed = entry.get("height", size[0]), entry.get("width", size[1])
        if listed != size:
            problem = size_problem(self.reader.header(entry["file_name"]), listed, apply_exif=self.apply_exif)
            raise DatasetError(f"Image {entry['file_name']} is {problem}.")


class PanopticMapper(InstanceMapper):
    """Reads an image and its panoptic PNG; every segment but crowd regions is an object, enclosed by its box."""

    def read_labels(self, entry: dict[str, Any], size: tuple[int, int]) -> tuple[list[Annotation], None]:
        """The segments of an image."""
        if "segments_info" not in entry:
            raise DatasetError(f"Image {entry['file_name']} has no panoptic labels (pan_seg_file_name, segments_info).")
        return panoptic_annotations(read_segments(entry, size), entry["segments_info"]), None


class SemanticMapper(InstanceMapper):
    """Reads an image and its label map; what a class covers in the image, but the label ``ignore``, is one object."""

    def __init__(self, *, ignore: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.ignore = ignore

    def read_labels(self, entry: dict[str, Any], size: tuple[int, int]) -> tuple[list[Annotation], np.ndarray]:
        """The classes of an image."""
        if "sem_seg_file_name" not in entry and "segments_info" not in entry:
            raise DatasetError(f"Image {entry['file_name']} has no semantic labels (sem_seg_file_name).")
        labels = read_semantic(entry, num_classes=self.num_classes, ignore=self.ignore, size=size)
        # Resized by detectron2 in floating point, as labels may be larger than 255; only the choice of a crop sees it.
        return semantic_annotations(labels, self.ignore), labels.astype(np.float32)


@MAPPER_REGISTRY.register()
def coco_instance_lsj(cfg: CfgNode, **use: bool) -> InstanceMapper:
    """Large-scale jitter on a square canvas in training."""
    return _instance_mapper(cfg, large_scale_jitter, **use)


@MAPPER_REGISTRY.register()
def coco_instance_detr(cfg: CfgNode, **use: bool) -> InstanceMapper:
    """DETR's resizing of the shortest edge, with its random crop if asked for, in training."""
    return _instance_mapper(cfg, shortest_edge, **use)


@MAPPER_REGISTRY.register()
def coco_detection_detr(cfg: CfgNode, *, with_masks: bool = False, **use: bool) -> InstanceMapper:
    """As coco_instance_detr, with boxes alone."""
    return coco_instance_detr(cfg, with_masks=with_masks, **use)


@MAPPER_REGISTRY.register()
def coco_panoptic_lsj(cfg: CfgNode, **use: bool) -> PanopticMapper:
    """Panoptic labels, large-scale jitter on a square canvas in training."""
    crowd = cfg.MODEL.IGNORE_CROWD_SHARE > 0
    return PanopticMapper(crowd=crowd, **mapper_arguments(cfg, large_scale_jitter, **use))


@MAPPER_REGISTRY.register()
def mask_former_semantic(cfg: CfgNode, **use: bool) -> SemanticMapper:
    """Semantic labels, MaskFormer's resize, crop and padding in training."""
    if use["is_train"] and copy_paste(cfg):
        raise ConfigError("INPUT.AUGMENTATIONS lists CopyPaste, which needs objects, not a map of classes; remove it.")
    ignore = cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
    return SemanticMapper(ignore=ignore, **mapper_arguments(cfg, semantic_crop, **use))


def mapper_arguments(
    cfg: CfgNode,
    default: Callable[[CfgNode], list[T.Augmentation]],
    *,
    is_train: bool,
    with_instances: bool,
    with_masks: bool = True,
) -> dict[str, Any]:
    """Arguments of :class:`InstanceMapper` that mappers of every task take.

    Augmentations are, in training, what INPUT.AUGMENTATIONS lists, else ``default(cfg)``; otherwise the resize of
    testing.
    """
    own = own_augmentations if cfg.INPUT.AUGMENTATIONS else default
    pastes = is_train and with_instances
    return {
        "augmentations": own(cfg) if is_train else test_resize(cfg),
        "copy_paste": copy_paste(cfg, with_masks=with_masks) if pastes else None,
        "image_format": cfg.INPUT.FORMAT,
        "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
        "with_instances": with_instances,
        "with_masks": with_masks,
        "apply_exif": cfg.INPUT.APPLY_EXIF,
        "reader": image_reader(cfg),
    }


def _instance_mapper(cfg: CfgNode, default: Callable[[CfgNode], list[T.Augmentation]], **use: bool) -> InstanceMapper:
    return InstanceMapper(
        fields=cfg.INPUT.ANNOTATION_FIELDS,
        annotated_boxes=cfg.INPUT.BOXES_OF_ANNOTATIONS,
        partial_labels=cfg.INPUT.PARTIAL_LABELS,
        crowd=cfg.MODEL.IGNORE_CROWD_SHARE > 0,
        **mapper_arguments(cfg, default, **use),
    )


def build_mapper(
    cfg: CfgNode, is_train: bool, *, with_instances: bool | None = None, with_masks: bool = True
) -> Mapper:
    """Build the mapper that INPUT.DATASET_MAPPER_NAME names, for training or testing.

    Annotations become targets if ``with_instances`` says so, by default in training only.

    Raises:
        ConfigError: if no mapper has that name, it cannot be made, or its augmentations contradict each other.
    """
    name = cfg.INPUT.DATASET_MAPPER_NAME
    check_choice("INPUT.DATASET_MAPPER_NAME", name, sorted(known for known, _ in MAPPER_REGISTRY))
    options = {} if with_masks else {"with_masks": False}
    wanted = is_train if with_instances is None else with_instances
    options |= {"is_train": is_train, "with_instances": wanted}
    mapper = make_part("INPUT.DATASET_MAPPER_NAME", MAPPER_REGISTRY.get(name), cfg, **options)
    if not callable(mapper):
        raise ConfigError(f"INPUT.DATASET_MAPPER_NAME: {name} makes a {type(mapper).__name__}, which cannot be called.")
    return mapper
