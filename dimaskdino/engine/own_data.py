"""The keys that follow from one's own data (DATASETS.TRAIN_JSON) and from the machine; each is logged."""

import logging
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from dimaskdino.config import Config
from dimaskdino.data.coco_file import Json, annotations_by_image, category_names, has_objects
from dimaskdino.data.datasets.own import own_name, read_own, register_own
from dimaskdino.data.shared import once_a_machine
from dimaskdino.errors import ConfigError

logger = logging.getLogger(__name__)

EVALUATIONS = 5  # and checkpoints, of an automatic schedule
LONGEST_WARMUP = 0.1  # share of an automatic schedule
_SHOWN_NAMES = 10


def merge_cpu_file(cfg: Config, config_file: str, given: Collection[str], *, num_gpus: int | None) -> None:
    """Merge the file that MODEL.ON_CPU names, beside ``config_file``, where no GPU is used.

    Args:
        cfg: as ``config_file`` says; the key is empty afterwards, so that the run's config.yaml stands for itself.
        config_file: path of the configuration.
        given: keys of the command line.
        num_gpus: that this machine uses.
    """
    name, cfg.MODEL.ON_CPU = cfg.MODEL.ON_CPU, ""
    if not name or num_gpus:
        return
    if "MODEL.WEIGHTS" in given:
        logger.info("MODEL.WEIGHTS is given: the model is as configured, not that of %s (MODEL.ON_CPU).", name)
        return
    logger.info("No GPU is used: %s (MODEL.ON_CPU) is merged over the configuration.", name)
    cfg.merge_from_file(str(Path(config_file).parent / name))


def set_keys_of_own_data(cfg: Config, given: Collection[str]) -> None:
    """Set what follows from DATASETS.TRAIN_JSON, if it is set; keys of the command line stay.

    Args:
        cfg: changed in place.
        given: keys of the command line.

    Raises:
        ConfigError: a key that cannot be used.
        DatasetError: the annotation file cannot be used.
    """
    found = once_a_machine(lambda: _names_and_number(cfg))
    if found is None:
        if cfg.DATASETS.VAL_JSON:
            raise ConfigError("DATASETS.VAL_JSON is set and DATASETS.TRAIN_JSON is empty; name the training file too.")
        return
    names, num_images = found
    register_own(cfg, {"train": names})
    tested = own_name("val" if cfg.DATASETS.VAL_JSON else "train")
    keys: dict[str, Any] = {
        "DATASETS.TRAIN": (own_name("train"),),
        "DATASETS.TEST": (tested,),
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": len(names),
    }
    if cfg.SOLVER.AUTO_SCHEDULE.EPOCHS and "SOLVER.MAX_ITER" not in given:
        keys |= _schedule(cfg, num_images)
    keys = {key: value for key, value in keys.items() if key not in given}
    cfg.merge_from_list([item for pair in keys.items() for item in pair])
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    logger.info(
        "%s has %d images to train on, and the classes %s%s. These keys follow: %s.",
        cfg.DATASETS.TRAIN_JSON,
        num_images,
        ", ".join(names[:_SHOWN_NAMES]),
        more,
        ", ".join(f"{key} {value}" for key, value in keys.items()),
    )
    if tested == own_name("train"):
        logger.warning(
            "DATASETS.VAL_JSON is empty: the model is evaluated on the images that it is trained on, so its AP says "
            "nothing about others."
        )


def _names_and_number(cfg: Config) -> tuple[list[str], int] | None:
    """The classes to train on, and the number of images; None if no file is named."""
    coco = read_own(cfg, "train")
    return None if coco is None else (list(category_names(coco).values()), _num_trained(cfg, coco))


def _num_trained(cfg: Config, coco: Json) -> int:
    """Images that training draws from."""
    number = len(coco["images"])
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        number = sum(has_objects(annotations) for _, annotations in annotations_by_image(coco))
    return min(number, cfg.DATASETS.MAX_IMAGES or number)


def _schedule(cfg: Config, num_images: int) -> dict[str, Any]:
    """The keys of a training of SOLVER.AUTO_SCHEDULE's length.

    Raises:
        ConfigError: a number of the key is out of range.
    """
    node = cfg.SOLVER.AUTO_SCHEDULE
    for name, least in (("EPOCHS", 0), ("MIN_ITER", 1)):
        if node[name] < least:
            raise ConfigError(f"SOLVER.AUTO_SCHEDULE.{name} is {node[name]}; it must be at least {least}.")
    batch = max(cfg.SOLVER.IMS_PER_BATCH, 1)  # A smaller one is refused later.
    iterations = max(node.MIN_ITER, math.ceil(node.EPOCHS * num_images / batch))
    steps = {round(step * iterations / cfg.SOLVER.MAX_ITER) for step in cfg.SOLVER.STEPS}
    period = math.ceil(iterations / EVALUATIONS)
    return {
        "SOLVER.MAX_ITER": iterations,
        "SOLVER.STEPS": tuple(sorted(step for step in steps if 0 < step < iterations)),
        "SOLVER.WARMUP_ITERS": min(cfg.SOLVER.WARMUP_ITERS, int(LONGEST_WARMUP * iterations)),
        "SOLVER.CHECKPOINT_PERIOD": period,
        "TEST.EVAL_PERIOD": period,
    }
