"""How a model uses its devices: mixed precision (SOLVER.AMP) and sharding across processes (SOLVER.SHARDING)."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dimaskdino.errors import ConfigError, check_choice
from dimaskdino.modeling.policies import repeated_layers

logger = logging.getLogger(__name__)

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
KINDS = ("", "optimizer", "full")


def check_precision(cfg: CfgNode) -> None:
    """Raise ConfigError if SOLVER.AMP.DTYPE is unknown, or the GPU cannot compute in it."""
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


def check_sharding(cfg: CfgNode) -> None:
    """Raise ConfigError if SOLVER.SHARDING is unknown, or another key does not go with it."""
    kind = cfg.SOLVER.SHARDING
    check_choice("SOLVER.SHARDING", kind, KINDS)
    scaled = cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.DTYPE == "float16"
    contradictions = {
        "MODEL.COMPILE": bool(cfg.MODEL.COMPILE),
        "MODEL.CHANNELS_LAST": cfg.MODEL.CHANNELS_LAST,
        "SOLVER.AMP.DTYPE float16": scaled,
        "SOLVER.NONFINITE skip": cfg.SOLVER.NONFINITE == "skip",
    }
    if kind == "full" and (found := [key for key, is_set in contradictions.items() if is_set]):
        remedy = "set SOLVER.AMP.DTYPE to bfloat16" if found == ["SOLVER.AMP.DTYPE float16"] else "unset one of them"
        raise ConfigError(f"SOLVER.SHARDING full does not go with {', '.join(found)}; {remedy}, or use 'optimizer'.")


def is_sharding(cfg: CfgNode, kind: str = "") -> bool:
    """Whether this job shares something out, or what ``kind`` says; with one process there is nothing to share."""
    wanted = cfg.SOLVER.SHARDING
    return comm.get_world_size() > 1 and (wanted == kind if kind else bool(wanted))


def distribute(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """``model`` for a job of several processes, which average its gradients; itself for one.

    With SOLVER.SHARDING full, the same module, whose parameters are now sharded; see :func:`whole_weights`.
    """
    if comm.get_world_size() == 1:
        if cfg.SOLVER.SHARDING:
            logger.info("SOLVER.SHARDING %s has no effect with one process.", cfg.SOLVER.SHARDING)
        return model
    if is_sharding(cfg, "full"):
        return _shard(model)
    device = next(model.parameters()).device
    device_ids = None if device.type == "cpu" else [device.index]
    # oneDNN's gradients of 1x1 convolutions name the same order of values by other strides.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)
    return DistributedDataParallel(model, device_ids=device_ids, broadcast_buffers=False)


def _shard(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh  # These take a second to import.
    from torch.distributed.fsdp import fully_shard

    for tensor in (*model.parameters(), *model.buffers()):  # DistributedDataParallel does so as well.
        dist.broadcast(tensor.detach(), 0)
    mesh = init_device_mesh(next(model.parameters()).device.type, (comm.get_world_size(),))
    for layer in reversed(repeated_layers(model)):  # inner ones first
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@contextlib.contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """While it is entered, each process has all weights of a model that is sharded, and can use it alone.

    All processes must enter it. It changes nothing for other models.
    """
    parts: list[Any] = [part for part in model.modules() if hasattr(part, "unshard")]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not parts[0], recurse=False)  # as FSDP2 has it by default
            part.reshard()
