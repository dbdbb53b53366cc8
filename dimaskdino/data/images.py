"""Reading image files with errors that name the file."""

import numpy as np
from detectron2.data import detection_utils
from detectron2.utils.file_io import PathManager
from PIL import Image

from dimaskdino.errors import DatasetError


class BitDepthError(DatasetError):
    """An image of more than 8 bits a channel."""


def read_image(file_name: str, image_format: str) -> np.ndarray:
    """Read an image, turned upright by its EXIF orientation.

    Args:
        file_name: path of the image.
        image_format: INPUT.FORMAT: a mode of PIL, or "BGR".

    Returns:
        (H, W, 3) uint8.

    Raises:
        DatasetError: if the file is missing or is no readable image.
        BitDepthError: if it has more than 8 bits a channel.
    """
    try:
        _check_bit_depth(file_name)
        return detection_utils.read_image(file_name, format=image_format)
    except FileNotFoundError as error:
        raise DatasetError(
            f"Image {file_name} does not exist; check the dataset's image folder and the file names in its annotations."
        ) from error
    except BitDepthError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DatasetError(
            f"Cannot read image {file_name} ({error}); replace the file or take its image out of the annotations."
        ) from error


def _check_bit_depth(file_name: str) -> None:
    with PathManager.open(file_name, "rb") as file, Image.open(file) as image:
        # PIL would cut whole numbers of 16 and 32 bits off at 255, and round floating point numbers, most of them
        # between 0 and 1, to whole ones.
        if image.mode.startswith(("I", "F")):
            raise BitDepthError(
                f"Image {file_name} has more than 8 bits a channel (PIL's mode {image.mode}), so that almost all of it "
                "would become white or black; convert it to 8 bits."
            )
