"""A factory: 500 classes of thin overlapping tools, RLE labels, other weights, rare classes repeated, a CPU."""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as mask_util

from dimaskdino.data.datasets.shapes import ShapesSpec, make_shapes
from tests.journeys.commands import run, train

NUM_CLASSES, NUM_IMAGES, SIDE = 500, 10, 64
FACTORY = """
from detectron2.data.datasets import register_coco_instances

register_coco_instances("tools", {}, "tools.json", "photos")
"""


def draw(folder: Path) -> None:
    """Photos of thin tools that cross each other; class 0 is in all, class 499 in one."""
    (folder / "photos").mkdir()
    generator = np.random.default_rng(0)
    annotations = []
    for image_id in range(1, NUM_IMAGES + 1):
        photo = Image.new("RGB", (SIDE, SIDE), (90, 90, 90))
        for label in (0, 2, 499 if image_id == 1 else int(generator.integers(3, 400))):
            ends = generator.integers(4, SIDE - 4, 4).tolist()
            plane = Image.new("L", (SIDE, SIDE))
            ImageDraw.Draw(plane).line(ends, fill=1, width=3)
            ImageDraw.Draw(photo).line(ends, fill=tuple(generator.integers(120, 255, 3).tolist()), width=3)
            rle = mask_util.encode(np.asfortranarray(np.asarray(plane)))
            box, area = mask_util.toBbox(rle).tolist(), int(mask_util.area(rle))
            segmentation = {"size": [SIDE, SIDE], "counts": rle["counts"].decode()}
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image_id, "category_id": label + 1, "iscrowd": 0}
                | {"bbox": box, "area": area, "segmentation": segmentation}
            )
        photo.save(folder / "photos" / f"{image_id}.png")
    images = [{"id": n, "file_name": f"{n}.png", "height": SIDE, "width": SIDE} for n in range(1, NUM_IMAGES + 1)]
    categories = [{"id": n + 1, "name": f"tool {n}"} for n in range(NUM_CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "tools.json").write_text(json.dumps(content))
    (folder / "factory.py").write_text(FACTORY)


def test_factory(tmp_path: Path) -> None:
    draw(tmp_path)
    make_shapes(tmp_path / "shapes", ShapesSpec(num_train=4, num_val=1, image_size=64))
    shapes = ["DATASETS.SHAPES.ROOT", "shapes", "DATASETS.SHAPES.IMAGE_SIZE", 64, "DATASETS.SHAPES.NUM_TRAIN", 4]
    release = train(tmp_path, "release", *shapes, "DATASETS.SHAPES.NUM_VAL", 1, "SOLVER.MAX_ITER", 1)

    run(tmp_path, "tools/check_dataset.py", "tools", "--import", "factory")
    keys = [
        "DATASETS.TRAIN",
        "('tools',)",
        "DATASETS.TEST",
        "('tools',)",
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES",
        NUM_CLASSES,
    ]
    keys += ["MODEL.WEIGHTS", release / "model_final.pth", "MODEL.MaskDINO.NUM_OBJECT_QUERIES", 400]
    keys += ["MODEL.MaskDINO.FIRST_SELECTED_QUERIES", 400, "TEST.DETECTIONS_PER_IMAGE", 400, "SOLVER.MAX_ITER", 2]
    keys += ["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler", "DATALOADER.REPEAT_THRESHOLD", 0.5]
    # 400 queries are selected from as many tokens: photos are enlarged.
    keys += ["INPUT.MIN_SIZE_TEST", 160, "INPUT.MAX_SIZE_TEST", 160, "INPUT.IMAGE_SIZE", 160]
    folder = train(tmp_path, "run", *keys, modules=("factory",))
    scores = json.loads((folder / "inference" / "results.json").read_text())["segm"]
    of_classes = {name: value for name, value in scores.items() if name.startswith("AP-tool ")}
    assert len(of_classes) == NUM_CLASSES
    assert of_classes["AP-tool 0"] is not None
    assert of_classes["AP-tool 450"] is None  # no such object
    assert "tool 499" in (folder / "log.txt").read_text()

    options = ["--weights", "run", "--import", "factory", "--score", 0, "--device", "cpu", "--save", "coco"]
    run(tmp_path, "tools/predict.py", "photos", *options, "--output", "all")
    label = json.loads((tmp_path / "all" / "coco_results.json").read_text())[0]["category_id"]
    stricter = ["--score-class", f"tool {label - 1}=1.0", "--output", "some"]
    run(tmp_path, "tools/predict.py", "photos", *options, *stricter)
    found = json.loads((tmp_path / "some" / "coco_results.json").read_text())
    assert found
    assert not any(each["category_id"] == label for each in found)
