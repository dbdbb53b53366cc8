"""A tiny ``shapes`` dataset and configurations for it, and the results of one job of two processes."""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dimaskdino.command_line import import_modules
from dimaskdino.config import Config, get_cfg
from dimaskdino.data.datasets import register_all
from dimaskdino.data.validation.start import check_datasets
from dimaskdino.engine import HOOK_REGISTRY, launch
from dimaskdino.evaluation import EVALUATOR_REGISTRY
from tests.documentation import example
from tests.engine import job, toy  # noqa: F401  toy registers ToyDetector


def make_toy_cfg(shapes_root: Path, output_dir: Path) -> Config:
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
            *("SEED", 1, "LOG.PICTURES", 0, "OUTPUT_DIR", str(output_dir)),
        ]
    )
    register_all(cfg=cfg)
    return cfg


@pytest.fixture
def toy_cfg(shapes_root: Path, tmp_path: Path) -> Config:
    """See :func:`make_toy_cfg`; the run is ``tmp_path / "run"``."""
    return make_toy_cfg(shapes_root, tmp_path / "run")


@pytest.fixture(scope="module")
def own_parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Import the modules of the documentation; what they register is forgotten afterwards."""
    folder, path = tmp_path_factory.mktemp("own_parts"), list(sys.path)
    sys.path.insert(0, str(folder))
    for name in ("my_dice", "my_hook"):
        (folder / f"{name}.py").write_text(example("docs/extend.md", name))
        import_modules([name])
    yield
    sys.path[:] = path
    for registry, name in ((EVALUATOR_REGISTRY, "Dice"), (HOOK_REGISTRY, "CountObjects")):
        registry._obj_map.pop(name)
    for name in ("my_dice", "my_hook"):
        del sys.modules[name]


@pytest.fixture(scope="session")
def job_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the two processes write."""
    return tmp_path_factory.mktemp("job")


@pytest.fixture(scope="session")
def of_two_processes(shapes_root: Path, job_folder: Path) -> Callable[[str], list[Any]]:
    """Results of one function of :mod:`tests.engine.job`, from each of two processes on the CPU.

    For test_job.py alone: `make test` shares out whole files, and the process of another one would run the job again.
    """
    cfg = make_toy_cfg(shapes_root, job_folder / "run")
    check_datasets(cfg)  # Makes the images, which only one process should do.
    job.write_modules(job_folder)
    args = argparse.Namespace(num_gpus=0, num_machines=1, machine_rank=0, dist_url="auto", folder=job_folder, cfg=cfg)
    launch(job.main, args, cpu_processes=2)
    return lambda name: [torch.load(job_folder / f"{name}.{rank}.pth") for rank in range(2)]
