"""Pictures that are predicted in tiles: each is read piece by piece, and only a reduced copy is kept."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from dimaskdino.data.images import ORIENTATION_TAG, upright
from dimaskdino.errors import UserError
from dimaskdino.prediction.images import check_depth, errors_of_decoding, errors_of_file, local_path, to_rgb

LARGEST_COPY_PX = 2400  # longest side of the copy that is drawn on
GEO_SUFFIXES = frozenset((".tif", ".tiff"))
_LIMIT_LOCK = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """A picture of any size."""

    size: tuple[int, int]  # (height, width) in px
    # (top, left, height, width) to that piece, (height, width, 3) uint8 RGB
    read: Callable[[int, int, int, int], np.ndarray]
    # (width, height) to the whole picture at this size, (height, width, 3) uint8 RGB
    reduce: Callable[[tuple[int, int]], np.ndarray]
    # a mapping with "transform" and "crs" of a picture with a place on the map, as rasterio has them
    to_map: Mapping[str, Any] | None = None

    def copy(self) -> np.ndarray:
        """The picture, reduced to :data:`LARGEST_COPY_PX` if it is larger."""
        scale = min(1.0, LARGEST_COPY_PX / max(self.size))
        height, width = (max(1, round(side * scale)) for side in self.size)
        return self.reduce((width, height))


def open_canvas(source: Any, *, channels: str = "RGB", exif: bool = True) -> Canvas:
    """Open a picture for reading in pieces; arguments and errors as of :func:`to_rgb`.

    GeoTIFF is read by rasterio where that is installed, window by window; other files are decoded as a whole, into
    four bytes a pixel.
    """
    if isinstance(source, str | Path):
        path = local_path(source)
        with errors_of_file(path):
            if path.suffix.lower() in GEO_SUFFIXES and (canvas := _open_raster(path, exif)):
                return canvas
            with _opened(path) as image:
                return _of_pil(image, exif, str(path))
    if isinstance(source, Image.Image):
        with errors_of_decoding("The PIL image"):
            return _of_pil(source, exif, "The PIL image")
    array = to_rgb(source, channels=channels)
    return Canvas(
        size=array.shape[:2],
        read=lambda top, left, height, width: array[top : top + height, left : left + width],
        reduce=lambda size: (
            array if size == array.shape[1::-1] else cv2.resize(array, size, interpolation=cv2.INTER_AREA)
        ),
    )


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open a file of any number of pixels; PIL's limit is one of the whole process."""
    with path.open("rb") as file:
        with _LIMIT_LOCK:
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                image = Image.open(file)
            finally:
                Image.MAX_IMAGE_PIXELS = limit
        yield image


def _is_turned(path: Path) -> bool:
    """Whether PIL knows the file, and its EXIF data turns it."""
    try:
        with _opened(path) as image:
            return image.getexif().get(ORIENTATION_TAG, 1) != 1
    except (OSError, SyntaxError, ValueError):
        return False


def _of_pil(image: Image.Image, exif: bool, name: str) -> Canvas:
    check_depth(image, name)
    image = upright(image) if exif else image
    image.load()
    if image.mode in ("1", "P"):  # which PIL cannot reduce
        image = image.convert("RGB")

    def read(top: int, left: int, height: int, width: int) -> np.ndarray:
        return np.asarray(image.crop((left, top, left + width, top + height)).convert("RGB"))

    def reduce(size: tuple[int, int]) -> np.ndarray:
        factor = max(1, image.width // (2 * size[0]))  # first by a whole factor, which is quick
        return np.asarray(image.reduce(factor).convert("RGB").resize(size, Image.Resampling.BOX))

    return Canvas(size=(image.height, image.width), read=read, reduce=reduce)


def _open_raster(path: Path, exif: bool) -> Canvas | None:
    """A GeoTIFF by rasterio; None where that is not installed, or does not know the file, its colors, or its top."""
    try:
        import rasterio
    except ImportError:
        return None
    try:
        file = rasterio.open(path)
    except rasterio.errors.RasterioIOError:
        return None
    if any(kind != "uint8" for kind in file.dtypes):
        raise UserError(f"{path} has bands of {', '.join(sorted(set(file.dtypes)))}; convert them to 8 bits.")
    if file.colorinterp[0].name == "palette" or (file.photometric and file.photometric.name == "cielab"):
        return None  # rasterio gives what is stored, not its colors
    if exif and not file.crs and _is_turned(path):
        return None
    bands = [1, 2, 3] if file.count >= 3 else [1, 1, 1]
    inverted = np.uint8(255 * ("MINISWHITE" in file.tags(ns="IMAGE_STRUCTURE")))
    lock = threading.Lock()

    def read(top: int, left: int, height: int, width: int) -> np.ndarray:
        with lock:
            stored = file.read(bands, window=((top, top + height), (left, left + width)))
        return np.moveaxis(stored ^ inverted, 0, -1)

    def reduce(size: tuple[int, int]) -> np.ndarray:
        with lock:
            return np.moveaxis(file.read(bands, out_shape=(3, size[1], size[0])) ^ inverted, 0, -1)

    to_map = {"transform": file.transform, "crs": file.crs} if file.crs else None
    return Canvas(size=(file.height, file.width), read=read, reduce=reduce, to_map=to_map)
