"""Keys that follow from one's own data: datasets, classes, schedule, the model of a CPU."""

import json
import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.data import MetadataCatalog
from PIL import Image
from torch import nn

from dimaskdino.checkpoint import Checkpointer
from dimaskdino.checkpoint.dino import COCO_NAMES
from dimaskdino.config import Config
from dimaskdino.data.datasets import register_all
from dimaskdino.data.datasets.registration import load_dataset
from dimaskdino.data.validation.start import check_datasets
from dimaskdino.engine.setup import load_config
from dimaskdino.engine.writers import changed_settings
from dimaskdino.errors import ConfigError, DatasetError
from tests.data_pipeline.label_maps import write_panoptic
from tests.documentation import REPOSITORY

CLASSES = ("bolt", "nut", "washer")


def write_coco(path: Path, *, images: int, empty: int = 0) -> None:
    """Images of 8 px, all but the last ``empty`` with an object; the categories are not in the order of their ids."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / "photos").mkdir(exist_ok=True)
    for number in range(images):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path.parent / "photos" / f"{number}.png")
    box = {"bbox": [1, 1, 4, 4], "segmentation": [[1, 1, 5, 1, 5, 5]], "area": 8, "iscrowd": 0}
    coco = {
        "images": [{"id": n, "file_name": f"{n}.png", "width": 8, "height": 8} for n in range(images)],
        "annotations": [{"id": n + 1, "image_id": n, "category_id": n % 3 + 5, **box} for n in range(images - empty)],
        "categories": [{"id": 5 + n, "name": CLASSES[n]} for n in (2, 0, 1)],
    }
    path.write_text(json.dumps(coco))


@pytest.fixture
def own(tmp_path: Path) -> list[str]:
    """Keys of twelve images, one of them empty."""
    write_coco(tmp_path / "train.json", images=12, empty=1)
    return ["DATASETS.TRAIN_JSON", str(tmp_path / "train.json"), "DATASETS.TRAIN_IMAGES", str(tmp_path / "photos")]


def configured(*opts: str, config: str = "configs/own_data.yaml", num_gpus: int = 0) -> Config:
    return load_config(
        Namespace(config_file=str(REPOSITORY / config), opts=list(opts), eval_layers="", num_gpus=num_gpus, modules=[])
    )


def test_classes_datasets_and_schedule_follow_from_the_file(own: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        cfg = configured(*own, "SOLVER.AUTO_SCHEDULE.EPOCHS", "500")
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 3
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("own_train",), ("own_train",))
    # 500 passes over 11 images in batches of 4; the steps of the small model are at 0.6, 0.82 and 0.93 of its 1000.
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (1375, (825, 1128, 1279))
    assert cfg.SOLVER.CHECKPOINT_PERIOD == cfg.TEST.EVAL_PERIOD == 275
    for shown in ("11 images", "bolt, nut, washer", "MODEL.SEM_SEG_HEAD.NUM_CLASSES 3", "SOLVER.MAX_ITER 1375"):
        assert shown in caplog.text
    assert "DATASETS.VAL_JSON is empty" in caplog.text
    register_all(cfg=cfg)
    assert MetadataCatalog.get("own_train").thing_classes == list(CLASSES)
    assert [each["category_id"] for each in load_dataset("own_train")[1]["annotations"]] == [1]


def test_an_empty_folder_names_the_key(own: list[str], tmp_path: Path) -> None:
    cfg = configured(*own)
    for photo in (tmp_path / "photos").iterdir():
        photo.unlink()
    with pytest.raises(DatasetError, match=r"of dataset own_train do not exist.* check DATASETS\.TRAIN_IMAGES"):
        check_datasets(cfg)


def test_a_panoptic_file_is_told_where_it_belongs(own: list[str], tmp_path: Path) -> None:
    write_panoptic(tmp_path / "set")
    with pytest.raises(DatasetError, match=r"panoptic\.json is not in COCO's format.*DATASETS\.PANOPTIC"):
        configured(*own[2:], "DATASETS.TRAIN_JSON", str(tmp_path / "set" / "panoptic.json"))


def test_few_images_train_for_the_fewest_iterations(own: list[str]) -> None:
    cfg = configured(*own)
    assert cfg.SOLVER.MAX_ITER == 750  # 50 passes over 11 images are 138 batches
    assert configured(*own, "SOLVER.AUTO_SCHEDULE.MIN_ITER", "70").SOLVER.WARMUP_ITERS == 13


def test_keys_of_the_command_line_stay(own: list[str], tmp_path: Path) -> None:
    write_coco(tmp_path / "val" / "val.json", images=2)
    val = ["DATASETS.VAL_JSON", str(tmp_path / "val/val.json"), "DATASETS.VAL_IMAGES", str(tmp_path / "val/photos")]
    cfg = configured(*own, *val, "SOLVER.MAX_ITER", "7", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "9")
    assert (cfg.SOLVER.MAX_ITER, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES) == (7, 9)
    assert cfg.DATASETS.TEST == ("own_val",)
    register_all(cfg=cfg)
    assert len(load_dataset("own_val")) == 2


def test_model_of_a_cpu_is_small(own: list[str], tmp_path: Path) -> None:
    on_cpu, on_gpu = configured(*own), configured(*own, num_gpus=1)
    assert (on_cpu.MODEL.BACKBONE.NAME, on_cpu.MODEL.WEIGHTS) == ("build_timm_backbone", "")
    assert on_gpu.MODEL.BACKBONE.NAME == "build_resnet_backbone"
    assert configured(*own, "MODEL.WEIGHTS", "release.pth").MODEL.BACKBONE.NAME == "build_resnet_backbone"
    # The run's own file stands for itself.
    (tmp_path / "config.yaml").write_text(on_cpu.dump())
    again = load_config(
        Namespace(config_file=str(tmp_path / "config.yaml"), opts=[], eval_layers="", num_gpus=1, modules=[])
    )
    assert changed_settings(on_cpu.dump(), again.dump()) == []


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"DATASETS.TRAIN_IMAGES": ""}, ConfigError, "DATASETS.TRAIN_IMAGES is empty"),
        ({"DATASETS.TRAIN_JSON": ""}, ConfigError, "DATASETS.TRAIN_JSON is empty"),
        ({"DATASETS.TRAIN_JSON": "", "DATASETS.TRAIN_IMAGES": "", "DATASETS.VAL_JSON": "v"}, ConfigError, "TRAIN_JSON"),
        ({"DATASETS.TRAIN_JSON": "nowhere.json"}, DatasetError, "DATASETS.TRAIN_JSON names nowhere.json"),
        ({"DATASETS.TRAIN_IMAGES": "nowhere"}, DatasetError, "DATASETS.TRAIN_IMAGES names nowhere"),
        ({"SOLVER.AUTO_SCHEDULE.MIN_ITER": "0"}, ConfigError, "SOLVER.AUTO_SCHEDULE.MIN_ITER is 0"),
    ],
)
def test_mistakes_name_the_key(own: list[str], change: dict[str, str], error: type, named: str) -> None:
    keys = dict(zip(own[::2], own[1::2], strict=True)) | change
    with pytest.raises(error, match=named):
        configured(*(item for pair in keys.items() for item in pair))


class Heads(nn.Module):
    """The class weights of a model, by our names, and one other weight."""

    def __init__(self, num_classes: int, value: float) -> None:
        super().__init__()
        self.sem_seg_head = nn.ModuleDict({"predictor": nn.ModuleDict()})
        predictor: Any = self.sem_seg_head["predictor"]
        predictor["heads"] = nn.ModuleDict({"class_embed": nn.Linear(2, num_classes), "norm": nn.LayerNorm(2)})
        predictor["denoising"] = nn.ModuleDict({"label_embed": nn.Embedding(num_classes, 2)})
        for parameter in self.parameters():
            nn.init.constant_(parameter, value)


@pytest.mark.parametrize(("names", "kept"), [(COCO_NAMES, True), ([f"part {n}" for n in range(80)], False)])
def test_eighty_other_classes_do_not_inherit_cocos(names, kept, tmp_path, caplog):
    torch.save({"model": Heads(80, 1.0).state_dict()}, tmp_path / "release.pth")  # as a release, without class names
    model = Heads(80, 0.0)
    with caplog.at_level(logging.WARNING):
        Checkpointer(model, finetune=True, class_names=names).load(str(tmp_path / "release.pth"))
    values = {name: parameter.mean().item() for name, parameter in model.named_parameters()}
    of_classes = {values[name] for name in values if "class_embed" in name or "label_embed" in name}
    assert of_classes == {1.0 if kept else 0.0}
    assert values["sem_seg_head.predictor.heads.norm.weight"] == 1.0
    assert ("keep their initial values" in caplog.text) is not kept
