import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

from dimaskdino.errors import ConfigError, UserError
from dimaskdino.prediction.canvases import Canvas, open_canvas
from dimaskdino.prediction.outputs import geojson
from dimaskdino.prediction.results import Classes, Prediction
from dimaskdino.prediction.tiles import Tiling, merge_tiles, predict_tiles
from dimaskdino.structures import RleMasks

SIZE = (150, 200)


def components(tiles, *, masks: bool = True) -> list[Instances]:
    """A model that finds every connected bright region; red ones are of class 1."""
    found = []
    for tile in tiles:
        count, labels = cv2.connectedComponents((tile.max(2) > 128).astype(np.uint8))
        bitmaps = torch.from_numpy(labels)[None] == torch.arange(1, count)[:, None, None]
        result = Instances(tile.shape[:2], scores=0.5 + bitmaps.sum((1, 2)) / 1e5)
        result.pred_classes = torch.tensor([int(tile[mask.numpy()][0, 2] < 128) for mask in bitmaps], dtype=torch.int64)
        result.pred_boxes = RleMasks.of(bitmaps).get_bounding_boxes()
        if masks:
            result.pred_masks = RleMasks.of(bitmaps)
        found.append(result)
    return found


def picture(*boxes: tuple[int, int, int, int], red: tuple[int, ...] = ()) -> np.ndarray:
    image = np.zeros((*SIZE, 3), dtype=np.uint8)
    for number, (x0, y0, x1, y1) in enumerate(boxes):
        image[y0:y1, x0:x1] = (255, 0, 0) if number in red else 255
    return image


def find(image: np.ndarray, *, side: int = 64, overlap: float = 0.25, masks: bool = True) -> Instances:
    def predict(tiles):
        return components(tiles, masks=masks)

    return predict_tiles(open_canvas(image), Tiling(side, overlap), predict, batch_size=3)


def boxes(found: Instances) -> list[list[float]]:
    return sorted(found.pred_boxes.tensor.tolist())


def test_tiles_cover_the_picture_and_overlap() -> None:
    tiles = Tiling(64, 0.25).tiles(SIZE)
    covered = np.zeros(SIZE, dtype=int)
    for tile in tiles:
        assert (tile.bottom - tile.top, tile.right - tile.left) == (64, 64)
        covered[tile.top : tile.bottom, tile.left : tile.right] += 1
    assert covered.min() == 1
    assert all(b.left - a.left <= 48 for a, b in zip(tiles, tiles[1:], strict=False) if a.top == b.top)


def test_a_small_picture_is_one_tile_without_seams() -> None:
    (tile,) = Tiling(64, 0.25).tiles((40, 64))
    assert (tile.bottom, tile.right, any(tile.inner)) == (40, 64, False)


@pytest.mark.parametrize(("side", "overlap"), [(8, 0.2), (64, 1.0), (64, -0.1)])
def test_tiles_out_of_range_are_refused(side, overlap) -> None:
    with pytest.raises(ConfigError):
        Tiling(side, overlap)


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_objects_are_found_once_wherever_seams_are(masks, seed) -> None:
    # On a grid of 25 px, so that they do not touch; up to 20 px, larger than the overlap of 16.
    rng = np.random.default_rng(seed)
    expected = []
    for row, column in rng.permutation([(row, column) for row in range(6) for column in range(8)])[:20].tolist():
        width, height = rng.integers(4, 21, 2).tolist()
        expected.append((25 * column + 2, 25 * row + 2, 25 * column + 2 + width, 25 * row + 2 + height))
    found = find(picture(*expected), masks=masks)
    assert boxes(found) == sorted(map(list, expected))
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    if masks:
        assert np.array_equal(found.pred_masks.tensor.any(0).numpy(), picture(*expected).max(2) > 0)


@pytest.mark.parametrize("masks", [True, False])
def test_an_object_across_many_tiles_is_whole(masks) -> None:
    found = find(picture((3, 60, 197, 80), (90, 5, 110, 20)), masks=masks)
    assert boxes(found) == [[3, 60, 197, 80], [90, 5, 110, 20]]
    if masks:
        assert sorted(found.pred_masks.area().tolist()) == [300, 194 * 20]


def test_neighbors_of_another_class_stay_apart() -> None:
    # One beside the other; a tile in whose shared part both are sees two classes.
    assert len(find(picture((3, 60, 90, 80), (92, 60, 197, 80), red=(0,)))) == 2


# Two tiles, from x = 0 to 64 and from 48 to 112; each detection is (tile, left, right, score), and so is the result.
TWO_TILES = Tiling(64, 0.25).tiles((64, 112))


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize(
    ("detections", "expected"),
    [
        # The right tile sees all of it: it finds it too, it does not, or it is not asked.
        ([(0, 50, 60, 0.8), (1, 50, 60, 0.5)], [(50, 60, 0.8)]),
        ([(0, 50, 60, 0.8)], [(50, 60, 0.8 * (1 - 0.5 / 2))]),
        ([(0, 40, 60, 0.8)], [(40, 60, 0.8)]),
        # The seam at 64 cuts it, and the right tile does not see it, or finds nothing there.
        ([(0, 30, 64, 0.8)], [(30, 64, 0.7 * 0.8)]),
        ([(0, 52, 64, 0.8)], [(52, 64, 0.7 * 0.8 * (1 - 0.5 / 2))]),
        # A whole one replaces half of it, unless it is much less certain.
        ([(0, 52, 64, 0.9), (1, 52, 90, 0.6)], [(52, 90, 0.6)]),
        ([(0, 52, 64, 0.9), (1, 52, 90, 0.52)], [(52, 90, 0.52)]),
        ([(0, 52, 64, 0.9), (1, 52, 90, 0.48)], [(52, 64, 0.7 * 0.9)]),
        # Both seams cut it.
        ([(0, 20, 64, 0.8), (1, 48, 100, 0.45)], [(20, 100, 0.7 * 0.8)]),
        ([(0, 20, 64, 0.8), (1, 48, 100, 0.35)], [(20, 64, 0.7 * 0.8)]),
        # Where both see them, they have less than half in common.
        ([(0, 20, 55, 0.8), (1, 52, 100, 0.6)], [(20, 55, 0.8), (52, 100, 0.6)]),
    ],
)
def test_what_becomes_of_detections_beside_a_seam(detections, expected, masks) -> None:
    found = Instances((64, 112), pred_classes=torch.zeros(len(detections), dtype=torch.int64))
    found.scores = torch.tensor([score for *_, score in detections])
    found.pred_boxes = Boxes(torch.tensor([[left, 10.0, right, 30.0] for _, left, right, _ in detections]))
    if masks:
        bitmaps = torch.zeros(len(detections), 64, 112, dtype=torch.bool)
        for bitmap, (_, left, right, _) in zip(bitmaps, detections, strict=True):
            bitmap[10:30, left:right] = True
        found.pred_masks = RleMasks.of(bitmaps)
    joined = merge_tiles(found, np.array([tile for tile, *_ in detections]), TWO_TILES)
    shapes = joined.pred_masks.get_bounding_boxes() if masks else joined.pred_boxes
    assert shapes.tensor[:, ::2].tolist() == [[left, right] for left, right, _ in expected]
    assert joined.pred_boxes.tensor.tolist() == shapes.tensor.tolist()
    assert joined.scores.tolist() == pytest.approx([score for *_, score in expected], abs=1e-6)


def test_masks_are_as_large_as_the_picture() -> None:
    found = find(picture((3, 60, 197, 80)))
    assert found.image_size == SIZE
    assert found.pred_masks.size == SIZE


def test_an_empty_picture_has_no_objects() -> None:
    assert len(find(picture())) == 0
    assert len(find(picture(), masks=False)) == 0


def pieces(canvas: Canvas) -> np.ndarray:
    """The picture put together from four reads."""
    (height, width), image = canvas.size, np.zeros((*canvas.size, 3), np.uint8)
    for top, bottom in ((0, height // 3), (height // 3, height)):
        for left, right in ((0, width // 4), (width // 4, width)):
            image[top:bottom, left:right] = canvas.read(top, left, bottom - top, right - left)
    return image


def test_a_canvas_reads_what_is_in_the_file(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(image).save(tmp_path / "a.png", exif=exif)
    for source in (image, Image.fromarray(image)):
        assert np.array_equal(pieces(open_canvas(source)), image)
    assert np.array_equal(pieces(open_canvas(tmp_path / "a.png")), np.rot90(image, -1))
    assert np.array_equal(pieces(open_canvas(tmp_path / "a.png", exif=False)), image)
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.png"):
        open_canvas(tmp_path / "a.png")


@pytest.mark.parametrize("form", [np.asarray, Image.fromarray, lambda image: Image.fromarray(image).quantize(2)])
def test_the_copy_of_a_canvas_is_small(form) -> None:
    image = np.zeros((60, 9600, 3), dtype=np.uint8)
    image[:, 4800:] = 200
    copy = open_canvas(form(image)).copy()
    assert copy.shape == (15, 2400, 3)
    assert (copy[:, :1199] == 0).all()
    assert (copy[:, 1201:] == 200).all()


def test_a_picture_beyond_the_limit_of_pil_can_be_read(tmp_path, monkeypatch) -> None:
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert open_canvas(tmp_path / "a.png").size == (30, 40)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_tiff_without_rasterio_is_read_by_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rasterio", None)  # importing it fails
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "a.tif")
    canvas = open_canvas(tmp_path / "a.tif")
    assert np.array_equal(pieces(canvas), image)
    assert canvas.to_map is None


def test_geotiff_is_read_with_its_place(tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio")
    pytest.importorskip("rasterio.warp")
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    options = {"driver": "GTiff", "height": 30, "width": 40, "dtype": "uint8", "crs": "EPSG:32633"}
    options["transform"] = rasterio.transform.from_origin(400000, 5000000, 2, 2)
    for count in (1, 3, 4):
        bands = np.moveaxis(np.dstack((image, image[..., :1])), -1, 0)[:count]
        with rasterio.open(tmp_path / "a.tif", "w", count=count, **options) as file:
            file.write(bands)
        canvas = open_canvas(tmp_path / "a.tif")
        assert np.array_equal(pieces(canvas), image if count > 1 else np.dstack([image[..., 0]] * 3))
        assert canvas.to_map is not None
        assert canvas.to_map["transform"] == options["transform"]
        assert canvas.copy().shape == (30, 40, 3)
    found = Instances((30, 40), scores=torch.ones(1), pred_classes=torch.zeros(1, dtype=torch.int64))
    found.pred_masks = torch.zeros(1, 30, 40, dtype=torch.bool)
    found.pred_masks[0, 10:20, 5:25] = True
    prediction = Prediction({"instances": found}, image=image, canvas=canvas, classes=Classes(["roof"], [1]))
    (feature,) = geojson(prediction)["features"]
    ((ring,),) = feature["geometry"]["coordinates"]
    corner = rasterio.warp.transform("EPSG:32633", "OGC:CRS84", [400010], [4999980])
    assert min(abs(x - corner[0][0]) + abs(y - corner[1][0]) for x, y in ring) < 1e-7
    assert feature["properties"] == {"class": "roof", "score": 1.0}
    with rasterio.open(tmp_path / "a.tif", "w", count=1, photometric="MINISWHITE", **options) as file:
        file.write(bands[:1])
    for pixels in (pieces(open_canvas(tmp_path / "a.tif")), open_canvas(tmp_path / "a.tif").copy()):
        assert np.array_equal(pixels[..., 0], 255 - image[..., 0])
    with rasterio.open(tmp_path / "a.tif", "w", count=1, **(options | {"dtype": "uint16"})) as file:
        file.write(bands[:1].astype(np.uint16))
    with pytest.raises(UserError, match="uint16"):
        open_canvas(tmp_path / "a.tif")
    few = Image.fromarray(image).quantize(4)
    for colors in (few, few.convert("LAB"), few.convert("1")):  # of which rasterio gives what is stored
        colors.save(tmp_path / "a.tif")
        assert np.array_equal(pieces(open_canvas(tmp_path / "a.tif")), np.asarray(colors.convert("RGB")))
