"""Reading image files, with errors that name the file."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.utils.file_io import PathManager
from PIL import Image, ImageFile

from dimaskdino.errors import DatasetError

Size = tuple[int, int]  # (height, width) in pixels

ORIENTATION_TAG = 0x0112  # of EXIF
_PNG_METADATA = {b"eXIf", b"tEXt", b"zTXt", b"iTXt"}  # chunks in which a PNG may have EXIF
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Header(NamedTuple):
    """What an image file says of itself."""

    stored: Size  # (height, width) of the pixels as stored
    orientation: int  # of EXIF, 2 to 8 where an upright picture needs the pixels turned or mirrored, else 1

    def size(self, *, apply_exif: bool) -> Size:
        """(height, width) of the picture as read."""
        return self.stored[::-1] if apply_exif and self.orientation >= 5 else self.stored


def read_image(file_name: str, image_format: str, *, apply_exif: bool = True) -> np.ndarray:
    """Read an image as (H, W, C) uint8, by INPUT.FORMAT (a mode of PIL, or "BGR") and INPUT.APPLY_EXIF.

    Raises:
        DatasetError: if the file is missing, is not a readable image, or has more than 8 bits a channel.
    """
    with _opened(file_name) as image:
        pixels = convert_PIL_to_numpy(upright(image) if apply_exif else image, image_format)
        return np.array(pixels)  # a copy: those of PIL cannot be written to, which torch warns of


def read_header(file_name: str, *, any_depth: bool = False) -> Header:
    """Read the size and orientation of an image without decoding it.

    Raises:
        DatasetError: as :func:`read_image`; with ``any_depth``, more than 8 bits a channel are no error.
    """
    with _opened(file_name, any_depth=any_depth) as image:
        # PIL decodes all pixels of a PNG to look for EXIF behind them.
        plain = image.format == "PNG" and _PNG_METADATA.isdisjoint(_png_chunks(image.fp))
        orientation = 1 if plain else _orientation(image)
        return Header((image.height, image.width), orientation)


def _png_chunks(file: Any) -> set[bytes]:
    """The names of the chunks of a PNG; leaves the file where it is."""
    place, names = file.tell(), set()
    file.seek(8)
    while len(head := file.read(8)) == 8:
        names.add(head[4:])
        file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
    file.seek(place)
    return names


@contextmanager
def _opened(file_name: str, *, any_depth: bool = False) -> Iterator[ImageFile.ImageFile]:
    if "://" not in file_name and not os.path.isfile(file_name) and os.path.exists(file_name):
        raise DatasetError(f"Image {file_name} is not a regular file; replace it with an image.")
    try:
        with PathManager.open(file_name, "rb") as file, Image.open(file) as image:
            # PIL clips integers of 16 and 32 bits to 255, and rounds floating-point values, mostly 0 to 1, to integers.
            if image.mode.startswith(("I", "F")) and not any_depth:
                raise DatasetError(
                    f"Image {file_name} has more than 8 bits a channel (PIL's mode {image.mode}), so that almost all "
                    "of it would become white or black; convert it to 8 bits, or set INPUT.READER OpenCvReader."
                )
            yield image
    except DatasetError:
        raise
    except FileNotFoundError as error:
        raise DatasetError(
            f"Image {file_name} does not exist; {backslash_hint(file_name)}check the dataset's image folder and the "
            "file names in its annotations."
        ) from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DatasetError(
            f"Cannot read image {file_name} ({error}); replace the file or take its image out of the annotations."
        ) from error


def upright(image: Image.Image) -> Image.Image:
    """An image turned as its EXIF orientation says; itself where it says nothing, or where PIL turns it (TIFF)."""
    method = _UPRIGHT.get(_orientation(image))
    return image if method is None else image.transpose(method)


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(ORIENTATION_TAG)
        if image.format == "TIFF" and orientation in _UPRIGHT:
            image.load()  # newer versions of Pillow turn a TIFF here, and then take the tag away
            orientation = image.getexif().get(ORIENTATION_TAG)
    except Exception:  # noqa: BLE001 - PIL raises errors of many kinds for malformed EXIF
        return 1
    return orientation if orientation in _UPRIGHT else 1


def size_problem(header: Header, listed: Size, *, apply_exif: bool) -> str:
    """What is wrong with the (height, width) that a dataset lists for an image; "" where it is that of the file."""
    size = header.size(apply_exif=apply_exif)
    if size == tuple(listed):
        return ""
    found = f"{size[1]}x{size[0]} (width x height), listed as {listed[1]}x{listed[0]}"
    if header.size(apply_exif=not apply_exif) != tuple(listed):
        return f"{found}; correct the size in the annotations or replace the image"
    when, turns, drawn = ("before", "turns", "pixels as stored") if apply_exif else ("after", "turned", "upright photo")
    return (
        f"{found}, its size {when} EXIF (orientation {header.orientation}) {turns} the photo; set INPUT.APPLY_EXIF "
        f"{not apply_exif} if the labels were drawn on the {drawn}"
    )


def backslash_hint(file_name: str) -> str:
    """Names the cause where a missing file has Windows' separators."""
    return "its file_name has backslashes, as on Windows: write / instead; " if "\\" in file_name else ""
