"""Images and their refined results."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

from dimaskdino.errors import ConfigError, UserError
from dimaskdino.prediction.canvases import open_canvas
from dimaskdino.prediction.images import to_rgb
from dimaskdino.prediction.refinement import Refinement, clean_mask
from dimaskdino.structures import RleMasks

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)


def test_every_form_of_an_image_is_the_same_array(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    alpha = np.dstack((PIXELS, np.full((4, 6), 7, dtype=np.uint8)))
    tensor = torch.from_numpy(PIXELS).permute(2, 0, 1)
    forms = [tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(PIXELS), Image.fromarray(alpha)]
    for form in (*forms, PIXELS, alpha, tensor, tensor.float() / 255, PIXELS / 255.0):
        assert np.array_equal(to_rgb(form), PIXELS)
    for form in (PIXELS[..., ::-1], tensor.flip(0)):
        assert np.array_equal(to_rgb(form, channels="BGR"), PIXELS)
    for value in (0, 1):
        assert (to_rgb(torch.full((3, 4, 6), value, dtype=torch.bfloat16)) == 255 * value).all()


def test_gray_is_repeated() -> None:
    gray = PIXELS[..., 0]
    for form in (gray, gray[..., None], torch.from_numpy(gray), torch.from_numpy(gray)[None], Image.fromarray(gray)):
        assert np.array_equal(to_rgb(form), np.dstack([gray] * 3))


def test_exif_is_followed_as_asked(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned to the left: upright is a quarter turn to the right
    Image.fromarray(PIXELS).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(to_rgb(tmp_path / "a.png"), np.rot90(PIXELS, -1))
    assert np.array_equal(to_rgb(tmp_path / "a.png", exif=False), PIXELS)
    Image.fromarray(PIXELS[..., 0]).save(tmp_path / "a.tif", exif=exif)  # which PIL opens otherwise by name
    for pixels in (to_rgb(tmp_path / "a.tif"), open_canvas(tmp_path / "a.tif").copy()):
        assert np.array_equal(pixels[..., 0], np.rot90(PIXELS[..., 0], -1))


def test_files_that_are_no_images_are_named(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "whole.png")
    content = {"text.png": b"not an image", "empty.jpg": b"", "cut.png": (tmp_path / "whole.png").read_bytes()[:400]}
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    Image.fromarray(np.full((4, 4), 40000, dtype=np.uint16)).save(tmp_path / "deep.png")
    for name in (*content, "deep.png", "missing.png", "x" * 300):
        with pytest.raises(UserError, match=name) as error:
            to_rgb(tmp_path / name)
        assert "<" not in str(error.value)
    for read in (to_rgb, open_canvas):
        with pytest.raises(UserError, match="PIL image"):
            read(Image.open(tmp_path / "cut.png"))


def test_pipes_and_addresses_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for read in (to_rgb, open_canvas):
        with pytest.raises(UserError, match=r"pipe\.png is not a regular file"):
            read(tmp_path / "pipe.png")
        with pytest.raises(UserError, match="hf://owner/a.png is an address"):
            read("hf://owner/a.png")


@pytest.mark.parametrize(
    "value",
    [PIXELS / 200, PIXELS.astype(np.int32), np.full((4, 6, 3), np.nan), PIXELS[None], np.zeros((0, 6, 3), np.uint8), 7],
)
def test_values_that_are_no_image_are_refused(value) -> None:
    with pytest.raises(UserError):
        to_rgb(value)
    with pytest.raises(UserError, match="RGB, BGR"):
        to_rgb(PIXELS, channels="rgb")


NAMES = ["car", "bus", "van"]
SQUARES = [(0, 0, 6, 6), (1, 1, 7, 7), (20, 20, 26, 26), (0, 0, 6, 6)]


def found(masks: bool = True) -> Instances:
    """Squares of 6 px: two cars that overlap (IoU 25/47), a bus, and a van on the first car."""
    result = Instances((32, 32), scores=torch.tensor([0.9, 0.8, 0.5, 0.4]), pred_classes=torch.tensor([0, 0, 1, 2]))
    result.pred_boxes = Boxes(torch.tensor(SQUARES, dtype=torch.float32) + 0.25)
    if masks:
        result.pred_masks = torch.zeros(4, 32, 32, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(result.pred_masks, SQUARES, strict=True):
            mask[y0:y1, x0:x1] = True
    return result


def classes(refinement: Refinement, given: Instances | None = None) -> list[int]:
    return refinement(given or found(), NAMES).pred_classes.tolist()


def test_scores_below_the_threshold_go() -> None:
    assert classes(Refinement()) == [0, 0, 1, 2]
    assert classes(Refinement(score=0.45)) == [0, 0, 1]
    assert classes(Refinement(score=0.8)) == [0, 0]


def test_a_class_may_have_its_own_threshold() -> None:
    refinement = Refinement(score=0.85, class_scores={"van": 0.3})
    assert classes(refinement) == [0, 2]
    assert refinement.least_score == 0.3


def test_only_named_classes_stay() -> None:
    assert classes(Refinement(classes=["bus", "van"])) == [1, 2]
    assert classes(Refinement(classes="van")) == [2]
    assert classes(Refinement(max_detections=1)) == [0]


def test_segments_follow_the_classes_and_their_own_scores() -> None:
    ids = torch.tensor([[0, 1, 2, 3]], dtype=torch.int32)
    segments = [{"id": label + 1, "category_id": label, "score": 0.2} for label in range(3)]
    refinement = Refinement(score=0.9, class_scores={"car": 0.3, "bus": 0.1}, classes=["car", "bus"])
    kept, left = refinement.of_segments((ids, segments), NAMES)
    assert (kept.tolist(), kept.dtype, left) == ([[0, 0, 2, 0]], torch.int32, segments[1:2])
    assert torch.equal(Refinement(score=0.9).of_segments((ids, segments), NAMES)[0], ids)


@pytest.mark.parametrize("options", [{"classes": ["taxi"]}, {"class_scores": {"taxi": 0.5}}])
def test_unknown_classes_are_named_with_the_known_ones(options) -> None:
    with pytest.raises(ConfigError, match="taxi.*car, bus, van"):
        Refinement(**options).check(NAMES)


@pytest.mark.parametrize(
    "options",
    [{"score": 2}, {"mask_nms": float("nan")}, {"class_scores": {"car": -1}}, {"max_detections": 0}, {"min_area": -1}],
)
def test_numbers_out_of_range_are_named(options) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        Refinement(**options)


@pytest.mark.parametrize("masks", [True, False])
def test_suppression_removes_the_worse_of_one_class(masks) -> None:
    assert classes(Refinement(mask_nms=0.5), found(masks)) == [0, 1, 2]
    assert classes(Refinement(mask_nms=0.6), found(masks)) == [0, 0, 1, 2]


def test_a_suppressed_detection_suppresses_nothing() -> None:
    chain = found()[:3]
    chain.pred_classes[:] = 0
    chain.pred_masks[2] = False
    chain.pred_masks[2, 3:9, 3:9] = True  # IoU with the second 16/56, with the first 9/63
    assert len(Refinement(mask_nms=0.25)(chain, NAMES)) == 2


@pytest.mark.parametrize("form", [lambda masks: masks, RleMasks.of])
def test_cleaning_keeps_parts_and_drops_empty_objects(form) -> None:
    given = found()
    given.pred_masks[0, 30, 30] = True
    given.pred_masks[2] = False
    given.pred_masks[2, 30, 30] = True
    assert Refinement()(given, NAMES).pred_masks[0, 30, 30]
    given.pred_masks = form(given.pred_masks)
    result = Refinement(min_area=2, boxes_from_masks=True)(given, NAMES)
    assert result.pred_classes.tolist() == [0, 0, 2]
    assert type(result.pred_masks) is type(given.pred_masks)
    assert result.pred_boxes.tensor.tolist() == [list(SQUARES[index]) for index in (0, 1, 3)]


def test_the_largest_part_stays_with_its_holes() -> None:
    mask = np.zeros((9, 9), dtype=bool)
    mask[:5, :5] = True
    mask[2, 2] = False
    mask[7:, 7:] = True
    cleaned = clean_mask(mask, keep_largest=True, min_area=0)
    assert cleaned[:5, :5].sum() == 24
    assert cleaned.sum() == 24
    assert clean_mask(mask, keep_largest=False, min_area=4).sum() == 28
    assert not clean_mask(mask, keep_largest=True, min_area=25).any()
