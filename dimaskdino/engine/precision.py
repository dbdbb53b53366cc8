"""Mixed precision of training and evaluation, as the keys SOLVER.AMP.* say.

What stays in float32 under autocast is said in :mod:`dimaskdino.layers.precision`.
"""

import logging

import torch
from detectron2.config import CfgNode

from dimaskdino.errors import ConfigError, check_choice

logger = logging.getLogger(__name__)

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def check_precision(cfg: CfgNode) -> None:
    """Check SOLVER.AMP.DTYPE.

    Raises:
        ConfigError: the type is unknown, or the GPU cannot compute in it.
    """
    check_choice("SOLVER.AMP.DTYPE", cfg.SOLVER.AMP.DTYPE, list(_DTYPES))
    on_gpu = cfg.MODEL.DEVICE.startswith("cuda") and torch.cuda.is_available()
    if cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.DTYPE == "bfloat16" and on_gpu and not torch.cuda.is_bf16_supported():
        raise ConfigError("SOLVER.AMP.DTYPE is bfloat16, which this GPU cannot compute in; set it to float16.")


def training_dtype(cfg: CfgNode) -> torch.dtype | None:
    """What training autocasts to; None for float32 throughout.

    float16 needs a GPU: on a CPU its small range costs more than its speed gains.
    """
    amp = cfg.SOLVER.AMP
    if amp.ENABLED and amp.DTYPE == "float16" and cfg.MODEL.DEVICE == "cpu":
        logger.info(
            "SOLVER.AMP.ENABLED has no effect on the CPU: training in fp32. SOLVER.AMP.DTYPE bfloat16 works there."
        )
        return None
    return _DTYPES[amp.DTYPE] if amp.ENABLED else None


def evaluation_autocast(cfg: CfgNode) -> torch.autocast:
    """The autocast of evaluation: bfloat16 where training has it; otherwise float32, as in the releases."""
    enabled = cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.DTYPE == "bfloat16"
    return torch.autocast(torch.device(cfg.MODEL.DEVICE).type, dtype=torch.bfloat16, enabled=enabled)
