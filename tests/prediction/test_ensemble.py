"""tools/ensemble.py: the results of several runs, joined."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from pycocotools import mask as mask_util

from dimaskdino.config import get_cfg

SIZE = [40, 60]
BOXES = {1: [[5, 5, 20, 20], [30, 10, 20, 20]], 2: [[10, 4, 30, 30]]}  # by image


def mask(box: list[float], size: list[int] = SIZE) -> dict[str, Any]:
    rle = mask_util.frPyObjects(np.array([box], dtype=float), *size)[0]
    return {"size": size, "counts": rle["counts"].decode()}


def detection(image: Any, box: list[float], score: float, category: Any = 7, *, masks: bool = True) -> dict[str, Any]:
    found = {"image_id": image, "category_id": category, "bbox": box, "score": score}
    return found | ({"segmentation": mask(box)} if masks else {})


@pytest.fixture
def farm(tmp_path: Path) -> Iterator[Path]:
    """A dataset of two images with squares of one class."""
    objects = [(image, box) for image, boxes in BOXES.items() for box in boxes]
    content = {
        "images": [{"id": image, "file_name": f"{image}.png", "height": 40, "width": 60} for image in BOXES],
        "categories": [{"id": 7, "name": "field"}],
        "annotations": [
            {"id": number, "image_id": image, "category_id": 7, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            | {"segmentation": mask(box)}
            for number, (image, box) in enumerate(objects, start=1)
        ],
    }
    (tmp_path / "farm.json").write_text(json.dumps(content))
    register_coco_instances("ensemble_farm", {}, str(tmp_path / "farm.json"), str(tmp_path))
    yield tmp_path
    DatasetCatalog.remove("ensemble_farm")
    MetadataCatalog.pop("ensemble_farm", None)


def half_runs(folder: Path, **options: Any) -> list[Path]:
    """Two runs, each of which finds all objects of one image, and not the other's."""
    for name, image, other in (("a", 1, 2), ("b", 2, 1)):
        found = [detection(image, box, 0.9, **options) for box in BOXES[image]]
        found.append(detection(other, [0, 0, 4, 4], 0.1, **options))
        (folder / name / "inference").mkdir(parents=True)
        (folder / name / "inference" / "coco_instances_results.json").write_text(json.dumps(found))
    return [folder / "a", folder / "b"]


def write(path: Path, *found: Any) -> Path:
    path.write_text(json.dumps(list(found)))
    return path


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("method", ["wbf", "nms", "soft-nms"])
def test_two_halves_find_everything(run, farm: Path, method: str, masks: bool) -> None:
    runs, output = half_runs(farm, masks=masks), farm / "out"
    flags = ["--dataset", "ensemble_farm", "--output", output, "--method", method]
    done = run("tools/ensemble.py", *runs, *flags)
    assert done.status == 0, done.err
    scores = json.loads((output / "results.json").read_text())
    assert set(scores) == {*map(str, runs), "ensemble"}
    for task in ("bbox", "segm") if masks else ("bbox",):
        assert max(scores[str(each)][task]["AP"] for each in runs) < 70
        assert scores["ensemble"][task]["AP"] == pytest.approx(100)
    assert all(set(of_run) == ({"bbox", "segm"} if masks else {"bbox"}) for of_run in scores.values())
    assert "ensemble" in done.out
    found = json.loads((output / "coco_instances_results.json").read_text())
    assert len(found) == 5
    assert all(("segmentation" in each) == masks for each in found)


def test_the_first_runs_evaluation_describes_the_dataset(run, farm: Path) -> None:
    runs, cfg = half_runs(farm), get_cfg()
    cfg.DATASETS.TRAIN_JSON, cfg.DATASETS.TRAIN_IMAGES = str(farm / "farm.json"), str(farm)
    (farm / "a" / "inference" / "config.yaml").write_text(cfg.dump())
    (farm / "a" / "config.yaml").write_text(get_cfg().dump())
    done = run("tools/ensemble.py", *runs, "--dataset", "own_train", "--output", farm / "out")
    assert done.status == 0, done.err
    assert json.loads((farm / "out" / "results.json").read_text())["ensemble"]["bbox"]["AP"] == pytest.approx(100)


def test_weights_and_limit_of_results_files(run, tmp_path: Path) -> None:
    thin = detection(5, [30, 10, 9, 9], 0.4) | {"bbox": [30, 10, 0, 0.5]}
    one = write(tmp_path / "one.json", detection(5, [0, 0, 20, 20], 0.5), thin)
    box_of_mask = {key: value for key, value in detection(5, [4, 0, 20, 20], 0.5).items() if key != "bbox"}
    other = write(tmp_path / "other.json", box_of_mask)
    done = run("tools/ensemble.py", one, other, "--weights", 3, 1, "--max-detections", 1, "--output", tmp_path / "out")
    assert done.status == 0, done.err
    (found,) = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert (found["image_id"], found["category_id"], found["score"]) == (5, 7, 0.5)
    assert found["bbox"] == [1, 0, 20, 20]
    assert found["segmentation"] == mask([0, 0, 20, 20])  # three of four shares


def test_predictions_of_different_images_are_refused(run, tmp_path) -> None:
    for folder, name in (("one", "a.png"), ("two", "b.png")):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "coco_results.json", detection(1, [0, 0, 20, 20], 0.5))
        listed = {"images": [{"id": 1, "file_name": f"{folder}/{name}"}]}
        (tmp_path / folder / "coco_images.json").write_text(json.dumps(listed))
    done = run("tools/ensemble.py", tmp_path / "one", tmp_path / "two", "--output", tmp_path / "out")
    assert done.status == 2
    assert re.search(r"two/coco_images\.json: image 1 is b\.png.*a\.png", done.err)


def test_masks_that_some_runs_lack_are_left_out_aloud(run, tmp_path: Path, caplog) -> None:
    one = write(tmp_path / "one.json", detection(5, [0, 0, 20, 20], 0.5))
    other = write(tmp_path / "other.json", detection(5, [0, 0, 20, 20], 0.5, masks=False))
    done = run("tools/ensemble.py", one, other, "--output", tmp_path / "out")
    assert done.status == 0, done.err
    assert "Masks are left out: in the runs, in their order, [0, 1] detections have none." in caplog.text
    (found,) = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert "segmentation" not in found
    third = write(tmp_path / "third.json", detection(5, [0, 0, 20, 20], 0.5, category="7"))
    assert run("tools/ensemble.py", one, third, "--output", tmp_path / "out").status == 0
    assert "no category_id in common (they begin with [7, '7'])" in caplog.text


# What one detection has in place of the usual, by the word that the error shows.
ODD = {
    "category_id": {"category_id": [7]},
    "image_id": {"image_id": None},
    "width": {"bbox": [9, 9, -9, -9]},
    "pixels": {"bbox": [0, 0, 1e300, 1]},
    "size": {"segmentation": {"size": [-40, -60], "counts": [2400]}},
    "height": {"segmentation": {"size": [40, 60, 1], "counts": "x"}},
    "runs": {"segmentation": {"size": SIZE, "counts": [2**63 - 1, 2**63 - 1, 2402]}},
    "RLE": {"segmentation": []},
}


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["good.json", "good.json", "--weights", "1"], "--weights has 1 numbers for 2 runs"),
        (["good.json", "--weights", "-1"], "--weights"),
        (["good.json", "missing.json"], "missing.json cannot be read"),
        (["empty", "good.json"], "empty holds no results"),
        (["good.json", "others.json"], "no image in common"),
        (["good.json", "larger.json"], "image 1 have different sizes"),
        (["good.json", "dictionary.json"], "dictionary.json"),
        (["good.json", "shapeless.json"], "shapeless.json: detection number 2"),
        (["good.json", "score.json"], "score.json: detection number 1 has the score 1.5"),
        (["good.json", "polygons.json"], "polygons.json: detection number 1 has a mask"),
        (["good.json", "garbage.json"], "garbage.json: detection number 1 has a mask.*runs do not cover"),
        (["good.json", "others.json", "--dataset", "ensemble_farm"], "others.json: .*image 9"),
        (["good.json", "category.json", "--dataset", "ensemble_farm"], "category.json: .*category 8.*ensemble_farm"),
        (["good.json", "--dataset", "ensemble_frm"], "ensemble_frm"),
        (["good.json", "--weights", "1e308"], "--weights"),
        *((["good.json", f"{odd}.json"], rf"{odd}\.json: detection number 1 has .*{odd}") for odd in ODD),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_does_not_fit_is_named_in_one_line(run, farm: Path, flags: list[str], named: str) -> None:
    good = detection(1, [0, 0, 9, 9], 0.5)
    write(farm / "good.json", good)
    (farm / "empty").mkdir()
    write(farm / "others.json", detection(9, [0, 0, 9, 9], 0.5))
    write(farm / "larger.json", good | {"segmentation": mask([0, 0, 9, 9], [80, 60])})
    (farm / "dictionary.json").write_text('{"images": []}')
    write(farm / "shapeless.json", good, {"image_id": 1, "category_id": 7, "score": 0.5})
    write(farm / "score.json", good | {"score": 1.5})
    write(farm / "garbage.json", good | {"segmentation": {"size": SIZE, "counts": "garbage!!"}})
    write(farm / "polygons.json", good | {"segmentation": [[0, 0, 9, 0, 9, 9]]})
    write(farm / "category.json", good | {"category_id": 8})
    for name, odd in ODD.items():
        write(farm / f"{name}.json", good | odd)
    paths = [farm / flag if flag.endswith(".json") or flag == "empty" else flag for flag in flags]
    done = run("tools/ensemble.py", *paths, "--output", farm / "out")
    assert done.status == 2
    assert len(done.err.strip().splitlines()) == 1
    assert re.search(named, done.err), done.err
