"""From the command line to a frozen configuration, a run directory, loggers and seeds."""

import argparse
import contextlib
import logging
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from logging.handlers import MemoryHandler
from typing import Any

import torch
from detectron2.engine import default_argument_parser
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from dimaskdino.command_line import add_import_flag, import_modules
from dimaskdino.config import Config, get_cfg
from dimaskdino.data.validation.start import check_datasets
from dimaskdino.engine.cpu_memory import keep_freed_memory
from dimaskdino.engine.unused_keys import report_unused_keys
from dimaskdino.errors import ConfigError, UserError, check_choice, file_errors_told_in_one_line

logger = logging.getLogger(__name__)

FLOAT32_PRECISIONS = ("highest", "high", "medium")

EXAMPLES = """
Without --num-gpus, one GPU is used where there is one, else the CPU; --num-gpus 0 always means the CPU.

  train on 8 GPUs      train_net.py --config-file FILE --num-gpus 8
  change keys          train_net.py --config-file FILE SOLVER.BASE_LR 0.0002 OUTPUT_DIR output/run
  go on                train_net.py --config-file FILE --resume
  evaluate             train_net.py --config-file FILE --eval-only MODEL.WEIGHTS model.pth
  two machines         train_net.py --config-file FILE --num-gpus 8 --num-machines 2 --machine-rank 0|1 --dist-url URL
  under torchrun       torchrun --nproc_per_node 8 train_net.py --config-file FILE
  your parts and data  train_net.py --config-file FILE --import my_parts MODEL.MaskDINO.BATO.NAME MyBato
"""


def argument_parser() -> argparse.ArgumentParser:
    """detectron2's command line, ``--eval-layers`` and ``--import``; ``num_gpus`` is None where it is not given.

    ``--dist-url`` is "auto" by default: detectron2's is a port that depends on the user alone, so that a second job on
    the same machine would fail.
    """
    parser = default_argument_parser(epilog=EXAMPLES)
    parser.set_defaults(num_gpus=None, dist_url="auto")
    parser.add_argument(
        "--eval-layers",
        metavar="STAGES",
        default="",
        help='also evaluate after these stages: "all", or names such as layer.0,layer.5 (TEST.EVAL_LAYERS)',
    )
    add_import_flag(parser)
    return parser


def setup(args: Namespace) -> Config:
    """Import what ``--import`` names, read the configuration, check it against datasets and job, prepare the folder.

    Args:
        args: what :func:`argument_parser` returns, after :func:`dimaskdino.engine.launch`.

    Returns:
        The frozen configuration of this process.

    Raises:
        UserError: a module that does not exist, an unknown key or value, a dataset that is missing or does not fit, a
            batch that cannot be divided, a file or folder that cannot be read or written.
    """
    import_modules(args.modules)
    with file_errors_told_in_one_line():
        with _held_log_records():
            cfg = load_config(args)
            _place(cfg, args.num_gpus)
            if not args.eval_only:
                _check_solver(cfg)
            if cfg.MODEL.DEVICE == "cpu":
                keep_freed_memory()
            _set_float32_precision(cfg)
            report_unused_keys(cfg)
            cfg.freeze()
            _prepare_run(cfg, eval_only=args.eval_only)
        _check_datasets_once(cfg, train=not args.eval_only)
    return cfg


def load_config(args: Namespace) -> Config:
    """The keys of ``--config-file``, then of ``KEY VALUE``, then of the shortcuts."""
    cfg = get_cfg()
    if args.config_file:
        cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    if args.eval_layers:
        cfg.TEST.EVAL_LAYERS = args.eval_layers.split(",")
    return cfg


def _place(cfg: Config, num_gpus: int) -> None:
    """Set MODEL.DEVICE to where this job runs."""
    on_cpu = cfg.MODEL.DEVICE == "cpu"
    if num_gpus == 0 and not on_cpu:
        cfg.MODEL.DEVICE = "cpu"
        logger.info("No GPU is used: MODEL.DEVICE is set to cpu.")
    elif on_cpu and comm.get_world_size() > 1 and num_gpus:
        raise ConfigError("MODEL.DEVICE cpu with several GPU processes; give --num-gpus 0, or remove the key.")


def _check_solver(cfg: Config) -> None:
    solver = cfg.SOLVER
    if solver.MAX_ITER < 1:
        raise ConfigError(f"SOLVER.MAX_ITER is {solver.MAX_ITER}; it must be at least 1.")
    _check_steps(list(solver.STEPS))
    if solver.CHECKPOINT_PERIOD < 0:
        raise ConfigError(
            f"SOLVER.CHECKPOINT_PERIOD is {solver.CHECKPOINT_PERIOD}; it must be at least 0, which means the last "
            "checkpoint alone."
        )
    if solver.REFERENCE_WORLD_SIZE < 0:
        raise ConfigError(f"SOLVER.REFERENCE_WORLD_SIZE is {solver.REFERENCE_WORLD_SIZE}; it must be at least 0.")
    # The trainer scales the batch from the processes of the reference to those of the job.
    sharing = solver.REFERENCE_WORLD_SIZE or comm.get_world_size()
    if solver.IMS_PER_BATCH < 1 or solver.IMS_PER_BATCH % sharing:
        of = "SOLVER.REFERENCE_WORLD_SIZE" if solver.REFERENCE_WORLD_SIZE else "this job"
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} (images per step over all processes) "
            f"is not a multiple of the {sharing} processes of {of}."
        )


def _check_steps(steps: list[Any]) -> None:
    whole = all(type(step) is int for step in steps)
    if not whole or steps != sorted({*steps}) or min(steps, default=1) < 1:
        raise ConfigError(
            f"SOLVER.STEPS is {tuple(steps)}; it must be iterations from 1 on, each later than the one before, or () "
            "for none."
        )


def _set_float32_precision(cfg: Config) -> None:
    """Have torch multiply float32 matrices as FLOAT32_PRECISION asks; a newer detectron2's default_setup does so."""
    precision = cfg.FLOAT32_PRECISION
    if not precision:
        return
    check_choice("FLOAT32_PRECISION", precision, FLOAT32_PRECISIONS)
    torch.set_float32_matmul_precision(precision)
    logger.info("Matrix products of float32 are of %s precision.", precision)


def _prepare_run(cfg: Config, *, eval_only: bool) -> None:
    """Make the run directory with log.txt, and seed this process.

    detectron2's default_setup does the same, prints the whole configuration in colour, to the log file too, and writes
    config.yaml, also of what then fails. Here the trainer writes it once the run begins.
    """
    rank = comm.get_rank()
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    for name in ("fvcore", "detectron2", "dimaskdino"):
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name=name)
    logging.getLogger("detectron2.engine.train_loop").addFilter(_is_no_user_error)
    logger.info("Process %d of %d; environment:\n%s", rank, comm.get_world_size(), collect_env_info())
    logger.info("Command line: %s", " ".join(sys.argv))
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + rank)
    if not eval_only:
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK


def _check_datasets_once(cfg: Config, *, train: bool) -> None:
    """Check on the main process first: it may be the one that generates a dataset, the others then find it."""
    if not comm.is_main_process():
        comm.synchronize()
    check_datasets(cfg, train=train)
    if comm.is_main_process():
        comm.synchronize()


@contextlib.contextmanager
def _held_log_records() -> Iterator[None]:
    """Keep what the package logs before its loggers exist, and log it once they do."""
    package = logging.getLogger("dimaskdino")
    held = MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1)
    package.addHandler(held)
    package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.removeHandler(held)
    for record in held.buffer:
        package.handle(record)


def _is_no_user_error(record: logging.LogRecord) -> bool:
    """Filter for detectron2's loop, which logs a traceback; the launcher tells a user error in one line."""
    return not (record.exc_info and isinstance(record.exc_info[1], UserError))
