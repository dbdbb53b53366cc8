"""Reading image files with errors that name the file."""

import numpy as np
from detectron2.data import detection_utils
from PIL import Image

from dimaskdino.errors import DatasetError


def read_image(file_name: str, image_format: str) -> np.ndarray:
    """Read an image, turned upright by its EXIF orientation.

    Args:
        file_name: path of the image.
        image_format: INPUT.FORMAT: a mode of PIL, or "BGR".

    Returns:
        (H, W, 3) uint8.

    Raises:
        DatasetError: if the file is missing or is no readable image.
    """
    try:
        return detection_utils.read_image(file_name, format=image_format)
    except FileNotFoundError as error:
        raise DatasetError(
            f"Image {file_name} does not exist; check the dataset's image folder and the file names in its annotations."
        ) from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DatasetError(
            f"Cannot read image {file_name} ({error}); replace the file or take its image out of the annotations."
        ) from error
