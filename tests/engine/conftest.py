"""A tiny ``shapes`` dataset and configurations for it, shared by the tests of the engine."""

from pathlib import Path

import pytest

from dimaskdino.config import Config, get_cfg
from dimaskdino.data.datasets import register_all
from tests.engine import toy  # noqa: F401  registers ToyDetector


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the tiny dataset is made once for the session."""
    return tmp_path_factory.mktemp("shapes")


@pytest.fixture
def toy_cfg(shapes_root: Path, tmp_path: Path) -> Config:
    """Ten iterations of :class:`ToyDetector` on eight images of 64 pixels."""
    cfg = get_cfg()
    cfg.merge_from_list(
        [
            *("MODEL.META_ARCHITECTURE", "ToyDetector", "MODEL.DEVICE", "cpu", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 6),
            *("DATASETS.TRAIN", ("shapes_train",), "DATASETS.TEST", ("shapes_val",)),
            *("DATASETS.SHAPES.ROOT", str(shapes_root), "DATASETS.SHAPES.IMAGE_SIZE", 64),
            *("DATASETS.SHAPES.NUM_TRAIN", 8, "DATASETS.SHAPES.NUM_VAL", 3),
            *("INPUT.DATASET_MAPPER_NAME", "coco_instance_detr", "INPUT.MIN_SIZE_TRAIN", (64,)),
            *("INPUT.MIN_SIZE_TEST", 64, "INPUT.RANDOM_FLIP", "none", "DATALOADER.NUM_WORKERS", 0),
            *("DATALOADER.ASPECT_RATIO_GROUPING", False, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 10),
            *("SOLVER.STEPS", (8,), "SOLVER.BASE_LR", 0.01, "SOLVER.WARMUP_ITERS", 0, "SOLVER.CHECKPOINT_PERIOD", 5),
            *("SEED", 1, "OUTPUT_DIR", str(tmp_path / "run")),
        ]
    )
    register_all(cfg=cfg)
    return cfg
