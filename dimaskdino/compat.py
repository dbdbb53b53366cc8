"""Differences between detectron2 0.5 and 0.6 (main), and what they need with a new torch."""

import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.utils import comm

# Configuration keys that detectron2 has gained since 0.5, with the values at which 0.5 behaves the same. A config.yaml
# that a newer detectron2 wrote holds all of them.
NEWER_KEYS: Mapping[str, Any] = MappingProxyType(
    {
        "DATALOADER.REPEAT_SQRT": True,
        "MODEL.ROI_BOX_HEAD.FED_LOSS_FREQ_WEIGHT_POWER": 0.5,
        "MODEL.ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES": 50,
        "MODEL.ROI_BOX_HEAD.USE_FED_LOSS": False,
        "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": False,
        "SOLVER.BASE_LR_END": 0.0,
        "SOLVER.NUM_DECAYS": 3,
        "SOLVER.RESCALE_INTERVAL": False,
    }
)


def lr_schedules(cfg: CfgNode) -> Sequence[str]:
    """The values of SOLVER.LR_SCHEDULER_NAME that the installed detectron2 supports."""
    newer = ["WarmupStepWithFixedGammaLR"] if "NUM_DECAYS" in cfg.SOLVER else []
    return ["WarmupMultiStepLR", "WarmupCosineLR", *newer]


def training_samplers(cfg: CfgNode) -> Sequence[str]:
    """The values of DATALOADER.SAMPLER_TRAIN that the installed detectron2 supports and has keys for."""
    newer = ["RandomSubsetTrainingSampler"] if "RANDOM_SUBSET_RATIO" in cfg.DATALOADER else []
    return ["TrainingSampler", "RepeatFactorTrainingSampler", *newer]


def newer_training_sampler(cfg: CfgNode, size: int, seed: int) -> Any:
    """The sampler of ``size`` images that DATALOADER.SAMPLER_TRAIN names and only newer releases of detectron2 have."""
    from detectron2.data.samplers import RandomSubsetTrainingSampler

    return RandomSubsetTrainingSampler(size, cfg.DATALOADER.RANDOM_SUBSET_RATIO, seed_shuffle=seed, seed_subset=seed)


def create_local_process_group(num_processes_per_machine: int) -> None:
    """Tell detectron2 which processes share this machine; every process of the job calls this once.

    detectron2 0.5 keeps the group in a private variable that its own launcher sets; newer releases have a function.
    """
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(num_processes_per_machine)
        return
    first_ranks = range(0, dist.get_world_size(), num_processes_per_machine)
    for first in first_ranks:
        group = dist.new_group(list(range(first, first + num_processes_per_machine)))
        if first <= dist.get_rank() < first + num_processes_per_machine:
            comm._LOCAL_PROCESS_GROUP = group


def knows_local_processes() -> bool:
    """Whether :func:`create_local_process_group` was called, or detectron2's launcher has done the same."""
    return comm._LOCAL_PROCESS_GROUP is not None


def process_groups() -> list[Any]:
    """Every group in which the processes of this job wait for each other; all of them must call this."""
    groups = [dist.group.WORLD, comm._LOCAL_PROCESS_GROUP, comm._get_global_gloo_group()]
    return list({id(group): group for group in groups if group is not None}.values())


def silence_gathering() -> None:
    """Silence torch's warning, at every evaluation, that detectron2 0.5 gathers results by a deprecated class."""
    warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning, r"detectron2\.utils\.comm")


def leave_process_group() -> None:
    """Leave the job; every process calls this once, after its last communication.

    Both versions of detectron2 keep two groups alive: the local one and, after results were gathered, a cached global
    one. A Gloo group that is alive when the interpreter exits sometimes aborts the process.
    """
    comm._LOCAL_PROCESS_GROUP = None
    comm._get_global_gloo_group.cache_clear()
    dist.destroy_process_group()
