"""What the tests of several processes do there: each function runs in both processes of one job.

Starting a process takes seconds, so the tests share the job and look at what its functions return.
"""

import argparse
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils import comm
from PIL import Image
from torch import Tensor, nn

from dimaskdino import command_line
from dimaskdino.config import Config, get_cfg
from dimaskdino.data import build_train_loader, coco_file
from dimaskdino.data.datasets import register_all
from dimaskdino.data.datasets.registration import load_dataset
from dimaskdino.data.label_maps import read_segments
from dimaskdino.engine import Trainer, argument_parser, evaluate, setup
from dimaskdino.engine.hooks import average_running_statistics
from dimaskdino.engine.setup import check_datasets_once
from dimaskdino.engine.trainer import validation_losses
from dimaskdino.errors import UserError
from dimaskdino.evaluation import build_evaluator
from dimaskdino.modeling.registry import BATO_REGISTRY
from tests.documentation import REPOSITORY, example
from tests.engine.killing import Killed, train
from tests.engine.sharded import clip_sharded, shard
from tests.engine.toy import ToyDetector

Buffers = dict[str, Tensor]
MAX_ITER, CHECKPOINT_PERIOD, EVAL_PERIOD = 5, 2, 3


def main(args: argparse.Namespace) -> None:
    """Run every function below and save its result as FOLDER/NAME.RANK.pth."""
    register_all(cfg=args.cfg)
    for function in FUNCTIONS:
        result = function(args.cfg.clone(), args.folder)
        torch.save(result, args.folder / f"{function.__name__}.{comm.get_rank()}.pth")


def ranks(cfg: Config, folder: Path) -> dict[str, Any]:
    """What each process knows of the job."""
    found = {"rank": comm.get_rank(), "local": comm.get_local_rank(), "local_size": comm.get_local_size()}
    return {**found, "all": comm.all_gather(comm.get_rank())}


class ToyBatchNormDetector(ToyDetector):
    """With the one layer that has running statistics."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        self.norm = nn.BatchNorm1d(8)


if "ToyBatchNormDetector" not in META_ARCH_REGISTRY:
    META_ARCH_REGISTRY.register(ToyBatchNormDetector)


def buffers_of(model: nn.Module) -> Buffers:
    """By the last part of their names, which is unique in the toy."""
    return {name.rpartition(".")[2]: buffer.clone() for name, buffer in model.named_buffers()}


class KeepBuffers(HookBase):
    """Keeps the buffers of every iteration; as the first hook, it sees what this process alone has gathered."""

    def __init__(self) -> None:
        self.kept: dict[int, Buffers] = {}

    def after_step(self) -> None:
        """Keep them by the number of finished iterations."""
        self.kept[self.trainer.iter + 1] = buffers_of(self.trainer.model)


class RecordingTrainer(Trainer):
    """Keeps the buffers of the models that are evaluated."""

    evaluated: list[Buffers] = []

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict[str, Any]:
        """Keep, then evaluate."""
        cls.evaluated.append(buffers_of(model))
        return super().test(cfg, model, evaluators)


def train_with_batch_norm(cfg: Config, folder: Path) -> dict[str, Any]:
    """Train with other periods of saving and of evaluating, and return the buffers."""
    cfg.MODEL.META_ARCHITECTURE = "ToyBatchNormDetector"
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER = 4, (), MAX_ITER
    cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD = CHECKPOINT_PERIOD, EVAL_PERIOD
    cfg.OUTPUT_DIR = str(folder / "batch_norm")
    torch.manual_seed(cfg.SEED)
    trainer = RecordingTrainer(cfg)
    local = KeepBuffers()
    local.trainer = trainer
    trainer._hooks.insert(0, local)
    trainer.train()
    return {"local": local.kept, "evaluated": RecordingTrainer.evaluated}


def average_by_hand(cfg: Config, folder: Path) -> list[Buffers]:
    """Average layers of every kind, filled with values of this process."""
    rank = comm.get_rank()
    plain, without, frozen = nn.BatchNorm2d(2), nn.BatchNorm1d(2, track_running_stats=False), FrozenBatchNorm2d(2)
    for norm in (plain, frozen):
        norm.running_mean.copy_(torch.tensor([[1000.0, 2.0], [1006.0, 2.0]][rank]))
        norm.running_var.copy_(torch.tensor([[0.25, 3.0], [0.75, 5.0]][rank]))
    plain.num_batches_tracked.fill_(7 + rank)
    average_running_statistics(nn.Sequential(plain, without, frozen))
    average_running_statistics(nn.Sequential(without, frozen))
    return [buffers_of(norm) for norm in (plain, frozen)]


def start_from_own_folders(cfg: Config, folder: Path) -> list[str]:
    """The errors if only the main process has a checkpoint, or was given --resume."""
    cfg.OUTPUT_DIR = str(folder / str(comm.get_rank()))
    trainer = Trainer(cfg)  # Both processes take part in the making of one.
    if comm.is_main_process():
        Path(cfg.OUTPUT_DIR).mkdir()
        trainer.checkpointer.save("model_0000004", iteration=4)
    errors = []
    for start in (
        lambda: Trainer(cfg).resume_or_load(resume=True),
        lambda: Trainer(cfg).resume_or_load(resume=comm.is_main_process()),
        lambda: evaluate(cfg, resume=True),
    ):
        try:
            start()
        except UserError as error:
            errors.append(str(error))
    return errors


def import_modules(cfg: Config, folder: Path) -> list[Any]:
    """Set up a run with the modules that the documentation shows."""
    options = ["DATASETS.TRAIN", "('my_train',)", "DATASETS.TEST", "('my_val',)", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "3"]
    options += ["MODEL.MaskDINO.BATO.NAME", "MyBato", "OUTPUT_DIR", "imported"]
    command = ["--num-gpus", "0", "--import", "my_parts", "--import", "my_data", *options]
    os.chdir(folder)
    found = setup(argument_parser().parse_args(command))
    return [BATO_REGISTRY.get("MyBato").__name__, "my_train" in DatasetCatalog.list(), found.MODEL.MaskDINO.BATO.NAME]


def kill_and_resume(cfg: Config, folder: Path) -> list[dict[str, Tensor]]:
    """The weights of a run, and of the same run killed or stopped and resumed, once with a loader worker."""
    found = []
    for phase, kill_at, workers in (("whole", -1, 0), ("step", 6, 1), ("signal", 5, 0)):
        mine = resumable(cfg, folder / phase)
        if kill_at >= 0:
            with contextlib.suppress(Killed, SystemExit):
                train(mine, kill_at=kill_at, phase=phase)
            mine.DATALOADER.NUM_WORKERS = workers
        found.append(train(mine, resume=kill_at >= 0).step.model.state_dict())
    return found


def resumable(cfg: Config, output: Path) -> Config:
    """Eight iterations of two parts each, of a model that draws random numbers, in a folder of their own."""
    cfg = cfg.clone()
    cfg.merge_from_list(["MODEL.META_ARCHITECTURE", "RandomToyDetector", "INPUT.RANDOM_FLIP", "horizontal"])
    cfg.merge_from_list(["SOLVER.MAX_ITER", 8, "SOLVER.STEPS", (), "SOLVER.CHECKPOINT_PERIOD", 4])
    cfg.merge_from_list(["SOLVER.IMS_PER_BATCH", 4, "SOLVER.ACCUMULATION_STEPS", 2])
    cfg.merge_from_list(["DATASETS.TEST", (), "DATALOADER.ASPECT_RATIO_GROUPING", True, "OUTPUT_DIR", str(output)])
    return cfg


class RefusingToyDetector(ToyDetector):
    """Cannot match the objects of one image."""

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """As a matching whose costs are not finite."""
        if self.training and any(each["image_id"] == 3 for each in batched_inputs):
            raise FloatingPointError("The predictions of stage x for image 0 of the batch are not finite.")
        return super().forward(batched_inputs)


if "RefusingToyDetector" not in META_ARCH_REGISTRY:
    META_ARCH_REGISTRY.register(RefusingToyDetector)


def skip_together(cfg: Config, folder: Path) -> tuple[int, Any]:
    """Train on seven images, one of which a process at a time cannot match; returns skipped steps and weights."""
    cfg.MODEL.META_ARCHITECTURE, cfg.SOLVER.NONFINITE, cfg.DATASETS.TEST = "RefusingToyDetector", "skip", ()
    cfg.OUTPUT_DIR = str(folder / "skipped")
    torch.manual_seed(3)
    trainer = Trainer(cfg)
    trainer.train()
    return trainer.nonfinite.skipped, trainer.step.model.module.state_dict()


class NoisyTruth(nn.Module):
    """Finds the objects of an image with an error of its own, so that scores are neither 0 nor 100."""

    def __init__(self, entries: list[dict[str, Any]]) -> None:
        super().__init__()
        self.entries = {entry["image_id"]: entry for entry in entries}
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Boxes that are moved by up to 4 px; masks that fill them."""
        return [{"instances": self._find(image)} for image in batched_inputs]

    def _find(self, image: dict[str, Any]) -> Instances:
        draw = torch.Generator().manual_seed(image["image_id"])
        given = self.entries[image["image_id"]]["annotations"]
        corners = torch.tensor([each["bbox"] for each in given], dtype=torch.float32).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        corners += 4 * torch.rand(corners.shape, generator=draw)
        found = Instances((image["height"], image["width"]))
        found.pred_boxes = Boxes(corners)
        found.pred_classes = torch.tensor([each["category_id"] for each in given], dtype=torch.int64)
        # Few different scores, so that many are equal.
        found.scores = torch.randint(1, 4, (len(given),), generator=draw) / 4
        masks = torch.zeros(len(given), image["height"], image["width"], dtype=torch.bool)
        for mask, (left, top, right, bottom) in zip(masks, corners.int().tolist(), strict=True):
            mask[top:bottom, left:right] = True
        found.pred_masks = masks
        return found


def evaluate_together(cfg: Config, folder: Path) -> dict[str, Any]:
    """The scores of eight images, with and without more views of them, and the losses of a toy."""
    cfg.DATASETS.TEST, cfg.OUTPUT_DIR = ("shapes_train",), str(folder / "evaluated")
    cfg.merge_from_list(["TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (32,)])
    scores = Trainer.test_with_views(cfg, NoisyTruth(load_dataset("shapes_train")))
    torch.manual_seed(3)
    return {**scores, "loss": validation_losses(cfg, Trainer.build_model(cfg), "shapes_train")}


def segmentation_scores(cfg: Config, folder: Path) -> dict[str, Any]:
    """PQ, mIoU, and AP of wrong guesses on images of several processes, of the model's result and of a stage."""
    cfg = get_cfg()
    cfg.merge_from_file(str(REPOSITORY / "configs" / "demo" / "dimaskdino_panoptic_shapes.yaml"))
    cfg.merge_from_list(["DATASETS.SHAPES.ROOT", str(folder / "stuff"), "DATASETS.SHAPES.IMAGE_SIZE", 32])
    cfg.merge_from_list(["DATASETS.SHAPES.NUM_TRAIN", 1, "DATASETS.SHAPES.NUM_VAL", 5])
    with synchronized_making():
        register_all(cfg=cfg)
        entries = load_dataset("shapes_panoptic_val")
    output = folder / f"segmentation_{comm.get_world_size()}"
    evaluator = build_evaluator(cfg, "shapes_panoptic_val", str(output))
    evaluator.reset()
    # As the loaders share the images of a test set: each process has its own part of them.
    for number, entry in list(enumerate(entries))[comm.get_rank() :: comm.get_world_size()]:
        guess = wrong_guess(entry, number)
        evaluator.process([entry], [{**guess, "layers": {"layer.0": wrong_guess(entry, number + 7), "layer.1": guess}}])
    return evaluator.evaluate()


@contextlib.contextmanager
def synchronized_making() -> Iterator[None]:
    """Let the main process make files that the other ones then find."""
    if not comm.is_main_process():
        comm.synchronize()
    yield
    if comm.is_main_process():
        comm.synchronize()


def wrong_guess(entry: dict[str, Any], seed: int) -> dict[str, Any]:
    """The truth of an image, moved, with some classes exchanged and scores drawn."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.from_numpy(read_segments(entry).astype("int64")).roll(seed % 5, dims=1)
    segments = [{**each, "id": number} for number, each in enumerate(entry["segments_info"], start=1)]
    pixels = sum((ids == each["id"]) * number for number, each in enumerate(entry["segments_info"], start=1))
    for each in segments[:: 3 + seed % 2]:
        each["category_id"] = (each["category_id"] + 1) % 10
    classes = torch.zeros(len(segments) + 1, dtype=torch.int64)
    classes[1:] = torch.tensor([each["category_id"] for each in segments])
    things = [each for each in segments if each["category_id"] < 6]
    masks = torch.stack([pixels == each["id"] for each in things]) if things else torch.zeros(0, *ids.shape).bool()
    found = Instances(
        tuple(ids.shape),
        pred_boxes=BitMasks(masks).get_bounding_boxes(),
        pred_classes=torch.tensor([each["category_id"] for each in things], dtype=torch.int64),
        scores=torch.rand(len(things), generator=generator),
        pred_masks=masks,
    )
    sem_seg = nn.functional.one_hot(classes[pixels], 10).permute(2, 0, 1).float()
    return {"panoptic_seg": (pixels, segments), "sem_seg": sem_seg, "instances": found}


def evaluate_own(cfg: Config, folder: Path) -> dict[str, Any]:
    """The results of an evaluator that the documentation shows."""
    os.chdir(folder)
    command_line.import_modules(["my_dice"])
    return dice_of(cfg, folder / "own_evaluator")


def dice_of(cfg: Config, output: Path) -> dict[str, Any]:
    """Evaluate a model of known weights."""
    cfg.TEST.EVALUATORS, cfg.OUTPUT_DIR = ["Dice"], str(output)
    torch.manual_seed(0)
    return Trainer.test(cfg, Trainer.build_model(cfg).eval())


def start_with_shared_files(cfg: Config, folder: Path) -> dict[str, Any]:
    """How many files this process reads for the check and the loader of a training, and what it then has."""
    cfg.DATASETS.TEST, cfg.DATALOADER.ASPECT_RATIO_GROUPING = (), True
    coco_file.forget_files()
    with patch.object(coco_file, "read_json", wraps=coco_file.read_json) as read:
        check_datasets_once(cfg, train=True)
        loader: Any = build_train_loader(cfg)
    return {
        "reads": read.call_count,
        "entries": repr(list(loader.dataset._entries)),
        "indices": MetadataCatalog.get("shapes_train").thing_dataset_id_to_contiguous_id,
        "groups": loader.batch_sampler._group_of,
    }


FUNCTIONS = (
    start_with_shared_files,
    evaluate_own,
    evaluate_together,
    skip_together,
    ranks,
    average_by_hand,
    train_with_batch_norm,
    start_from_own_folders,
    import_modules,
    kill_and_resume,
    segmentation_scores,
    clip_sharded,
    shard,
)


def write_modules(folder: Path) -> None:
    """Write the modules that the documentation shows and the data that they name."""
    (folder / "my_parts.py").write_text(example("docs/extend.md", "my_parts"))
    (folder / "my_dice.py").write_text(example("docs/extend.md", "my_dice"))
    (folder / "my_data.py").write_text(example("datasets/README.md", "my_data"))
    (folder / "path/to/images").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(folder / "path/to/images/1.png")
    categories = [{"id": number, "name": f"class {number}"} for number in (1, 2, 3)]
    image = {"id": 1, "file_name": "1.png", "width": 4, "height": 4}
    objects = [
        {
            "id": n,
            "image_id": 1,
            "category_id": n,
            "bbox": [0, 0, 4, 4],
            "segmentation": [[0, 0, 4, 0, 4, 4]],
            "area": 8,
        }
        for n in (1, 2, 3)
    ]
    for split in ("train", "val"):
        coco = {"images": [image], "annotations": objects, "categories": categories}
        (folder / f"path/to/{split}.json").write_text(json.dumps(coco))
