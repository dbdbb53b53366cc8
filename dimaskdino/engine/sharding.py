"""Models and optimizers sharded across the processes of a job (SOLVER.SHARDING)."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dimaskdino.errors import ConfigError, check_choice
from dimaskdino.modeling.policies import repeated_layers

logger = logging.getLogger(__name__)

KINDS = ("", "optimizer", "full")


def check_sharding(cfg: CfgNode) -> None:
    """Check SOLVER.SHARDING.

    Raises:
        ConfigError: an unknown value, or a key that does not go with it.
    """
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
