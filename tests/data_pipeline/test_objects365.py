"""Objects365 is registered, and its class names and boxes come from its file."""

import json

import numpy as np
from detectron2.data import MetadataCatalog
from PIL import Image

from dimaskdino.config import get_cfg
from dimaskdino.data import build_mapper, build_train_loader, register_all
from dimaskdino.data.datasets.registration import load_dataset


def write(root) -> None:
    """One image with two objects, as the annotation file of version 2 lists them."""
    folder = root / "objects365"
    picture = "images/v1/patch8/objects365_v1_00420917.jpg"
    (folder / "train" / picture).parent.mkdir(parents=True)
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(folder / "train" / picture)
    box = {"image_id": 420917, "iscrowd": 0, "isfake": 0, "area": 200.0}
    content = {
        "images": [{"id": 420917, "file_name": picture, "height": 40, "width": 60}],
        "categories": [{"id": 1, "name": "Person"}, {"id": 2, "name": "Sneakers"}],
        "annotations": [
            {**box, "id": 1, "category_id": 2, "bbox": [10.0, 5.0, 20.0, 10.0]},
            {**box, "id": 2, "category_id": 1, "bbox": [0.0, 0.0, 60.0, 40.0]},
        ],
    }
    (folder / "annotations").mkdir()
    (folder / "annotations" / "zhiyuan_objv2_train.json").write_text(json.dumps(content))


def test_images_names_and_boxes_are_read(tmp_path) -> None:
    write(tmp_path)
    register_all(tmp_path)
    (entry,) = load_dataset("objects365_train")
    assert entry["file_name"].endswith("objects365/train/images/v1/patch8/objects365_v1_00420917.jpg")
    assert [each["category_id"] for each in entry["annotations"]] == [1, 0]
    assert MetadataCatalog.get("objects365_train").thing_classes == ["Person", "Sneakers"]


def test_boxes_are_trained_on_at_their_scale(tmp_path) -> None:
    write(tmp_path)
    register_all(tmp_path)
    cfg = get_cfg()
    cfg.merge_from_list(
        [
            *("DATASETS.TRAIN", ("objects365_train",), "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 2),
            *("INPUT.DATASET_MAPPER_NAME", "coco_detection_detr", "INPUT.RANDOM_FLIP", "none"),
            *("INPUT.MIN_SIZE_TRAIN", (80,), "SOLVER.IMS_PER_BATCH", 1, "DATALOADER.NUM_WORKERS", 0),
        ]
    )
    (given,) = next(iter(build_train_loader(cfg, with_masks=False)))
    assert given["image"].shape == (3, 80, 120)
    assert given["instances"].gt_boxes.tensor.tolist() == [[20, 10, 60, 30], [0, 0, 120, 80]]
    assert set(given["instances"].get_fields()) == {"gt_classes", "gt_boxes"}
    (entry,) = load_dataset("objects365_train")
    # The mapper is one of boxes even where nobody says so.
    assert not build_mapper(cfg, is_train=True)(entry)["instances"].has("gt_masks")
