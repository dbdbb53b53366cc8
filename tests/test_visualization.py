"""Drawings: colors, places of masks, boxes, and labels, and the fonts of other scripts."""

import logging
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances
from PIL import Image

from dimaskdino import visualization
from dimaskdino.visualization import HALO, Objects, _patch, class_color, draw_objects, save_grid

GRAY = np.full((200, 300, 3), 51, dtype=np.uint8)
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def square(label: int = 2, *, boxes: bool = True, masks: bool = True, score: float | None = None) -> Objects:
    """One object from (50, 60) to (150, 140) on an image of 300 x 200."""
    mask = np.zeros((1, 200, 300), dtype=bool)
    mask[0, 60:140, 50:150] = True
    return Objects(
        classes=[label],
        names=["square"],
        scores=None if score is None else [score],
        boxes=np.array([[50.0, 60.0, 150.0, 140.0]]) if boxes else None,
        masks=mask if masks else None,
    )


def label_boxes(picture: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """Pixels (H, W) with exactly a label's color in rows that hold many of them."""
    same = (picture == color).all(-1)
    return same & (same.sum(axis=1, keepdims=True) > 15)


def test_a_mask_is_tinted_and_outlined_with_a_halo() -> None:
    picture = draw_objects(GRAY, square(boxes=False), width=300)
    color = np.array(class_color(2))
    np.testing.assert_allclose(picture[80, 60], 0.6 * 51 + 0.4 * color, atol=1)
    np.testing.assert_allclose(picture[100, 50], color, atol=40)  # smoothed
    on_white = draw_objects(np.full_like(GRAY, 255), square(boxes=False), width=300)
    assert (on_white[100, 46:50].max(axis=-1) < 80).any()  # the dark line outside
    np.testing.assert_array_equal(picture[20, 20], 51)
    assert (GRAY == 51).all()


def test_a_box_without_a_mask_is_outlined() -> None:
    picture = draw_objects(GRAY, square(masks=False), width=300)
    np.testing.assert_array_equal(picture[120, 50], class_color(2))
    assert (picture[120, 46:55] == HALO).all(-1).any()
    np.testing.assert_array_equal(picture[100, 100], 51)


def test_an_object_without_a_box_is_drawn_by_its_mask() -> None:
    objects = square()
    without = Objects(classes=objects.classes, names=objects.names, boxes=np.full((1, 4), np.nan), masks=objects.masks)
    expected = draw_objects(GRAY, square(boxes=False), width=300)
    np.testing.assert_array_equal(draw_objects(GRAY, without, width=300), expected)


def test_the_largest_object_is_drawn_first() -> None:
    small, large = np.zeros((2, 200, 300), dtype=bool)
    small[60:140, 60:140], large[20:180, 20:280] = True, True
    for order in ([0, 1], [1, 0]):
        masks = np.array([small, large])[order]
        objects = Objects(classes=np.array([0, 1])[order].tolist(), names=["small", "large"], masks=masks)
        np.testing.assert_allclose(draw_objects(GRAY, objects, width=300)[100, 60], class_color(0), atol=50)


def test_small_pictures_are_enlarged_and_long_ones_limited() -> None:
    nothing = Objects(classes=[], names=[])
    for size, drawn in (
        ((60, 80), (540, 720)),
        ((427, 640), (427, 640)),
        ((700, 800), (700, 800)),
        ((10, 3000), (10, 3000)),
        ((1, 600), (4, 2400)),
    ):
        assert draw_objects(np.zeros((*size, 3), np.uint8), nothing).shape[:2] == drawn


def test_a_class_keeps_its_color() -> None:
    assert len({class_color(index) for index in range(200)}) == 200
    by_class, by_instance = (
        draw_objects(GRAY, square(label=7, masks=False), width=300, by_instance=flag) for flag in (False, True)
    )
    np.testing.assert_array_equal(by_class[120, 50], class_color(7))
    np.testing.assert_array_equal(by_instance[120, 50], class_color(0))


def places(
    picture_size: tuple[int, int], boxes: list[list[float]], monkeypatch: pytest.MonkeyPatch
) -> list[list[float]]:
    """Corners xyxy of the labels that are drawn for boxes."""
    drawn: list[list[float]] = []
    find = visualization._free_place

    def note(candidates: Any, size: tuple[int, int], *others: Any) -> tuple[int, int] | None:
        place = find(candidates, size, *others)
        if place is not None:
            drawn.append([*place, place[0] + size[0], place[1] + size[1]])
        return place

    monkeypatch.setattr(visualization, "_free_place", note)
    count = len(boxes)
    objects = Objects(
        classes=list(range(count)), names=["wine glass"] * count, scores=[0.5] * count, boxes=np.array(boxes)
    )
    draw_objects(np.zeros((*picture_size, 3), np.uint8), objects, width=picture_size[1])
    return drawn


def test_labels_never_overlap_nor_leave_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    corners = rng.random((40, 2)) * [550, 350]
    boxes = np.concatenate([corners, corners + rng.random((40, 2)) * 80], axis=1)
    boxes[0] = [-50, -50, 5, 5]
    drawn = np.array(places((400, 600), boxes.tolist(), monkeypatch))
    assert len(drawn) > 30
    assert (drawn[:, :2] >= 0).all()
    assert (drawn[:, 2:] <= [600, 400]).all()
    first, second = drawn[:, None], drawn[None]
    meet = (np.minimum(first, second)[..., 2:] - np.maximum(first, second)[..., :2] > 0).all(-1)
    assert meet.sum() == len(drawn)  # each one meets itself alone


def test_a_label_without_room_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(places((30, 120), [[10, 10, 20, 20]] * 30, monkeypatch)) == 1


def test_a_segment_has_its_label_inside() -> None:
    ids = np.zeros((200, 300), dtype=np.int32)
    ids[:, :100], ids[:, 100:] = 7, 255
    objects = Objects.from_segments(ids, {7: 1, 9: 0}, ["sky", "sea"])
    assert (objects.names, objects.classes, objects.boxes) == (["sea"], [1], None)
    rows, columns = np.nonzero(label_boxes(draw_objects(GRAY, objects, width=300), class_color(1)))
    # The middle of the left third, whose outline has the same color.
    assert abs(np.median(rows) - 100) < 10
    assert abs(np.median(columns) - 50) < 10


@pytest.mark.parametrize("prefix", ["pred", "gt"])
def test_instances_are_read_with_or_without_masks(prefix: str) -> None:
    instances = Instances((20, 30))
    instances.set(f"{prefix}_boxes", Boxes(torch.tensor([[1.0, 2.0, 9.0, 8.0]])))
    instances.set(f"{prefix}_classes", torch.tensor([1]))
    if prefix == "pred":
        instances.scores = torch.tensor([0.5])
    objects = Objects.from_instances(instances, ["cat", "dog"])
    assert (objects.names, objects.masks) == (["dog"], None)
    assert objects.scores == ([0.5] if prefix == "pred" else None)
    mask = torch.ones(1, 20, 30, dtype=torch.bool)
    instances.set(f"{prefix}_masks", BitMasks(mask) if prefix == "gt" else mask)
    assert Objects.from_instances(instances, ["cat", "dog"]).masks.shape == (1, 20, 30)


@pytest.fixture
def clear_fonts() -> None:
    for cached in (visualization._font, visualization._font_file, visualization._warn_of_missing_glyphs):
        cached.cache_clear()


@pytest.mark.usefixtures("clear_fonts")
def test_a_system_font_draws_other_scripts(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    # A letter that DejaVu Sans lacks and STIX has, and both have digits.
    letter = chr(
        min(visualization._characters(FONTS / "STIXGeneral.ttf") - visualization._characters(FONTS / "DejaVuSans.ttf"))
    )
    monkeypatch.setattr(visualization, "_system_fonts", lambda: (FONTS / "broken.ttf", FONTS / "STIXGeneral.ttf"))
    objects = Objects(classes=[4], names=[letter], scores=[0.5])
    assert visualization._label(objects, 0) == f"{letter} 0.50"
    assert visualization._font(f"{letter} 0.50", 12).getname()[0].startswith("STIX")
    assert not caplog.records


@pytest.mark.usefixtures("clear_fonts")
def test_the_class_index_replaces_names_that_no_font_has(monkeypatch, caplog):
    monkeypatch.setattr(visualization, "_system_fonts", tuple)
    objects = Objects(classes=[4, 5], names=["螺栓", "螺母"], scores=[0.5, 0.4])
    with caplog.at_level(logging.INFO):
        assert [visualization._label(objects, index) for index in (0, 1)] == ["class 4 0.50", "class 5 0.40"]
    assert len(caplog.records) == 1
    assert "Noto Sans CJK" in caplog.text


def test_long_and_unprintable_names_become_one_short_line() -> None:
    objects = Objects(classes=[0, 0], names=["a\tb\n\x00 c", "x" * 1000])
    assert visualization._label(objects, 0) == "ab c"
    assert len(visualization._label(objects, 1)) == 28


def test_a_grid_has_a_row_for_each_image(tmp_path: Path) -> None:
    row = [GRAY, draw_objects(GRAY, square(score=0.9), width=300), np.full((400, 600, 3), 51, np.uint8)]
    save_grid([row], ["input", "truth", "found"], tmp_path / "one.png")
    save_grid([row, row], ["input", "truth", "found"], tmp_path / "two.png")
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "two.png") as two:
        assert (one.width, two.width) == (3 * 308 + 8, 3 * 308 + 8)
        assert two.height - one.height == 208
        pixels = np.asarray(one, dtype=int)
    colored = pixels.max(-1) - pixels.min(-1) > 50
    assert colored[:, 316:616].any()
    assert not colored[:, :316].any()
    assert not colored[:, 616:].any()


def test_titles_of_a_grid_do_not_overlap(tmp_path: Path) -> None:
    title = "a_run_with_a_name_of_its_own, last layer"
    for width in (300, 64):
        row = [np.full((20, width, 3), 255, np.uint8)] * 2
        save_grid([row], ["", title], tmp_path / "grid.png")
        with Image.open(tmp_path / "grid.png") as sheet:
            inked = np.flatnonzero((np.asarray(sheet) < 128).any((0, 2)))
        assert len(inked)
        assert inked.min() >= width + 16 - 1  # columns of the second picture alone
        assert inked.max() <= 2 * width + 16


@pytest.mark.parametrize("size", [(64, 48), (256, 192), (200, 150), (33, 20), (1, 1)])
def test_patch_is_the_nonempty_part_of_the_resized_mask(size) -> None:
    rows, columns = np.mgrid[:48, :64]
    for y, x, radius in ((10, 12, 8), (47, 63, 15), (24, 32, 60), (0, 0, 0)):
        mask = (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
        expected = cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)
        if size[0] > 64:  # enlarged ones are smooth
            sigma = visualization._SMOOTHING * size[0] / 64
            expected = cv2.GaussianBlur(expected, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)
        expected = expected > min(0.5, expected.max() / 2)
        left, top, patch = _patch(mask, size)
        whole = np.zeros((size[1], size[0]), dtype=np.uint8)
        whole[top : top + patch.shape[0], left : left + patch.shape[1]] = patch
        # The positions of interpolation are rounded to a 32nd of a pixel.
        assert (whole != expected).mean() < 0.004


def test_steps_of_an_enlarged_mask_are_smooth() -> None:
    rows, columns = np.mgrid[:60, :60]
    mask = rows + 2 * columns < 90  # an edge of slope two, which pixels render as steps
    left, top, patch = _patch(mask, (480, 480))
    edge = patch[160:320].sum(axis=1)  # of 160 rows, where it reaches from the left
    straight = np.polyval(np.polyfit(np.arange(160), edge, 1), np.arange(160))
    assert (left, top) == (0, 0)
    assert np.abs(edge - straight).max() <= 1.5
    one = np.zeros((60, 60), dtype=bool)
    one[30, 30] = True
    assert _patch(one, (480, 480))[2].sum() >= 32


def test_an_empty_mask_has_no_patch() -> None:
    assert _patch(np.zeros((4, 4), dtype=bool), (8, 8))[2].size == 0
