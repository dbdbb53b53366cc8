import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dimaskdino.errors import UserError
from dimaskdino.prediction.canvases import open_canvas
from dimaskdino.prediction.images import to_rgb

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


def test_files_that_are_no_images_are_named(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "whole.png")
    content = {"text.png": b"not an image", "empty.jpg": b"", "cut.png": (tmp_path / "whole.png").read_bytes()[:400]}
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    Image.fromarray(np.full((4, 4), 40000, dtype=np.uint16)).save(tmp_path / "deep.png")
    for name in (*content, "deep.png", "missing.png"):
        with pytest.raises(UserError, match=name):
            to_rgb(tmp_path / name)


def test_pipes_and_addresses_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for read in (to_rgb, open_canvas):
        with pytest.raises(UserError, match=r"pipe\.png is not a regular file"):
            read(tmp_path / "pipe.png")
        with pytest.raises(UserError, match="hf://owner/a.png is an address"):
            read("hf://owner/a.png")


@pytest.mark.parametrize(
    "value",
    [PIXELS * 1.0, PIXELS.astype(np.int32), np.full((4, 6, 3), np.nan), PIXELS[None], np.zeros((0, 6, 3), np.uint8), 7],
)
def test_values_that_are_no_image_are_refused(value) -> None:
    with pytest.raises(UserError):
        to_rgb(value)
    with pytest.raises(UserError, match="RGB, BGR"):
        to_rgb(PIXELS, channels="rgb")
