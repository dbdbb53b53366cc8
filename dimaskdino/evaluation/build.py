"""What a dataset is scored by, and whether its classes are those that the model was trained on."""

import os

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils.registry import Registry

from dimaskdino.data.coco_file import category_names, read_json
from dimaskdino.errors import DatasetError
from dimaskdino.evaluation.coco import CocoEvaluator
from dimaskdino.evaluation.layerwise import LayerwiseEvaluator

EVALUATOR_REGISTRY = Registry("EVALUATOR")
EVALUATOR_REGISTRY.__doc__ = """
Builders of evaluators by the ``evaluator_type`` of a dataset's metadata. Each is called as
``builder(cfg, dataset_name, output_folder)``. Datasets whose type has no builder get that of ``coco``.
"""


def build_evaluator(cfg: CfgNode, dataset_name: str, output_folder: str) -> DatasetEvaluator:
    """Build what a dataset is scored by.

    Args:
        cfg: of the model that is evaluated.
        dataset_name: a registered dataset.
        output_folder: where predictions and tables go.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
    build = EVALUATOR_REGISTRY.get(kind if kind in EVALUATOR_REGISTRY else "coco")
    return build(cfg, dataset_name, output_folder)


@EVALUATOR_REGISTRY.register()
def coco(cfg: CfgNode, dataset_name: str, output_folder: str) -> DatasetEvaluator:
    """AP of boxes and masks, of several stages where TEST.EVAL_LAYERS names them."""
    final = CocoEvaluator(
        dataset_name=dataset_name,
        output_dir=output_folder,
        seen_only=cfg.DATASETS.MAX_IMAGES > 0,
        max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
    )
    if not cfg.TEST.EVAL_LAYERS:
        return final
    return LayerwiseEvaluator(final=final, output_dir=output_folder)


def check_classes(cfg: CfgNode) -> None:
    """Check that each DATASETS.TEST has the classes, in the order, of the datasets that the model was trained on.

    A class is a number to the model: against other classes, or another order, AP is a plausible wrong number. Training
    datasets with another number of classes than the model, or whose files are not on this machine, are not compared.

    Raises:
        DatasetError: a dataset has other classes or another order; the message shows both.
    """
    for tested in cfg.DATASETS.TEST:
        ours = class_names(tested)
        for trained in cfg.DATASETS.TRAIN:
            theirs = class_names(trained)
            if ours and theirs != ours and len(theirs) == cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES:
                raise DatasetError(_difference(trained, theirs, tested, ours))


def class_names(dataset_name: str) -> list[str]:
    """The class names of a registered dataset by class index; empty if they are not known on this machine."""
    if dataset_name not in DatasetCatalog.list():
        return []
    metadata = MetadataCatalog.get(dataset_name)
    names, file = metadata.get("thing_classes"), metadata.get("json_file")
    if names is None and file and os.path.isfile(file):
        # register_coco_instances learns the classes when it loads the file.
        names = category_names(read_json(file)).values()
    return list(names or [])


def _difference(trained: str, theirs: list[str], tested: str, ours: list[str]) -> str:
    kind = "the same classes in different orders" if sorted(theirs) == sorted(ours) else "different classes"
    return (
        f"{trained} (DATASETS.TRAIN) and {tested} (DATASETS.TEST) have {kind}, so AP would compare one class with "
        f"another. {trained}: {_shown(theirs, ours)}. {tested}: {_shown(ours, theirs)}. Give both the same categories "
        "in the same order, or set DATASETS.TRAIN to the dataset that the weights were trained on."
    )


def _shown(names: list[str], others: list[str], most: int = 5) -> str:
    """The number of classes and the first that differ, by class index."""
    differing = [index for index, name in enumerate(names) if others[index : index + 1] != [name]]
    shown = [f"{index} {names[index]!r}" for index in differing[:most]]
    more = f" and {len(differing) - most} more" if len(differing) > most else ""
    return f"{len(names)} classes, with {', '.join(shown)}{more}" if shown else f"{len(names)} classes"
