"""A mapping agency: large pictures cut to tiles, rotations, predicted whole, scored at 1,000 detections."""

import importlib.util
import json
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tests.journeys.commands import run, train

HEIGHT, WIDTH, ROOF = 160, 240, 12
AGENCY = """
from detectron2.data.datasets import register_coco_instances

register_coco_instances("tiles", {}, "tiles/annotations.json", "tiles/images")
register_coco_instances("maps", {}, "maps.json", "maps")
"""


def draw(folder: Path) -> None:
    """Two pictures with roofs; half of each is empty."""
    (folder / "maps").mkdir()
    annotations = []
    for image_id in (1, 2):
        picture = np.full((HEIGHT, WIDTH, 3), (40, 90, 40), dtype=np.uint8)
        for top in range(6, HEIGHT - ROOF, 26):
            for left in range(6, WIDTH // 2 - ROOF, 26):
                picture[top : top + ROOF, left : left + ROOF] = (180, 60 * image_id, 60)
                right, bottom = left + ROOF, top + ROOF
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": image_id, "category_id": 1, "iscrowd": 0}
                    | {"bbox": [left, top, ROOF, ROOF], "area": ROOF**2}
                    | {"segmentation": [[left, top, right, top, right, bottom, left, bottom]]}
                )
        Image.fromarray(picture).save(folder / "maps" / f"{image_id}.tif")
    images = [{"id": n, "file_name": f"{n}.tif", "height": HEIGHT, "width": WIDTH} for n in (1, 2)]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "roof"}]}
    (folder / "maps.json").write_text(json.dumps(content))
    (folder / "agency.py").write_text(AGENCY)


def test_mapping_agency(tmp_path: Path) -> None:
    draw(tmp_path)
    source = ["--annotations", "maps.json", "--images", "maps", "--side", 64, "--overlap", 0.1, "--output", "tiles"]
    said = run(tmp_path, "tools/tile_dataset.py", *source)
    assert " of them empty" in said
    assert "0 of them empty" not in said

    keys = ["DATASETS.TRAIN", "('tiles',)", "DATASETS.TEST", "('tiles',)", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 1]
    keys += ["INPUT.AUGMENTATIONS", "['Rotate90', 'Flip', {'LargeScaleJitter': {'size': 64, 'min_scale': 0.8}}]"]
    keys += ["DATALOADER.FILTER_EMPTY_ANNOTATIONS", False, "DATALOADER.NEGATIVE_SHARE", 0.2, "SOLVER.MAX_ITER", 4]
    train(tmp_path, "run", *keys, modules=("agency",))

    options = ["--weights", "run", "--import", "agency", "--score", 0, "--device", "cpu", "--save", "coco"]
    tiling = ["--tile", 64, "--overlap", 0.25, "--annotations", "maps.json"]
    run(tmp_path, "tools/predict.py", "maps", *options, *tiling, "--output", "found")
    results = tmp_path / "found" / "coco_results.json"
    truth = COCO(tmp_path / "maps.json")
    found = json.loads(results.read_text())
    assert {each["image_id"] for each in found} == {1, 2}
    evaluation = COCOeval(truth, truth.loadRes(found), "segm")
    evaluation.params.maxDets = [1, 100, 1000]
    evaluation.evaluate()
    evaluation.accumulate()
    assert np.isfinite(evaluation.eval["precision"][..., 0, -1]).all()
    if importlib.util.find_spec("rasterio"):
        write_place(tmp_path)
        run(tmp_path, "tools/predict.py", "placed", *options[:-2], "--tile", 64, "--save", "geojson", "--output", "map")
        (made,) = (tmp_path / "map").rglob("*.geojson")
        assert json.loads(made.read_text())["type"] == "FeatureCollection"


def write_place(folder: Path) -> None:
    """A picture with a place on the map."""
    import rasterio
    from rasterio.transform import from_origin

    pixels = np.asarray(Image.open(folder / "maps" / "1.tif")).transpose(2, 0, 1)
    (folder / "placed").mkdir()
    profile = {"driver": "GTiff", "height": HEIGHT, "width": WIDTH, "count": 3, "dtype": "uint8"}
    profile |= {"crs": "EPSG:32632", "transform": from_origin(500000, 5000000, 0.5, 0.5)}
    with rasterio.open(folder / "placed" / "1.tif", "w", **profile) as file:
        file.write(pixels)
