"""What turns an image's path into pixels: PIL, or readers for files that PIL cannot read, by INPUT.READER."""

import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data.detection_utils import convert_PIL_to_numpy
from fvcore.common.registry import Registry
from PIL import Image

from dimaskdino.data.images import Header, read_header, read_image
from dimaskdino.errors import ConfigError, DatasetError, UserError, check_choice, make_part, require

READER_REGISTRY = Registry("READER")
READER_REGISTRY.__doc__ = """
Readers of image files by INPUT.READER. Each is called as ``cls(cfg)`` and has ``read(path)``, which gives an array
(H, W) or (H, W, C) of any number type, and ``extensions``, those that INPUT.READER auto takes it for. It may have
``size(path)``, which gives (height, width) without reading all, and ``file(path)``, the file that must exist.
"""
AUTO = "auto"


class Reader(ABC):
    """Reads the images of a dataset."""

    @abstractmethod
    def read(self, path: str) -> np.ndarray:
        """(H, W, C): uint8 of 1 or 3 channels, or float32; raises DatasetError, naming the file."""

    @abstractmethod
    def header(self, path: str) -> Header:
        """Size and EXIF orientation, without more reading than needed; raises as :meth:`read`."""

    def file(self, path: str) -> str:
        """The file that must exist."""
        return path


class PilReader(Reader):
    """Reads what PIL can read, 8 bits a channel, by INPUT.FORMAT and INPUT.APPLY_EXIF.

    ``problem`` says why an image of this format cannot be used, "" if it can.
    """

    def __init__(self, image_format: str, *, apply_exif: bool = True, problem: str = "") -> None:
        self.image_format, self.apply_exif, self.problem = image_format, apply_exif, problem

    def read(self, path: str) -> np.ndarray:
        """See :func:`read_image`."""
        if self.problem:
            raise DatasetError(f"Image {path}: {self.problem}")
        return read_image(path, self.image_format, apply_exif=self.apply_exif)

    def header(self, path: str) -> Header:
        """See :func:`read_header`."""
        return read_header(path)


class _OwnReader(Reader):
    """A registered reader, with the form of what it gives checked."""

    def __init__(self, name: str, inner: Any, num_channels: int) -> None:
        self.name, self.inner, self.num_channels = name, inner, num_channels

    def read(self, path: str) -> np.ndarray:
        pixels = np.asarray(self._call("read", path))
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        problem = self._problem(pixels)
        if problem:
            raise DatasetError(f"Image {path}, as {self.name} (INPUT.READER) reads it, {problem}.")
        if pixels.dtype == np.uint8 and self.num_channels in (1, 3):
            return np.ascontiguousarray(pixels)
        return np.ascontiguousarray(pixels, dtype=np.float32)  # what resizes without PIL

    def header(self, path: str) -> Header:
        size = self._call("size", path) if hasattr(self.inner, "size") else self.read(path).shape[:2]
        try:
            height, width = map(int, size)
        except (TypeError, ValueError) as error:
            raise DatasetError(
                f"{self.name} (INPUT.READER) gives {size!r:.60} as size; give (height, width)."
            ) from error
        return Header((height, width), 1)

    def file(self, path: str) -> str:
        found = self._call("file", path) if hasattr(self.inner, "file") else path
        if not isinstance(found, str | os.PathLike):
            raise DatasetError(f"{self.name} (INPUT.READER) gives {found!r:.60} as file of {path}; give its path.")
        return str(found)

    def _call(self, method: str, path: str) -> Any:
        try:
            return getattr(self.inner, method)(path)
        except UserError:
            raise
        except FileNotFoundError as error:
            raise DatasetError(f"Image {path} does not exist; check the dataset's image folder.") from error
        except Exception as error:  # a reader of the user's may raise anything
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise DatasetError(f"{self.name} (INPUT.READER) cannot read image {path} ({reason}).") from error

    def _problem(self, pixels: np.ndarray) -> str:
        if pixels.ndim != 3 or 0 in pixels.shape or pixels.dtype.kind not in "uifb":
            return f"is a {pixels.dtype} array of shape {pixels.shape}; give numbers of shape (H, W) or (H, W, C)"
        if pixels.shape[2] != self.num_channels:
            return (
                f"has {pixels.shape[2]} channels, but MODEL.PIXEL_MEAN has {self.num_channels} numbers; give it and "
                "MODEL.PIXEL_STD a number for each channel"
            )
        return "" if np.isfinite(pixels).all() else "holds numbers that are not finite; replace them"


class _ByExtension(Reader):
    """Takes the reader of a path's extension, made when the first such path is met, and PIL for others."""

    def __init__(self, makers: Mapping[str, Callable[[], Reader]], other: Reader) -> None:
        self.makers, self.other = makers, other
        self._made: dict[str, Reader] = {}

    def _of(self, path: str) -> Reader:
        extension = os.path.splitext(path.partition("#")[0])[1].lower()
        if extension not in self.makers:
            return self.other
        if extension not in self._made:
            self._made[extension] = self.makers[extension]()
        return self._made[extension]

    def read(self, path: str) -> np.ndarray:
        return self._of(path).read(path)

    def header(self, path: str) -> Header:
        return self._of(path).header(path)

    def file(self, path: str) -> str:
        return self._of(path).file(path)


def image_reader(cfg: CfgNode) -> Reader:
    """The reader that INPUT.READER names; PIL where it is empty.

    Raises:
        ConfigError: no reader has that name, a package that it needs is missing, or a key about pixels is not valid.
    """
    problem = _check_pixel_keys(cfg)
    pil = PilReader(cfg.INPUT.FORMAT, apply_exif=cfg.INPUT.APPLY_EXIF, problem=problem)
    name = cfg.INPUT.READER
    if not name:
        if problem:
            raise ConfigError(problem)
        return pil
    check_choice("INPUT.READER", name, ["", AUTO, *(known for known, _ in READER_REGISTRY)])
    if name != AUTO:
        return _own_reader(name, cfg)
    makers = {
        extension: partial(_own_reader, known, cfg)
        for known, build in READER_REGISTRY
        for extension in getattr(build, "extensions", ())
    }
    return _ByExtension(makers, pil)


def _check_pixel_keys(cfg: CfgNode) -> str:
    """Check keys about pixels; returns why images that PIL reads cannot be used, which matters if there are any."""
    mean, std = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD
    if len(std) != len(mean):
        raise ConfigError(
            f"MODEL.PIXEL_MEAN has {len(mean)} numbers, MODEL.PIXEL_STD {len(std)}; give each one for every channel."
        )
    if min(std) <= 0:
        raise ConfigError(f"MODEL.PIXEL_STD is {list(std)}; give positive numbers.")
    try:
        shape = convert_PIL_to_numpy(Image.new("RGB", (1, 1)), cfg.INPUT.FORMAT).shape
    except ValueError as error:
        raise ConfigError(f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}; give RGB, BGR, L, or another mode of PIL.") from error
    if shape in ((1, 1, 1), (1, 1, len(mean))):  # one channel is normalized by each number
        return ""
    if len(shape) < 3:
        return f"INPUT.FORMAT {cfg.INPUT.FORMAT} gives no channels of 8 bits; give RGB, BGR, or L."
    return (
        f"INPUT.FORMAT {cfg.INPUT.FORMAT} gives {shape[2]} channels, but MODEL.PIXEL_MEAN has {len(mean)} numbers; "
        "give it and MODEL.PIXEL_STD a number for each channel, or change INPUT.FORMAT."
    )


def _own_reader(name: str, cfg: CfgNode) -> Reader:
    return _OwnReader(name, make_part("INPUT.READER", READER_REGISTRY.get(name), cfg), len(cfg.MODEL.PIXEL_MEAN))


def pad_value(cfg: CfgNode, of_pil: float) -> float:
    """What augmentations fill a canvas with: ``of_pil`` for images that PIL reads, else the mean of PIXEL_MEAN."""
    return float(np.mean(cfg.MODEL.PIXEL_MEAN)) if cfg.INPUT.READER else of_pil


@READER_REGISTRY.register()
class NumpyReader:
    """Arrays (H, W) or (H, W, C) that ``numpy.save`` wrote; nothing in a file is executed."""

    extensions = (".npy",)

    def __init__(self, cfg: CfgNode) -> None:
        pass

    def read(self, path: str) -> np.ndarray:
        """The array."""
        return np.load(path, allow_pickle=False)

    def size(self, path: str) -> tuple[int, int]:
        """From the header."""
        return np.load(path, mmap_mode="r", allow_pickle=False).shape[:2]


@READER_REGISTRY.register()
class OpenCvReader:
    """Pictures of 8 or 16 bits a channel, PNG and TIFF above all; three and four channels come as RGB and RGBA."""

    extensions = ()

    def __init__(self, cfg: CfgNode) -> None:
        pass

    def read(self, path: str) -> np.ndarray:
        """The pixels as stored."""
        # Not imread, which takes no names in other scripts on some systems.
        pixels = cv2.imdecode(np.fromfile(path, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
        if pixels is None:
            raise ValueError("OpenCV knows no picture in it")
        if pixels.ndim == 3 and pixels.shape[2] in (3, 4):
            pixels = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB if pixels.shape[2] == 3 else cv2.COLOR_BGRA2RGBA)
        return pixels


@READER_REGISTRY.register()
class TiffReader:
    """TIFF of any number type and number of channels: (H, W), (H, W, C), or planar (C, H, W)."""

    extensions = (".tif", ".tiff")

    def __init__(self, cfg: CfgNode) -> None:
        self._num_channels = len(cfg.MODEL.PIXEL_MEAN)
        require("tifffile", "TiffReader", "tiff", ConfigError)

    def read(self, path: str) -> np.ndarray:
        """The first image of the file."""
        pixels = importlib.import_module("tifffile").imread(path)
        is_planar = pixels.ndim == 3 and pixels.shape[0] == self._num_channels != pixels.shape[2]
        return np.moveaxis(pixels, 0, -1) if is_planar else pixels


@READER_REGISTRY.register()
class Hdf5Reader:
    """HDF5: ``scan.h5#group/name`` names an array (H, W) or (H, W, C), ``scan.h5`` the only one of a file."""

    extensions = (".h5", ".hdf5")

    def __init__(self, cfg: CfgNode) -> None:
        require("h5py", "Hdf5Reader", "hdf5", ConfigError)

    def read(self, path: str) -> np.ndarray:
        """The array."""
        return self._look(path, np.asarray)

    def size(self, path: str) -> tuple[int, int]:
        """From the header."""
        return self._look(path, lambda array: array.shape[:2])

    def file(self, path: str) -> str:
        """The path without the name of the array."""
        return path.partition("#")[0]

    def _look(self, path: str, take: Any) -> Any:
        file_name, _, name = path.partition("#")
        with importlib.import_module("h5py").File(file_name, "r") as file:
            name = name or (next(iter(file)) if len(file) == 1 else "")
            if name not in file:
                raise ValueError(f"name one of its arrays after #: {', '.join(list(file)[:5])}")
            return take(file[name])
