"""The datasets that dimaskdino registers with detectron2 when it is imported, and those that keys name."""

import os
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from dimaskdino.data.datasets.bdd100k import register_bdd100k
from dimaskdino.data.datasets.coco import register_coco, register_lvis, register_objects365, register_own
from dimaskdino.data.datasets.panoptic import register_coco_panoptic, register_own_panoptic
from dimaskdino.data.datasets.registration import take_over
from dimaskdino.data.datasets.semantic import register_ade20k, register_cityscapes, register_own_semantic
from dimaskdino.data.datasets.shapes import ShapesSpec, register_shapes, register_shapes_with_stuff

__all__ = ["data_root", "register_all"]

_given_root: Path | None = None


def data_root() -> Path:
    """Folder of all datasets: as last given to :func:`register_all`, else $DETECTRON2_DATASETS, else ``datasets``."""
    return _given_root or Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()


def register_all(root: str | Path | None = None, *, cfg: CfgNode | None = None) -> None:
    """Register every dataset; calling it again changes only what a new root or configuration changes.

    From then on, ``DatasetCatalog.get`` reads COCO files that detectron2 has registered as this package does.

    Args:
        root: folder of all datasets, remembered for later calls; None leaves it as :func:`data_root` says.
        cfg: its DATASETS name datasets of your own, and say, with OUTPUT_DIR, where the synthetic dataset lies and what
            it holds; None means the defaults.
    """
    global _given_root
    if root is not None:
        _given_root = Path(root).expanduser()
    register_coco(data_root())
    register_bdd100k(data_root())
    register_objects365(data_root())
    register_lvis(data_root())
    register_coco_panoptic(data_root())
    register_ade20k(data_root())
    register_cityscapes(data_root())
    if cfg is not None:
        register_own(cfg)
        register_own_panoptic(cfg)
        register_own_semantic(cfg)
    spec = ShapesSpec.from_config(cfg) if cfg else ShapesSpec()
    register_shapes(_shapes_root(cfg, spec), spec)
    register_shapes_with_stuff(_shapes_root(cfg, spec), spec)
    for name in DatasetCatalog.list():
        take_over(name)


def _shapes_root(cfg: CfgNode | None, spec: ShapesSpec) -> Path:
    """DATASETS.SHAPES.ROOT; else the folder of all datasets if it was given or holds the dataset; else OUTPUT_DIR.

    The folder that $DETECTRON2_DATASETS names may be shared, so nothing is written there unless the user asks for it.
    """
    if cfg is not None and cfg.DATASETS.SHAPES.ROOT:
        return Path(cfg.DATASETS.SHAPES.ROOT).expanduser()
    shared = data_root() / "shapes"
    if _given_root is not None or (shared / spec.folder_name).is_dir():
        return shared
    return Path("output" if cfg is None else cfg.OUTPUT_DIR).expanduser() / "shapes"
