"""From the command line to a frozen configuration, a run folder, loggers and seeds."""

import contextlib
import fnmatch
import logging
import math
import sys
from argparse import Namespace
from collections.abc import Collection, Iterator
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng

from dimaskdino.checkpoint import check_weights
from dimaskdino.command_line import import_modules
from dimaskdino.config import Config, flatten, get_cfg, own_keys, report_unused_keys
from dimaskdino.cpu import keep_freed_memory
from dimaskdino.data import register_all
from dimaskdino.data.augmentations import copy_paste, own_augmentations
from dimaskdino.data.coco_file import annotations_by_image, category_names, has_objects
from dimaskdino.data.datasets.coco import own_name, read_own, register_own
from dimaskdino.data.datasets.panoptic import read_panoptic_json
from dimaskdino.data.datasets.registration import is_coco_file, share_classes
from dimaskdino.data.fields import check_field_names
from dimaskdino.data.loaders import images_in_a_group
from dimaskdino.data.mapper import MAPPER_REGISTRY
from dimaskdino.data.orders import check_folds, check_sampler
from dimaskdino.data.readers import image_reader
from dimaskdino.data.shared import is_first_of_machine, once_a_machine
from dimaskdino.data.validation.start import check_datasets
from dimaskdino.engine.devices import check_precision, check_sharding
from dimaskdino.engine.hooks import check_best, check_hooks
from dimaskdino.engine.launch import num_cores, set_process_timeout
from dimaskdino.engine.nonfinite import POLICIES
from dimaskdino.engine.run_folder import check_not_locked, setup_loggers
from dimaskdino.engine.writers import check_writers
from dimaskdino.errors import ConfigError, OwnPartError, UserError, check_choice, check_range, file_errors_in_one_line
from dimaskdino.evaluation import check_evaluators
from dimaskdino.layers.precision import evaluation_dtype
from dimaskdino.modeling.meta_arch import needs_masks
from dimaskdino.modeling.policies import check_policies
from dimaskdino.modeling.registry import get_registered
from dimaskdino.modeling.transformer_decoder.heads import PredictionHeads
from dimaskdino.prediction.augmented import check_augmentation
from dimaskdino.solver import check_solver, parameter_groups

logger = logging.getLogger(__name__)

# Workers beyond the cores only cost memory, but a configuration made on a large machine still runs on a small one.
MOST_WORKERS = max(64, 8 * num_cores())
# The smallest and the largest value of numbers that nothing else checks, by pattern. A negative SEED draws one.
RANGES: dict[str, tuple[float, float]] = {
    "SEED": (-math.inf, 2**31 - 1),
    "DATALOADER.NUM_WORKERS": (0, MOST_WORKERS),
    "INPUT.IMAGE_SIZE": (1, 65536),
    "INPUT.MIN_SCALE": (0.0, math.inf),
    "INPUT.MAX_SCALE": (0.0, math.inf),
    "INPUT.MIN_SIZE_TEST": (0, math.inf),
    "INPUT.MAX_SIZE_TEST": (1, math.inf),
    "TEST.DETECTIONS_PER_IMAGE": (1, math.inf),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": (0.0, math.inf),
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": (0, math.inf),
    "MODEL.*DINO.FOCAL_ALPHA": (0.0, 1.0),
    "MODEL.*DINO.FOCAL_GAMMA": (0.0, math.inf),
    "MODEL.*DINO.NHEADS": (1, math.inf),
    "MODEL.*DINO.DROPOUT": (0.0, 1.0),
    "MODEL.*DINO.*_WEIGHT": (0.0, math.inf),
    "MODEL.VIT.OUT_CHANNELS": (1, math.inf),
    "MODEL.VIT.LORA.ALPHA": (0.0, math.inf),
    **{f"MODEL.{node}.DROP_PATH_RATE": (0.0, 1.0) for node in ("VIT", "TIMM", "SWIN")},
}
EVALUATIONS = 5  # and checkpoints, of an automatic schedule
LONGEST_WARMUP = 0.1  # share of an automatic schedule
NUM_CLASSES = "MODEL.SEM_SEG_HEAD.NUM_CLASSES"
_SHOWN_NAMES = 10


def setup(args: Namespace) -> Config:
    """Import the modules of ``--import``, read and check the configuration, prepare the run folder, check the datasets.

    ``args`` are of :func:`dimaskdino.command_line.argument_parser`, completed by :func:`dimaskdino.engine.launch`.

    Returns:
        The frozen configuration of this process.

    Raises:
        UserError: a module that does not exist, an unknown key or value, a dataset that is missing or does not fit, a
            batch that the processes cannot share, a file or folder that cannot be read or written.
    """
    import_modules(args.modules)
    with file_errors_in_one_line():
        with _held_log_records() as held:
            cfg = load_config(args)
            _set_device(cfg, args.num_gpus)
            _check(cfg, train=not args.eval_only)
            _set_float32_precision(cfg)
            cfg.freeze()
        set_process_timeout(cfg.SOLVER.PROCESS_TIMEOUT)
        if not args.eval_only and comm.is_main_process():
            check_not_locked(Path(cfg.OUTPUT_DIR))
        _prepare_folder(Path(cfg.OUTPUT_DIR))
        for record in held.buffer:
            logging.getLogger(record.name).handle(record)
        seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + comm.get_rank())
        keep_freed_memory(cfg.MODEL.DEVICE)
        if not args.eval_only:
            torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
        if not args.resume:
            check_weights(cfg.MODEL.WEIGHTS)
        check_datasets_once(cfg, train=not args.eval_only)
    return cfg


def load_config(args: Namespace) -> Config:
    """The keys of ``--config-file``, of ``KEY VALUE``, of the flags that set keys, and what follows from one's data."""
    cfg = get_cfg()
    given = args.opts[::2]
    if args.config_file:
        cfg.merge_from_file(args.config_file)
        merge_cpu_file(cfg, args.config_file, given, num_gpus=args.num_gpus)
    cfg.merge_from_list(args.opts)
    set_keys_of_own_data(cfg, given)
    cfg.IMPORTS = list(args.modules)
    if args.eval_layers:
        cfg.TEST.EVAL_LAYERS = args.eval_layers.split(",")
    return cfg


def _set_device(cfg: Config, num_gpus: int) -> None:
    """Set MODEL.DEVICE to the device of this job."""
    on_cpu = cfg.MODEL.DEVICE == "cpu"
    if num_gpus == 0 and not on_cpu:
        cfg.MODEL.DEVICE = "cpu"
        logger.info("No GPU is used: MODEL.DEVICE is set to cpu.")
    elif on_cpu and comm.get_world_size() > 1 and num_gpus:
        raise ConfigError("MODEL.DEVICE is cpu, but the processes use GPUs; give --num-gpus 0, or remove the key.")


def _check(cfg: Config, *, train: bool) -> None:
    """Check everything that needs no data."""
    if not cfg.OUTPUT_DIR.strip():
        raise ConfigError("OUTPUT_DIR is empty; name a folder for the run, such as output/run (. is the current one).")
    if cfg.SOLVER.PROCESS_TIMEOUT <= 0:
        raise ConfigError(f"SOLVER.PROCESS_TIMEOUT is {cfg.SOLVER.PROCESS_TIMEOUT}; it must be above 0 (seconds).")
    of_users = own_keys()
    values = {key: value for key, value in flatten(cfg) if key not in of_users}
    for pattern, (least, most) in RANGES.items():
        for key in fnmatch.filter(values, pattern):
            check_range(key, values[key], least, most)
    check_precision(cfg)
    if not train:
        evaluation_dtype(cfg.MODEL.MaskDINO.TEST.PRECISION, torch.device(cfg.MODEL.DEVICE))
    if train:
        check_solver(cfg, comm.get_world_size())
        check_best(cfg)
        check_choice("SOLVER.NONFINITE", cfg.SOLVER.NONFINITE, POLICIES)
        check_sharding(cfg)
        check_writers(cfg)
        images_in_a_group(cfg)
        check_sampler(cfg)
        check_hooks(cfg)
        own_augmentations(cfg)
        copy_paste(cfg)
    image_reader(cfg)
    check_folds(cfg)
    check_field_names(cfg.INPUT.ANNOTATION_FIELDS)
    check_evaluators(cfg)
    check_augmentation(cfg)
    get_registered(MAPPER_REGISTRY, cfg.INPUT.DATASET_MAPPER_NAME, "INPUT.DATASET_MAPPER_NAME")
    register_all(cfg=cfg)  # A panoptic model asks its datasets which classes are things.
    _check_model(cfg, train=train)
    report_unused_keys(cfg)


def _check_model(cfg: Config, *, train: bool) -> None:
    """Build the model without memory for its weights, so that mistakes in its keys come before data is read."""
    meta_arch = get_registered(META_ARCH_REGISTRY, cfg.MODEL.META_ARCHITECTURE, "MODEL.META_ARCHITECTURE")
    cfg = cfg.clone()
    cfg.MODEL.TIMM.PRETRAINED = cfg.MODEL.VIT.PRETRAINED = False  # No download yet.
    try:
        with torch.device("meta"):
            model = meta_arch(cfg).train(train)
            if hasattr(model, "check_supported"):
                model.check_supported()
            for heads in (each for each in model.modules() if isinstance(each, PredictionHeads)):
                heads.check_extra()
            if train:
                check_policies(cfg, model)
                parameter_groups(cfg, model)
    except Exception as error:  # a user's part may need real weights; the trainer builds those
        if isinstance(error, UserError) and not isinstance(error, OwnPartError):
            raise
        logger.debug("The model was not checked before the data: %s", error)


def _set_float32_precision(cfg: Config) -> None:
    """Set the precision of float32 matrix products (FLOAT32_PRECISION), as a newer detectron2's default_setup does."""
    if precision := cfg.FLOAT32_PRECISION:
        check_choice("FLOAT32_PRECISION", precision, ("highest", "high", "medium"))
        torch.set_float32_matmul_precision(precision)
        logger.info("Matrix products of float32 have %s precision.", precision)


def _prepare_folder(folder: Path) -> None:
    """Make the run folder with log.txt.

    detectron2's default_setup does the same, but it also prints the whole configuration, and writes config.yaml even if
    the run then fails to start. Here the trainer writes it when the run begins.
    """
    try:
        setup_loggers(folder, comm.get_rank())
    except OSError as error:
        raise UserError(
            f"OUTPUT_DIR {folder} cannot be written to ({error.filename}: {error.strerror}); set it to another folder."
        ) from error
    logger.debug("Process %d of %d; environment:\n%s", comm.get_rank(), comm.get_world_size(), collect_env_info())
    logger.debug("Command line: %s", " ".join(sys.argv))


def check_datasets_once(cfg: Config, *, train: bool) -> None:
    """Check on the main process first, which may generate a dataset that the others then find.

    Another machine checks once as well, since its files may differ. Datasets that a user's function lists are loaded by
    every process, which checks them.
    """
    names = [*(cfg.DATASETS.TRAIN if train else ()), *cfg.DATASETS.TEST]
    if not comm.is_main_process():
        comm.synchronize()
    if is_first_of_machine() or not all(name in DatasetCatalog and is_coco_file(name) for name in names):
        check_datasets(cfg, train=train, with_masks=needs_masks(cfg))
    if comm.is_main_process():
        comm.synchronize()
    share_classes(name for name in names if is_coco_file(name))


@contextlib.contextmanager
def _held_log_records() -> Iterator[MemoryHandler]:
    """Keep what the package logs before its loggers exist."""
    package = logging.getLogger("dimaskdino")
    held = MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1)
    package.addHandler(held)
    package.setLevel(logging.INFO)
    try:
        yield held
    finally:
        package.removeHandler(held)


def merge_cpu_file(cfg: Config, config_file: str, given: Collection[str], *, num_gpus: int | None) -> None:
    """Merge the file of MODEL.ON_CPU, beside ``config_file``, where no GPU is used; the key is empty afterwards."""
    name, cfg.MODEL.ON_CPU = cfg.MODEL.ON_CPU, ""
    if not name or num_gpus:
        return
    if "MODEL.WEIGHTS" in given:
        logger.info("MODEL.WEIGHTS is given: the model is as configured, not that of %s (MODEL.ON_CPU).", name)
        return
    logger.info("No GPU is used: %s (MODEL.ON_CPU) is merged over the configuration.", name)
    cfg.merge_from_file(str(Path(config_file).parent / name))


def set_keys_of_own_data(cfg: Config, given: Collection[str]) -> None:
    """Set what follows from DATASETS.TRAIN_JSON, if it is set and can be used; keys of the command line stay."""
    found = once_a_machine(lambda: _names_and_number(cfg))
    if found is None:
        if cfg.DATASETS.VAL_JSON:
            raise ConfigError("DATASETS.VAL_JSON is set and DATASETS.TRAIN_JSON is empty; name the training file too.")
        if NUM_CLASSES not in given:
            _count_classes_of_segmentation(cfg)
        return
    names, num_images = found
    register_own(cfg, {"train": names})
    tested = own_name("val" if cfg.DATASETS.VAL_JSON else "train")
    keys: dict[str, Any] = {
        "DATASETS.TRAIN": (own_name("train"),),
        "DATASETS.TEST": (tested,),
        NUM_CLASSES: len(names),
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


def _count_classes_of_segmentation(cfg: Config) -> None:
    """Set the number of classes to that of the set of DATASETS.SEMANTIC or PANOPTIC, where it is trained on."""
    number, source = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, ""
    if cfg.DATASETS.TRAIN == ("semantic_train",) and cfg.DATASETS.SEMANTIC.CLASSES:
        number, source = len(cfg.DATASETS.SEMANTIC.CLASSES), "DATASETS.SEMANTIC.CLASSES"
    json_file = Path(cfg.DATASETS.PANOPTIC.TRAIN_JSON).expanduser()
    if cfg.DATASETS.TRAIN == ("panoptic_train",) and json_file.is_file():
        number, source = len(read_panoptic_json(str(json_file))["categories"]), str(json_file)
    if number != cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES:
        cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = number
        logger.info("%s has %d classes: %s is %d.", source, number, NUM_CLASSES, number)


def _names_and_number(cfg: Config) -> tuple[list[str], int] | None:
    """The classes to train on, and the number of images that training draws from; None if no file is named."""
    if (coco := read_own(cfg, "train")) is None:
        return None
    number = len(coco["images"])
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        number = sum(has_objects(annotations) for _, annotations in annotations_by_image(coco))
    return list(category_names(coco).values()), min(number, cfg.DATASETS.MAX_IMAGES or number)


def _schedule(cfg: Config, num_images: int) -> dict[str, Any]:
    """The keys of a training of SOLVER.AUTO_SCHEDULE's length; raises ConfigError for a number out of range."""
    node = cfg.SOLVER.AUTO_SCHEDULE
    for name, least in (("EPOCHS", 0), ("MIN_ITER", 1)):
        check_range(f"SOLVER.AUTO_SCHEDULE.{name}", node[name], least)
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
