"""Reading images, and their way through augmentations."""

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from fvcore.transforms.transform import CropTransform, PadTransform
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngImageFile

from dimaskdino.config import Config
from dimaskdino.data import pixels as quick_pixels
from dimaskdino.data.images import read_header, read_image
from dimaskdino.data.pixels import augment, pixels_after
from dimaskdino.data.transforms import large_scale_jitter, shortest_edge
from dimaskdino.data.validation.files import check_files_exist
from dimaskdino.errors import DatasetError
from dimaskdino.seeds import SAMPLE, seeded

# Every value of 8 bits once.
RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        *(("1", "png"), ("L", "png"), ("LA", "png"), ("P", "png"), ("RGB", "png"), ("RGBA", "png")),
        *(("CMYK", "tif"), ("YCbCr", "tif")),
    ],
)
def test_8_bit_image_is_as_pil_reads_it(tmp_path: Path, mode: str, suffix: str) -> None:
    path = tmp_path / f"image.{suffix}"
    image = Image.fromarray(RAMP).convert(mode)
    image.save(path)
    assert Image.open(path).mode == mode
    assert np.array_equal(read_image(str(path), "RGB"), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(
    ("dtype", "suffix"), [(np.uint16, "png"), (np.uint16, "tif"), (">u2", "tif"), (np.int32, "tif"), ("f4", "tif")]
)
def test_image_of_more_bits_is_refused_with_its_mode(tmp_path: Path, dtype: str, suffix: str) -> None:
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray((RAMP * np.array(257)).astype(dtype)).save(path)
    mode = Image.open(path).mode
    with pytest.raises(DatasetError, match=rf"deep\.{suffix} .*mode {mode}\).*convert it to 8 bits") as error:
        read_image(str(path), "RGB")
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)  # as a data loader's process sends it


def test_missing_images_are_found_in_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, elsewhere = tmp_path / "there.png", tmp_path / "below" / "there.png"
    elsewhere.parent.mkdir()
    for path in (there, elsewhere):
        path.touch()
    monkeypatch.chdir(tmp_path)
    check_files_exist("mine", [str(there), str(elsewhere), "there.png", "below/../there.png", "s3://bucket/1.png"])
    gone = [str(tmp_path / "below" / "other.png"), str(tmp_path / "nowhere" / "there.png")]
    with pytest.raises(
        DatasetError, match=rf"2 of 3 images of dataset mine do not exist, the first of them {gone[0]};"
    ):
        check_files_exist("mine", [str(there), *gone])


def test_image_known_by_another_spelling_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "IMAGE.PNG").touch()
    is_file = os.path.isfile
    monkeypatch.setattr("os.path.isfile", lambda path: is_file(str(path).replace("image.png", "IMAGE.PNG")))
    check_files_exist("mine", [str(tmp_path / "image.png")])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("name", "options"), [("photo.jpg", {"quality": 100}), ("photo.tif", {})])
def test_exif_orientation_is_applied_or_ignored(tmp_path: Path, orientation: int, name: str, options) -> None:
    stored = Image.fromarray(np.repeat(np.repeat(RAMP[:2, :3], 16, 0), 16, 1))  # blocks that JPEG keeps apart
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / name, exif=exif, **options)
    with (tmp_path / name).open("rb") as file, Image.open(file) as image:
        image.load()  # newer versions of Pillow turn a TIFF here
        expected = {True: np.asarray(ImageOps.exif_transpose(image)), False: np.asarray(image)}
    header = read_header(str(tmp_path / name))
    for apply_exif, pixels in expected.items():
        assert np.array_equal(read_image(str(tmp_path / name), "L", apply_exif=apply_exif)[..., 0], pixels)
        assert header.size(apply_exif=apply_exif) == pixels.shape


@pytest.mark.parametrize("orientation", [1, 6])
def test_header_of_a_png_is_read_without_its_pixels(tmp_path: Path, orientation: int, monkeypatch) -> None:
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(RAMP[:4, :6]).save(file, "PNG", exif=exif if orientation > 1 else b"")
    content = file.getvalue()
    if orientation > 1:  # moved behind the pixels, where PIL finds it by decoding them
        start = content.index(b"eXIf") - 4
        end = start + 12 + int.from_bytes(content[start : start + 4], "big")
        content = content[:start] + content[end:-12] + content[start:end] + content[-12:]
    (tmp_path / "one.png").write_bytes(content)
    loaded = []
    load = PngImageFile.load
    monkeypatch.setattr(PngImageFile, "load", lambda image: loaded.append(image) or load(image))
    assert read_header(str(tmp_path / "one.png")) == ((4, 6), orientation)
    assert len(loaded) == (orientation > 1)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_what_is_not_a_file_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "one.png")
    for attempt in (lambda path: read_image(path, "RGB"), lambda path: check_files_exist("mine", [path])):
        with pytest.raises(DatasetError, match=r"one\.png"):
            attempt(str(tmp_path / "one.png"))


SIZES = ((37, 53), (64, 64), (90, 31))


def slowly(augmentations: T.AugmentationList, image: np.ndarray) -> tuple[Any, torch.Tensor]:
    """One transform after the other."""
    augmented = T.AugInput(image)
    transforms = augmentations(augmented)
    return transforms, torch.from_numpy(np.array(augmented.image.transpose(2, 0, 1)))


@pytest.mark.parametrize("flip", ["none", "horizontal", "vertical"])
@pytest.mark.parametrize("default", [large_scale_jitter, shortest_edge])
@pytest.mark.parametrize("kind", ["uint8", "uint8 without the op", "one channel", "float32"])
def test_pixels_and_transforms_are_those_of_detectron2(
    cfg: Config, monkeypatch: pytest.MonkeyPatch, default: Any, flip: str, kind: str
) -> None:
    if kind == "uint8 without the op":
        monkeypatch.setattr(quick_pixels, "COMPILED", False)
    cfg.merge_from_list(["INPUT.RANDOM_FLIP", flip, "INPUT.IMAGE_SIZE", 80, "INPUT.CROP.ENABLED", True])
    cfg.merge_from_list(["INPUT.MIN_SIZE_TRAIN", (24, 150), "INPUT.MIN_SCALE", 0.2, "INPUT.CROP.SIZE", [20, 30]])
    cfg.INPUT.CROP.TYPE = "absolute_range"
    augmentations = T.AugmentationList(default(cfg))
    generator = np.random.default_rng(0)
    points = generator.uniform(0, 30, (5, 2))
    sides = set()
    for place in range(30):
        image = generator.integers(0, 256, (*SIZES[place % 3], 1 if kind == "one channel" else 3)).astype(np.uint8)
        image = image.astype(np.float32) if kind == "float32" else image
        with seeded(1, SAMPLE, place):
            transforms, expected = slowly(augmentations, image.copy())
        with seeded(1, SAMPLE, place):
            ours, found = augment(augmentations, image)
        assert torch.equal(found, expected)
        assert found.dtype == expected.dtype
        assert found.is_contiguous()
        np.testing.assert_array_equal(ours.apply_coords(points.copy()), transforms.apply_coords(points.copy()))
        sides.add(expected.shape[1:])
    assert len(sides) == 1 if default is large_scale_jitter else len(sides) > 3


needs_op = pytest.mark.skipif(not quick_pixels.COMPILED, reason="the op is not built")


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_op), False])
def test_windows_of_resized_images_are_those_of_detectron2(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    # Without the other way: a fallback would give the same pixels.
    monkeypatch.setattr(quick_pixels, *(("_resized_window", None) if compiled else ("COMPILED", False)))
    generator = np.random.default_rng(0)
    for _ in range(200):
        # Pillow 13 changes the height first where it shrinks more than twice as much as the width.
        height, width, new_height, new_width = generator.integers(2, 300, 4)
        y, x = generator.integers(0, (new_height, new_width))
        image = generator.choice((0, 1, 128, 254, 255), (height, width, 3)).astype(np.uint8)
        image.flags.writeable = False
        window = [
            T.ResizeTransform(height, width, new_height, new_width),
            CropTransform(x, y, *generator.integers(1, 150, 2)),
            PadTransform(1, 2, 3, 4, pad_value=128),
        ]
        expected = T.TransformList(window).apply_image(image)
        np.testing.assert_array_equal(pixels_after(image, window), expected.transpose(2, 0, 1))


@needs_op
@pytest.mark.parametrize(("corner", "kind"), [((-1, 0), torch.uint8), ((0, 3), torch.uint8), ((0, 0), torch.float32)])
def test_a_window_lies_in_the_resized_image(corner: tuple[int, int], kind: torch.dtype) -> None:
    image, canvas = torch.zeros(4, 4, 3, dtype=kind), torch.zeros(3, 6, 6, dtype=torch.uint8)
    with pytest.raises((ValueError, TypeError), match="resize_window"):
        torch.ops.dimaskdino.resize_window(image, (8, 8), corner, False, False, canvas)


def test_an_augmentation_that_looks_at_pixels_gets_them(cfg: Config) -> None:
    seen = []

    class Looks(T.Augmentation):
        def get_transform(self, image: np.ndarray) -> T.Transform:
            seen.append(image.copy())
            return T.NoOpTransform()

    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    flip = T.RandomFlip(prob=1.0)
    augment(T.AugmentationList([flip, Looks(), flip]), image)
    np.testing.assert_array_equal(seen[0], image[:, ::-1])
