"""A surgical lab: six classes, two folds by patient, the best by segm/AP, results per frame, reloaded without us."""

import json
import subprocess
import sys
from pathlib import Path

from dimaskdino.data.datasets.shapes import ShapesSpec, make_shapes
from tests.documentation import example
from tests.journeys.commands import run, train

LAB = """
from detectron2.data.datasets import register_coco_instances

register_coco_instances("lab", {}, "lab.json", "frames")
"""
RELOAD = """
import json, sys, torch
from pycocotools import mask
from safetensors.torch import load_file

found = json.load(open("found/coco_results.json"))
for each in found:
    assert mask.decode(each["segmentation"]).shape == (64, 64) and len(each["bbox"]) == 4 and 0 <= each["score"] <= 1
features = [load_file(path) for path in sys.argv[1:]]
assert sum(len(each["query_features"]) for each in features) == len(found) > 0
assert all(each["query_features"].shape[1] == 64 for each in features)
assert not [name for name in sys.modules if name.startswith("dimaskdino")]
"""


def test_surgical_lab(tmp_path: Path) -> None:
    made = make_shapes(tmp_path, ShapesSpec(num_train=12, num_val=1, image_size=64))
    (made / "train").rename(tmp_path / "frames")
    content = json.loads((made / "annotations" / "instances_train.json").read_text())
    for number, image in enumerate(content["images"]):
        image["patient"] = f"P{number // 3}"
    (tmp_path / "lab.json").write_text(json.dumps(content))
    (tmp_path / "lab.py").write_text(LAB)
    (tmp_path / "my_dice.py").write_text(example("docs/extend.md", "my_dice"))
    patients = {image["id"]: image["patient"] for image in content["images"]}

    data = ["DATASETS.TRAIN", "('lab',)", "DATASETS.TEST", "('lab',)", "DATASETS.FOLDS.NUM", 2]
    data += ["DATASETS.FOLDS.GROUP", "patient", "TEST.BEST_METRIC", "segm/AP", "TEST.EVALUATORS", "['Dice']"]
    schedule = ["SOLVER.MAX_ITER", 4, "TEST.EVAL_PERIOD", 2]
    tested = []
    for fold in range(2):
        folder = train(
            tmp_path, f"fold{fold}", *data, *schedule, "DATASETS.FOLDS.FOLD", fold, modules=("lab", "my_dice")
        )
        results = json.loads((folder / "inference" / "results.json").read_text())
        assert {"bbox", "segm", "Dice"} <= set(results)
        assert (folder / "model_best.pth").is_file()
        found = json.loads((folder / "inference" / "coco_instances_results.json").read_text())
        tested.append({patients[each["image_id"]] for each in found})
    assert not tested[0] & tested[1]
    assert tested[0] | tested[1] == set(patients.values())

    options = ["--weights", "fold0", "--import", "lab", "--score", 0, "--max-detections", 5, "--device", "cpu"]
    run(tmp_path, "tools/predict.py", "frames", *options, "--query-features", "--save", "coco", "--output", "found")
    features = sorted((tmp_path / "found").rglob("*.safetensors"))
    assert len(features) == len(content["images"])
    subprocess.run([sys.executable, "-c", RELOAD, *map(str, features)], cwd=tmp_path, check=True)
    source = ["--source", "found/coco_images.json", "--predictions", "found/coco_results.json"]
    run(tmp_path, "tools/convert_dataset.py", "--from", "coco", *source, "--to", "labelme", "--output", "to_correct")
    assert len(list((tmp_path / "to_correct").rglob("*.json"))) == len(content["images"])
