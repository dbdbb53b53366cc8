import json

from benchmarks.tiles import average_precision, make_mosaic, measure
from dimaskdino.data.datasets.shapes import ShapesSpec, make_shapes


def test_the_mosaic_holds_the_objects_of_its_pictures(tmp_path) -> None:
    folder = make_shapes(tmp_path, ShapesSpec(num_train=1, num_val=4, image_size=48))
    pictures, mosaic, truth, placed = make_mosaic(folder, 2)
    assert (mosaic[48:, :48] == pictures[2]).all()
    keys = ("image_id", "category_id", "bbox", "segmentation")
    perfect = [{key: each[key] for key in keys} | {"score": 1.0} for each in placed["annotations"]]
    assert len(perfect) == len(truth["annotations"]) > 0
    assert average_precision(placed, json.loads(json.dumps(perfect))) == {"box AP": 100.0, "mask AP": 100.0}
    assert 0 < average_precision(placed, perfect[::2])["mask AP"] < 100


def test_tiles_lose_little(tmp_path) -> None:
    folder = make_shapes(tmp_path, ShapesSpec(num_train=1, num_val=9))
    alone, tiles = measure(folder, 3, [0.5])
    assert alone["box AP"] > 30
    assert tiles["box AP"] > alone["box AP"] - 2
    assert tiles["mask AP"] > alone["mask AP"] - 2
