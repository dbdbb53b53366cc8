"""What the tests of commands train."""

import os
from pathlib import Path

import pytest

# A model and pictures that train in milliseconds a step.
TINY = [
    *("MODEL.MaskDINO.HIDDEN_DIM", "64", "MODEL.SEM_SEG_HEAD.CONVS_DIM", "64", "MODEL.SEM_SEG_HEAD.MASK_DIM", "64"),
    *("MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", "1", "MODEL.MaskDINO.DEC_LAYERS", "2"),
    *("MODEL.MaskDINO.TRAIN_NUM_POINTS", "64", "MODEL.MaskDINO.DN_NUM", "8", "TEST.DETECTIONS_PER_IMAGE", "10"),
    *("DATASETS.SHAPES.IMAGE_SIZE", "64", "DATASETS.SHAPES.NUM_TRAIN", "8", "DATASETS.SHAPES.NUM_VAL", "3"),
    *("INPUT.IMAGE_SIZE", "64", "INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TEST", "64"),
    *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "3", "SOLVER.STEPS", "(2,)", "SOLVER.CHECKPOINT_PERIOD", "2"),
    *("DATALOADER.NUM_WORKERS", "0", "LOG.PICTURES", "1"),
]


@pytest.fixture
def tiny(shapes_root: Path, tmp_path: Path) -> list[str]:
    """Arguments of a tiny job on the CPU that writes to ``tmp_path / "run"``; options may follow."""
    config = os.path.join("configs", "demo", "dimaskdino_shapes.yaml")
    options = [*TINY, "DATASETS.SHAPES.ROOT", str(shapes_root), "OUTPUT_DIR", str(tmp_path / "run")]
    return ["--num-gpus", "0", "--config-file", config, *options]
