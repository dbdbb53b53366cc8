"""All released configurations, resolved: each trains a step and evaluates an image at a small size.

The data is generated in the layout of the public datasets: one image a split, with instance, panoptic and semantic
labels.
"""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from PIL import Image

from dimaskdino.config import Config, get_cfg
from dimaskdino.data import build_test_loader, build_train_loader, datasets, register_all
from dimaskdino.data.validation.start import check_datasets
from dimaskdino.evaluation import build_evaluator
from dimaskdino.modeling.meta_arch import build_model
from tests.test_configs import SMALL

RELEASED = json.loads(gzip.decompress((Path(__file__).parents[1] / "data" / "release_configs.json.gz").read_bytes()))
HEIGHT, WIDTH = 96, 128
SIZES = {
    **{"INPUT.IMAGE_SIZE": 64, "INPUT.MIN_SIZE_TRAIN": (64,), "INPUT.MIN_SIZE_TEST": 144, "INPUT.MAX_SIZE_TEST": 192},
    **{"DATALOADER.NUM_WORKERS": 0, "SOLVER.IMS_PER_BATCH": 2, "MODEL.RESNETS.NORM": "FrozenBN", "SEED": 1},
}
# What is scored by the kind of configuration, with a name's part.
SCORED = {
    "instance-": ["bbox", "segm"],
    "panoptic-": ["bbox", "segm", "panoptic_seg", "sem_seg"],
    "semantic-": ["sem_seg"],
    "dimaskdino": ["bbox", "segm"],
}


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def write_coco(folder: Path, rng: np.random.Generator) -> None:
    """A person in the upper left, category 200 below, and nothing elsewhere."""
    image = {"id": 1, "file_name": "1.jpg", "height": HEIGHT, "width": WIDTH}
    categories = [{key: each[key] for key in ("id", "name", "isthing")} for each in COCO_CATEGORIES]
    things = [each for each in categories if each["isthing"]]
    ids = np.zeros((HEIGHT, WIDTH, 3))
    ids[:40, :50, 0], ids[50:, :, 0] = 1, 2
    box = {"bbox": [0, 0, 50, 40], "segmentation": [[0, 0, 50, 0, 50, 40, 0, 40]], "area": 2000, "iscrowd": 0}
    segments = [{"id": 1, "category_id": 1, "iscrowd": 0}, {"id": 2, "category_id": 200, "iscrowd": 0}]
    for split in ("train2017", "val2017"):
        save(folder / split / "1.jpg", rng.integers(0, 256, (HEIGHT, WIDTH, 3)))
        save(folder / f"panoptic_{split}" / "1.png", ids)
        (folder / "annotations").mkdir(exist_ok=True)
        listed = {
            "instances": (things, [{"id": 1, "image_id": 1, "category_id": 1, **box}]),
            "panoptic": (categories, [{"image_id": 1, "file_name": "1.png", "segments_info": segments}]),
        }
        for kind, (classes, annotations) in listed.items():
            content = {"images": [image], "categories": classes, "annotations": annotations}
            (folder / "annotations" / f"{kind}_{split}.json").write_text(json.dumps(content))


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    write_coco(root / "coco", rng)
    labels = np.repeat(np.arange(8), WIDTH // 8) + np.zeros((HEIGHT, 1), dtype=int)
    folders = [(f"ADEChallengeData2016/{{}}/{split}", "1.jpg", "1.png") for split in ("training", "validation")]
    names = ("leftImg8bit", "gtFine_labelTrainIds")
    folders += [(f"cityscapes/{{}}/{split}/ulm", *(f"ulm_{name}.png" for name in names)) for split in ("train", "val")]
    for folder, image, label_map in folders:
        kinds = ("leftImg8bit", "gtFine") if "cityscapes" in folder else ("images", "annotations_detectron2")
        save(root / folder.format(kinds[0]) / image, rng.integers(0, 256, (HEIGHT, WIDTH, 3)))
        save(root / folder.format(kinds[1]) / label_map, labels)
    given = datasets._given_root
    register_all(root)
    yield
    datasets._given_root = given
    register_all()


def small(name: str) -> Config:
    cfg = get_cfg()
    cfg.merge_from_list([item for pair in (RELEASED[name] | SMALL | SIZES).items() for item in pair])
    if cfg.INPUT.CROP.ENABLED:
        cfg.INPUT.CROP.SIZE = (48, 48)
        cfg.INPUT.SIZE_DIVISIBILITY = min(cfg.INPUT.SIZE_DIVISIBILITY, 64)
    return cfg


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_configuration_trains_and_is_scored(name, tmp_path):
    cfg = small(name)
    check_datasets(cfg)
    torch.manual_seed(0)
    model = build_model(cfg).train()
    losses = model(next(iter(build_train_loader(cfg))))
    total = torch.stack(list(losses.values())).sum()
    assert total.isfinite()
    total.backward()
    (tested,) = cfg.DATASETS.TEST
    evaluator = build_evaluator(cfg, tested, str(tmp_path))
    evaluator.reset()
    with torch.no_grad():
        for batch in build_test_loader(cfg, tested):
            evaluator.process(batch, model.eval()(batch))
    (expected,) = [tasks for part, tasks in SCORED.items() if part in name.replace("-segmentation", "-")]
    assert list(evaluator.evaluate()) == expected
