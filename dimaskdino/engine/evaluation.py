"""Evaluation of weights, without a training."""

from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from dimaskdino.checkpoint import AVERAGE, Checkpointer
from dimaskdino.engine.ema import in_ema_folder
from dimaskdino.engine.run_folder import check_same_checkpoint, full_disk_in_one_line, read_run_id
from dimaskdino.engine.trainer import Trainer
from dimaskdino.errors import UserError
from dimaskdino.evaluation import check_classes, class_names


def evaluate(cfg: CfgNode, resume: bool = False) -> dict[str, Any]:
    """Evaluate MODEL.WEIGHTS, or the last checkpoint in OUTPUT_DIR if ``resume``, on every DATASETS.TEST.

    Raises:
        UserError: there are no weights to evaluate, or the processes find different ones.
        SystemExit: on the main process, with status 1, if the results are not TEST.EXPECTED_RESULTS.
    """
    check_classes(cfg)
    model = Trainer.build_model(cfg)
    names = class_names(cfg.DATASETS.TEST[0]) if cfg.DATASETS.TEST else ()
    checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, class_names=names)
    checkpointer.run_id = read_run_id(Path(cfg.OUTPUT_DIR))
    check_same_checkpoint(checkpointer, resume=resume)
    if resume and not checkpointer.has_checkpoint():
        raise UserError(f"--eval-only --resume: no checkpoint in {cfg.OUTPUT_DIR}; train first, or set MODEL.WEIGHTS.")
    if not resume and not cfg.MODEL.WEIGHTS:
        raise UserError("--eval-only needs weights: set MODEL.WEIGHTS to a file, or give --resume.")
    content = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    if set_precision := getattr(model, "set_precision", None):  # a model of the user's own may have none
        set_precision(cfg.MODEL.MaskDINO.TEST.PRECISION)
    with full_disk_in_one_line(Path(cfg.OUTPUT_DIR)):
        results = Trainer.test_with_views(cfg, model)
        if resume and AVERAGE in content:
            model.load_state_dict(content[AVERAGE])
            results = {**results, "ema": Trainer.test_with_views(in_ema_folder(cfg), model)}
    if comm.is_main_process():
        verify_results(cfg, results)
    return results
