"""The picture grid: where masks and boxes land."""

from pathlib import Path

import numpy as np
from PIL import Image

from dimaskdino.visualization import Objects, Row, class_colour, save_grid
from dimaskdino.visualization import _with_masks as with_masks


def one_square(side: int = 20) -> Objects:
    masks = np.zeros((1, side, side), dtype=bool)
    masks[0, 5:15, 5:15] = True
    return Objects(masks=masks, boxes=np.array([[5.0, 5.0, 15.0, 15.0]]), texts=["square 0.90"], classes=[2])


def nothing(side: int = 20) -> Objects:
    return Objects(masks=np.zeros((0, side, side), dtype=bool), boxes=np.zeros((0, 4)), texts=[], classes=[])


def test_masks_tint_their_inside_colour_their_rim_and_leave_the_rest() -> None:
    image = np.full((20, 20, 3), 51, dtype=np.uint8)
    picture = with_masks(image, one_square(), num_classes=6)
    colour = class_colour(2, 6)
    np.testing.assert_allclose(picture[10, 10], 0.55 * 0.2 + 0.45 * colour)
    np.testing.assert_allclose(picture[5, 10], colour)
    np.testing.assert_allclose(picture[2, 2], 0.2)
    assert image[10, 10, 0] == 51


def test_classes_have_different_colours() -> None:
    colours = {tuple(class_colour(index, 80)) for index in range(80)}
    assert len(colours) == 80


def test_a_grid_is_written_with_a_row_for_every_image_even_without_objects(tmp_path: Path) -> None:
    image = np.zeros((20, 20, 3), dtype=np.uint8)
    rows = [Row(image=image, truth=one_square(), found=nothing()), Row(image=image, truth=nothing(), found=nothing())]
    save_grid(rows, tmp_path / "one.png", num_classes=6)
    save_grid(rows * 2, tmp_path / "two.png", num_classes=6)
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "two.png") as two:
        assert one.width == two.width
        assert two.height > 1.7 * one.height
        # The truth of the first row, and nothing of its prediction, is coloured.
        third = one.width // 3
        pixels = np.asarray(one.convert("RGB"), dtype=int)
        saturation = pixels.max(-1) - pixels.min(-1)
        assert saturation[:, third : 2 * third].max() > 100
        assert saturation[:, 2 * third + 5 :].max() == 0
