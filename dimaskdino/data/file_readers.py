"""The readers that come with the package, for images that PIL cannot read or would cut to 8 bits."""

import importlib
from typing import Any

import cv2
import numpy as np
from detectron2.config import CfgNode

from dimaskdino.data.readers import READER_REGISTRY
from dimaskdino.errors import ConfigError


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
        _package("tifffile", "tiff", "TiffReader")

    def read(self, path: str) -> np.ndarray:
        """The first image of the file."""
        pixels = _package("tifffile", "tiff", "TiffReader").imread(path)
        is_planar = pixels.ndim == 3 and pixels.shape[0] == self._num_channels != pixels.shape[2]
        return np.moveaxis(pixels, 0, -1) if is_planar else pixels


@READER_REGISTRY.register()
class Hdf5Reader:
    """HDF5: ``scan.h5#group/name`` names an array (H, W) or (H, W, C), ``scan.h5`` the only one of a file."""

    extensions = (".h5", ".hdf5")

    def __init__(self, cfg: CfgNode) -> None:
        _package("h5py", "hdf5", "Hdf5Reader")

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
        with _package("h5py", "hdf5", "Hdf5Reader").File(file_name, "r") as file:
            name = name or (next(iter(file)) if len(file) == 1 else "")
            if name not in file:
                raise ValueError(f"name one of its arrays after #: {', '.join(list(file)[:5])}")
            return take(file[name])


def _package(name: str, extra: str, who: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"{who} needs the package {name}: pip install 'dimaskdino[{extra}]'.") from error
