"""The datasets that dimaskdino registers with detectron2 when it is imported: COCO, BDD100K, the synthetic shapes."""

import os
from pathlib import Path

from detectron2.config import CfgNode

from dimaskdino.data.datasets.bdd100k import register_bdd100k
from dimaskdino.data.datasets.coco import register_coco
from dimaskdino.data.datasets.shapes import ShapesSpec, register_shapes

__all__ = ["data_root", "register_all"]

_given_root: Path | None = None


def data_root() -> Path:
    """Folder of all datasets: as last given to :func:`register_all`, else $DETECTRON2_DATASETS, else ``datasets``."""
    return _given_root or Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()


def register_all(root: str | Path | None = None, *, cfg: CfgNode | None = None) -> None:
    """Register every dataset; calling it again changes only what a new root or configuration changes.

    Args:
        root: folder of all datasets, remembered for later calls; None leaves it as :func:`data_root` says.
        cfg: its DATASETS.SHAPES decides where the synthetic dataset lies and what it holds; None means the defaults.
    """
    global _given_root
    if root is not None:
        _given_root = Path(root).expanduser()
    register_coco(data_root())
    register_bdd100k(data_root())
    shapes_root = Path(cfg.DATASETS.SHAPES.ROOT).expanduser() if cfg is not None and cfg.DATASETS.SHAPES.ROOT else None
    register_shapes(shapes_root or data_root() / "shapes", ShapesSpec.from_config(cfg) if cfg else ShapesSpec())
