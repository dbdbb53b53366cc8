"""What people call an image, as the (H, W, 3) uint8 RGB array that the predictor works on."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data.detection_utils import convert_PIL_to_numpy
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dimaskdino.data.images import upright
from dimaskdino.data.pixels import pixels_after
from dimaskdino.data.readers import Reader
from dimaskdino.errors import UserError, check_choice

CHANNEL_ORDERS = ("RGB", "BGR")


def to_rgb(source: Any, *, channels: str = "RGB", exif: bool = True) -> np.ndarray:
    """Read or convert an image.

    Args:
        source: a path; a PIL image; an array (H, W) or (H, W, 1, 3 or 4); or a tensor (H, W) or (1, 3 or 4, H, W).
            Arrays and tensors are uint8, or floating point in [0, 1]. Gray is repeated, alpha dropped.
        channels: order of an array's or tensor's color channels, ``RGB`` or ``BGR`` (OpenCV's).
        exif: turn files and PIL images upright as their EXIF data says.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        UserError: the file is missing or not an image, or the values are not those of one.
    """
    if isinstance(source, str | os.PathLike):
        path = local_path(source)
        # PIL 13 garbles some TIFF files that it opens by name.
        with errors_of_file(path), path.open("rb") as file, Image.open(file) as image:
            return _from_pil(image, exif, str(path))
    if isinstance(source, Image.Image):
        with errors_of_decoding("The PIL image"):  # PIL decodes late
            return _from_pil(source, exif, "The PIL image")
    if isinstance(source, Tensor | np.ndarray):
        return _from_array(_channels_last(source), channels)
    raise UserError(f"An image is a path, a PIL image, an array or a tensor, not a {type(source).__name__}.")


def local_path(source: str | os.PathLike[str]) -> Path:
    """The path of an image; raises UserError for an address, which only readers of a user's own may take."""
    if "://" in str(source):
        raise UserError(f"{source} is an address, not a path; download the image first.")
    return Path(source)


@contextmanager
def errors_of_file(path: Path) -> Iterator[None]:
    """Turn what PIL raises for a file into a :class:`UserError`; refuse pipes and devices, which may never end."""
    with errors_of_decoding(str(path)):
        if path.exists() and not path.is_file():  # raises OSError for a name that is too long
            raise UserError(f"{path} is not a regular file; give the path of an image.")
        try:
            yield
        except FileNotFoundError as error:
            raise UserError(f"{path} does not exist; check the path.") from error


@contextmanager
def errors_of_decoding(name: str) -> Iterator[None]:
    """Turn what PIL raises for an image into a :class:`UserError` with its name."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} has too many pixels to be predicted whole; predict it in tiles (--tile).") from error
    except (OSError, SyntaxError, ValueError) as error:
        unknown = isinstance(error, UnidentifiedImageError)  # PIL names its file object there
        reason = "of no format that PIL knows" if unknown else " ".join(str(error).split())
        raise UserError(f"{name} cannot be read as an image ({reason}); replace or remove the file.") from error


def _from_pil(image: Image.Image, exif: bool, name: str) -> np.ndarray:
    check_depth(image, name)
    return np.asarray((upright(image) if exif else image).convert("RGB"))


def check_depth(image: Image.Image, name: str) -> None:
    """Raise UserError if an image has more than 8 bits a channel, as PIL cuts off what is above."""
    if image.mode.startswith(("I", "F")):
        raise UserError(f"{name} has more than 8 bits a channel (mode {image.mode}); convert it to 8 bits.")


def _channels_last(source: Tensor | np.ndarray) -> np.ndarray:
    """An array (H, W[, C]), or a tensor ([C,] H, W), as an array (H, W, C)."""
    if isinstance(source, Tensor):
        array = (source.float() if source.dtype == torch.bfloat16 else source).detach().cpu().numpy()
        source = array if array.ndim == 2 else np.moveaxis(array, 0, -1)
    return source[..., None] if source.ndim == 2 else source


def _from_array(array: np.ndarray, channels: str) -> np.ndarray:
    check_choice("channels", channels, CHANNEL_ORDERS)
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise UserError(
            f"An image of shape {array.shape} has no meaning; arrays are (H, W) or (H, W, 1, 3 or 4), tensors have "
            "their channels first."
        )
    if array.dtype != np.uint8:
        if array.dtype.kind != "f" or not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise UserError(
                f"An image of {array.dtype} must hold floating-point numbers from 0 to 1; convert it to uint8, 0 to "
                "255."
            )
        array = (array * 255).round().astype(np.uint8)
    colors = np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array[..., :3]
    return np.ascontiguousarray(colors if channels == "RGB" else colors[..., ::-1])


def of_own_kind(source: Any, reader: Reader, num_channels: int) -> np.ndarray:
    """An image (H, W, C) of what INPUT.READER reads, with ``num_channels`` channels.

    It is a path for the reader; an array (H, W) or (H, W, C); or a tensor (H, W) or (C, H, W). Raises UserError for
    something else.
    """
    if isinstance(source, str | os.PathLike):
        return reader.read(str(source))
    if not isinstance(source, Tensor | np.ndarray) or source.ndim not in (2, 3):
        raise UserError(f"With INPUT.READER, an image is a path, an array or a tensor, not a {type(source).__name__}.")
    array = _channels_last(source)
    if array.shape[2] != num_channels:
        raise UserError(f"An image has {array.shape[2]} channels, but MODEL.PIXEL_MEAN has {num_channels} numbers.")
    return np.ascontiguousarray(array, dtype=np.uint8 if array.dtype == np.uint8 and num_channels == 3 else np.float32)


def to_model_input(image: np.ndarray, resize: Any, image_format: str) -> dict[str, Any]:
    """What the model takes for an image (H, W, 3) uint8 RGB, resized by detectron2's augmentation for evaluation.

    ``image_format`` is INPUT.FORMAT, "BGR" or a mode of PIL; "" leaves the channels of an (H, W, C) image as they are.
    """
    height, width = image.shape[:2]
    converted = convert_PIL_to_numpy(Image.fromarray(image), image_format) if image_format else image
    tensor = pixels_after(np.ascontiguousarray(converted), [resize.get_transform(converted)])
    return {"image": tensor, "height": height, "width": width}
