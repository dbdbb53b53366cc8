"""Any transform of Albumentations by its name, as an augmentation of detectron2: dimaskdino[albumentations]."""

import difflib
import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T

from dimaskdino.errors import ConfigError


def find(name: str, unknown: str) -> Callable[..., T.Augmentation]:
    """A builder ``(cfg, **arguments)`` of a transform of Albumentations; ``unknown`` begins the error for another."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # Importing it would ask the network for its version.
    try:
        import albumentations
    except ImportError as error:
        raise ConfigError(
            f"{unknown}, and Albumentations' need that package: pip install 'dimaskdino[albumentations]'."
        ) from error
    known = {
        each: kind
        for each, kind in vars(albumentations).items()
        if isinstance(kind, type) and issubclass(kind, albumentations.BasicTransform)
    }
    if name not in known:
        closest = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {closest[0]} of Albumentations?" if closest else ", and Albumentations has none of it."
        raise ConfigError(f"{unknown}{hint}")

    def build(cfg: CfgNode, **arguments: Any) -> T.Augmentation:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=r"Argument\(s\)")  # which it does not know, and would leave out
            return _FromAlbumentations(name, known[name](**arguments))

    return build


class _FromAlbumentations(T.Augmentation):
    """Draws the random numbers of a transform once for an image, and applies the same to its objects."""

    def __init__(self, name: str, transform: Any) -> None:
        import albumentations as A

        super().__init__()
        self.name, self.transform = name, transform
        self.moves = not isinstance(transform, A.ImageOnlyTransform)
        points = A.KeypointParams(format="xy", remove_invisible=False)
        self._replay = A.ReplayCompose([transform], keypoint_params=points)

    def get_transform(self, image: np.ndarray) -> T.Transform:
        # Albumentations has generators of its own; the mapper's random numbers must follow from the run's seed.
        self._replay.set_random_seed(int(np.random.randint(2**31)))
        try:
            result = self._replay(image=image, keypoints=np.zeros((0, 2), np.float32))
        except Exception as error:  # Albumentations raises many kinds
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"INPUT.AUGMENTATIONS: {self.name} of Albumentations cannot be applied to an image of shape "
                f"{image.shape} and type {image.dtype} ({reason:.300})."
            ) from error
        if not self.moves:
            return T.ColorTransform(lambda _: result["image"])
        return _Replayed(result["replay"], result["image"], image.shape)

    def __repr__(self) -> str:
        return repr(self.transform)


class _Replayed(T.Transform):
    """What Albumentations did to an image, for its labels; objects are moved as masks."""

    by_pixels = True

    def __init__(self, replay: Any, image: np.ndarray, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.replay, self.image, self.shape = replay, image, shape

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        return self.image

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return self._again(mask=segmentation)["mask"]

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return np.asarray(self._again(keypoints=np.asarray(coords, np.float32))["keypoints"]).reshape(-1, 2)

    def _again(self, **labels: Any) -> dict[str, Any]:
        import albumentations as A

        labels.setdefault("keypoints", np.zeros((0, 2), np.float32))
        return A.ReplayCompose.replay(self.replay, image=np.zeros(self.shape, np.uint8), **labels)
