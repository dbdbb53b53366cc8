"""Training in two processes under torchrun is training in one with the double batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
NUM_ITERATIONS = 3
# Nothing random but the order of the images, no batch statistics, images of one size; SGD, because Adam's first steps
# turn rounding errors of vanishing gradients into whole steps.
OPTIONS = [
    *("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.BACKBONE.FREEZE_AT", "0", "MODEL.RESNETS.DEPTH", "18"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "64", "MODEL.RESNETS.OUT_FEATURES", "['res2','res3','res4','res5']"),
    *("MODEL.MaskDINO.HIDDEN_DIM", "64", "MODEL.SEM_SEG_HEAD.CONVS_DIM", "64", "MODEL.SEM_SEG_HEAD.MASK_DIM", "64"),
    *("MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", "1", "MODEL.MaskDINO.DEC_LAYERS", "2"),
    *("MODEL.MaskDINO.DN_NOISE_SCALE", "0.0", "MODEL.MaskDINO.DN_NUM", "12"),
    *("DATASETS.SHAPES.IMAGE_SIZE", "64", "DATASETS.SHAPES.NUM_TRAIN", "12", "DATASETS.SHAPES.NUM_VAL", "1"),
    *("INPUT.DATASET_MAPPER_NAME", "coco_instance_detr", "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.RANDOM_FLIP", "none"),
    *("SOLVER.IMS_PER_BATCH", "4", "SOLVER.MAX_ITER", str(NUM_ITERATIONS), "SOLVER.STEPS", "()"),
    *("SOLVER.OPTIMIZER", "SGD", "SOLVER.BASE_LR", "0.2", "SOLVER.WARMUP_ITERS", "0"),
    *("DATASETS.TRAIN", "('shapes_pairs',)", "DATASETS.TEST", "()", "DATALOADER.NUM_WORKERS", "0", "SEED", "3"),
]


def record_of(launcher: list[str], folder: Path, shapes: Path) -> dict[str, list[float]]:
    """Train with ``python`` ``launcher`` and return every recorded value by name and iteration."""
    command = [sys.executable, *launcher, "-m", "tests.engine.grid_training", "--num-gpus", "0"]
    command += ["--config-file", str(REPO / "configs" / "demo" / "dimaskdino_shapes.yaml"), *OPTIONS]
    command += ["OUTPUT_DIR", str(folder), "DATASETS.SHAPES.ROOT", str(shapes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((folder / "record.json").read_text())


def test_two_processes_under_torchrun_give_the_losses_of_one_with_the_double_batch(tmp_path: Path) -> None:
    one = record_of([], tmp_path / "one", tmp_path / "shapes")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = record_of(torchrun, tmp_path / "two", tmp_path / "shapes")
    terms = [name for name in one if name.startswith("loss_")]
    assert len(terms) > 20
    assert set(one) == set(two)
    for name in [*terms, "total_loss", "grad_norm"]:
        assert len(one[name]) == NUM_ITERATIONS
        assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
    # The test sees training: later losses come from updated weights.
    assert one["total_loss"][2] != pytest.approx(one["total_loss"][0], rel=1e-3)
