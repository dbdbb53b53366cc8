"""Reading image files with errors that name the file."""

import os
from collections.abc import Collection

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


def check_images_exist(dataset: str, paths: Collection[str]) -> None:
    """Find images that are not there before a job that takes hours meets them.

    Folders are listed, which on network file systems takes a small part of asking for every file.

    Args:
        dataset: its name, for the error.
        paths: of images; those of other storage (``s3://...``) are not looked for.

    Raises:
        DatasetError: with the number of images that are missing, and the first.
    """
    local = [path for path in paths if "://" not in path]
    listed = {folder: _names_in(folder) for folder in {os.path.dirname(path) for path in local}}
    unlisted = [path for path in local if os.path.basename(path) not in listed[os.path.dirname(path)]]
    # A file system may take other names for a listed one, with letters of the other case for example.
    missing = [path for path in unlisted if not os.path.exists(path)]
    if missing:
        raise DatasetError(
            f"{len(missing)} of {len(paths)} images of dataset {dataset} do not exist, the first of them {missing[0]}; "
            "check the image folder, whether it was unpacked to the end, and the file names in the annotations."
        )


def _names_in(folder: str) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder or os.curdir))
    except OSError:
        return frozenset()


def _check_bit_depth(file_name: str) -> None:
    with PathManager.open(file_name, "rb") as file, Image.open(file) as image:
        # PIL would cut whole numbers of 16 and 32 bits off at 255, and round floating point numbers, most of them
        # between 0 and 1, to whole ones.
        if image.mode.startswith(("I", "F")):
            raise BitDepthError(
                f"Image {file_name} has more than 8 bits a channel (PIL's mode {image.mode}), so that almost all of it "
                "would become white or black; convert it to 8 bits."
            )
