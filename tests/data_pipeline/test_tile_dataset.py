"""tools/tile_dataset.py: large pictures and their labels in tiles."""

import json
import re

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_util

from dimaskdino.data.cutting import cut_annotation
from tests.data_pipeline.scripts import run_script

SIZE = (40, 60)


def rle(mask: np.ndarray) -> dict:
    found = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": found["counts"].decode()}


def blob() -> np.ndarray:
    mask = np.zeros(SIZE, dtype=bool)
    mask[5:30, 10:50] = True
    mask[12:18, 20:30] = False
    return mask


@pytest.mark.parametrize("window", [(0, 0, 16, 16), (8, 12, 24, 28), (20, 40, 40, 60), (0, 0, 40, 60)])
def test_mask_is_cut_pixel_by_pixel(window: tuple[int, int, int, int]) -> None:
    top, left, bottom, right = window
    expected = blob()[top:bottom, left:right]
    found = cut_annotation({"segmentation": rle(blob()), "bbox": [10, 5, 40, 25], "occluded": 1}, SIZE, window)
    assert np.array_equal(mask_util.decode(found["segmentation"]), expected)
    assert (found["area"], found["occluded"]) == (expected.sum(), 1)
    rows, columns = np.flatnonzero(expected.any(1)), np.flatnonzero(expected.any(0))
    assert found["bbox"] == [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]


def test_polygons_stay_where_the_object_is_whole() -> None:
    annotation = {"segmentation": [[10, 5, 20, 5, 20, 15, 10, 15]], "bbox": [10, 5, 10, 10], "area": 100}
    whole = cut_annotation(annotation, SIZE, (0, 8, 32, 40))
    assert (whole["segmentation"], whole["bbox"], whole["area"]) == (
        [[2, 5, 12, 5, 12, 15, 2, 15]],
        [2, 5, 10, 10],
        100,
    )
    cut = cut_annotation(annotation, SIZE, (0, 16, 32, 40))
    assert (cut["bbox"], cut["area"]) == ([0, 5, 4, 10], 40)
    assert cut_annotation(annotation, SIZE, (0, 16, 32, 40), least_share=0.5) is None
    assert cut_annotation(annotation, SIZE, (0, 24, 32, 40)) is None


def test_boxes_are_cut() -> None:
    annotation = {"bbox": [10, 5, 10, 10], "area": 100}
    assert cut_annotation(annotation, SIZE, (0, 16, 32, 40)) == {"bbox": [0, 5, 4, 10], "area": 40}
    assert cut_annotation(annotation, SIZE, (0, 16, 32, 40), least_share=0.5) is None
    assert cut_annotation(annotation, SIZE, (20, 0, 40, 40)) is None


def test_tiles_cover_pictures_and_objects(tmp_path, monkeypatch, capfd):
    left = blob()
    left[:, 28:] = False
    pixels = np.random.default_rng(0).integers(0, 255, (*SIZE, 3), dtype=np.uint8)
    (tmp_path / "photos" / "a b").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "photos" / "a b" / "1.png")
    content = {
        "images": [{"id": 3, "file_name": "a b/1.png", "height": 40, "width": 60}],
        "annotations": [{"id": 1, "image_id": 3, "category_id": 4, "bbox": [10, 5, 40, 25], "segmentation": rle(left)}],
        "categories": [{"id": 4, "name": "roof"}],
    }
    (tmp_path / "train.json").write_text(json.dumps(content))
    options = ["--images", tmp_path / "photos", "--side", 16, "--overlap", 0, "--least-share", 0]
    command = ["--annotations", tmp_path / "train.json", "--output", tmp_path / "tiles", *options]
    assert run_script(monkeypatch, "tools/tile_dataset.py", *command) == 0
    assert "12 tiles, " in capfd.readouterr().out
    made = json.loads((tmp_path / "tiles" / "annotations.json").read_text())
    seen, covered = np.zeros_like(pixels), np.zeros(SIZE, dtype=bool)
    objects = {each["image_id"]: each for each in made["annotations"]}
    assert len(objects) == len(made["annotations"]) < len(made["images"])
    for image in made["images"]:
        place = (
            slice(image["top"], image["top"] + image["height"]),
            slice(image["left"], image["left"] + image["width"]),
        )
        seen[place] = np.asarray(Image.open(tmp_path / "tiles" / "images" / image["file_name"]))
        if image["id"] in objects:
            covered[place] |= mask_util.decode(objects[image["id"]]["segmentation"]).astype(bool)
    assert np.array_equal(seen, pixels)
    assert np.array_equal(covered, left)
    sound, image = content["annotations"][0], content["images"][0]
    for change, said in (
        ({"category_id": 9}, "Annotation 1 in .*train.json: category: unknown"),
        ({"segmentation": [[1, 2, 3]]}, "Annotation 1 in .*no polygon with three points"),
        ({"segmentation": None, "bbox": ["a", 1, 2, 3]}, "Annotation 1 in .*box: not four finite numbers"),
        ({"file_name": "a b/1.gif"}, "a b/1.png and a b/1.gif"),
    ):
        content["annotations"] = [] if "file_name" in change else [sound | change]
        content["images"] = [image, image | {"id": 4} | change] if "file_name" in change else [image]
        Image.fromarray(pixels).save(tmp_path / "photos" / "a b" / "1.gif")
        (tmp_path / "train.json").write_text(json.dumps(content))
        assert run_script(monkeypatch, "tools/tile_dataset.py", *command) == 2
        assert re.search(said, capfd.readouterr().err)
    content["annotations"], content["images"] = [], [image | {"file_name": str(tmp_path / "photos" / "a b" / "1.png")}]
    (tmp_path / "train.json").write_text(json.dumps(content))
    assert run_script(monkeypatch, "tools/tile_dataset.py", *command) == 0
    assert len(list((tmp_path / "photos").rglob("1*"))) == 2  # the tiles of an absolute path are below the output too
    content["images"] = [image]
    content["images"][0]["height"] = 41
    content["annotations"] = []
    (tmp_path / "train.json").write_text(json.dumps(content))
    assert run_script(monkeypatch, "tools/tile_dataset.py", *command) == 2
    assert "1.png is 60x40 px, listed as 60x41" in capfd.readouterr().err
