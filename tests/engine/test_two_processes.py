"""Training in two processes under torchrun equals training in one process on the whole batch.

torchrun runs this file as a module.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from torch import Tensor, nn

from dimaskdino.data.datasets import register_all
from dimaskdino.data.datasets.shapes_drawing import SHAPES
from dimaskdino.engine import Trainer, argument_parser, launch
from dimaskdino.engine.setup import load_config
from dimaskdino.layers import fast_layers
from dimaskdino.modeling.meta_arch import DIMaskDINO
from tests.documentation import REPOSITORY

NUM_ITERATIONS = 3
# Nothing is random but the order of the images; no batch statistics, images of one size. SGD, because Adam's first
# steps turn rounding errors of vanishing gradients into whole steps.
OPTIONS = [
    *("MODEL.DEVICE", "cpu", "MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.BACKBONE.FREEZE_AT", "0"),
    *("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"),
    *("MODEL.RESNETS.OUT_FEATURES", "['res2','res3','res4','res5']"),
    *("MODEL.MaskDINO.HIDDEN_DIM", "64", "MODEL.SEM_SEG_HEAD.CONVS_DIM", "64", "MODEL.SEM_SEG_HEAD.MASK_DIM", "64"),
    *("MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", "1", "MODEL.MaskDINO.DEC_LAYERS", "2"),
    *("MODEL.MaskDINO.DN_NOISE_SCALE", "0.0", "MODEL.MaskDINO.DN_NUM", "12"),
    *("DATASETS.SHAPES.IMAGE_SIZE", "64", "DATASETS.SHAPES.NUM_TRAIN", "12", "DATASETS.SHAPES.NUM_VAL", "1"),
    *("INPUT.DATASET_MAPPER_NAME", "coco_instance_detr", "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.RANDOM_FLIP", "none"),
    *("SOLVER.IMS_PER_BATCH", "4", "SOLVER.MAX_ITER", str(NUM_ITERATIONS), "SOLVER.STEPS", "()"),
    *("SOLVER.OPTIMIZER", "SGD", "SOLVER.BASE_LR", "0.02", "SOLVER.WARMUP_ITERS", "0"),
    *("DATASETS.TRAIN", "('shapes_pairs',)", "DATASETS.TEST", "()", "DATALOADER.NUM_WORKERS", "0", "SEED", "3"),
]


class GridPoints:
    """The same 8 x 8 points for every mask, so that processes need not draw the same random numbers."""

    def shared(self, device: torch.device) -> Tensor:
        """(64, 2) as (x, y)."""
        centers = (torch.arange(8, device=device) + 0.5) / 8
        return torch.cartesian_prod(centers, centers)

    def per_mask(self, logits: Tensor) -> Tensor:
        """(N, 64, 2)."""
        return self.shared(logits.device).expand(len(logits), -1, -1)


class GridTrainer(Trainer):
    """Trains on these points."""

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """The model of the configuration."""
        return DIMaskDINO(cfg, point_sampler=GridPoints())


def images_with_two_objects() -> list[dict[str, Any]]:
    """Images of shapes_train cut to two objects.

    Denoising pads its queries to the most objects of an image in the batch, and padding counts as background in the
    class loss, as in the releases. So batches divide evenly only if all images have equally many objects.
    """
    entries = [entry for entry in DatasetCatalog.get("shapes_train") if len(entry["annotations"]) >= 2]
    return [{**entry, "annotations": entry["annotations"][:2]} for entry in entries]


@mock.patch.object(fast_layers, "_ONEDNN", False)  # they round more: a ReLU may be open in one run alone
def main(args: argparse.Namespace) -> None:
    """Train, and write the record of every iteration as JSON."""
    cfg = load_config(args)
    register_all(cfg=cfg)
    if "shapes_pairs" not in DatasetCatalog.list():
        DatasetCatalog.register("shapes_pairs", images_with_two_objects)
        MetadataCatalog.get("shapes_pairs").thing_classes = list(SHAPES)
    seed_all_rng(cfg.SEED)
    trainer = GridTrainer(cfg)
    trainer.train()
    if comm.is_main_process():
        histories = trainer.storage.histories().items()
        record = {name: [value for value, _ in history.values()] for name, history in histories}
        (Path(cfg.OUTPUT_DIR) / "record.json").write_text(json.dumps(record))


def command(folder: Path, shapes: Path) -> list[str]:
    config = str(REPOSITORY / "configs" / "demo" / "dimaskdino_shapes.yaml")
    keys = [*OPTIONS, "OUTPUT_DIR", str(folder), "DATASETS.SHAPES.ROOT", str(shapes)]
    return ["--num-gpus", "0", "--config-file", config, *keys]


def test_two_processes_train_like_one(tmp_path: Path) -> None:
    launch(main, argument_parser().parse_args(command(tmp_path / "one", tmp_path / "shapes")))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", __name__]
    run = [sys.executable, *torchrun, *command(tmp_path / "two", tmp_path / "shapes")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(run, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    one, two = (json.loads((tmp_path / folder / "record.json").read_text()) for folder in ("one", "two"))
    terms = [name for name in one if name.startswith("loss_")]
    assert len(terms) > 20
    assert set(one) == set(two)
    for name in [*terms, "total_loss", "grad_norm"]:
        assert len(one[name]) == NUM_ITERATIONS
        # The first two differ by rounding alone, which then grows, more in gradients than in losses.
        assert two[name][:2] == pytest.approx(one[name][:2], rel=1e-5, abs=1e-6), name
        tolerance = 1e-3 if name == "grad_norm" else 1e-4
        assert two[name] == pytest.approx(one[name], rel=tolerance, abs=1e-6), name
    # Later losses come from updated weights.
    assert one["total_loss"][2] != pytest.approx(one["total_loss"][0], rel=1e-3)


if __name__ == "__main__":
    launch(main, argument_parser().parse_args())
