"""Trainings of the tiny model whose weights or moments are sharded across two processes; see tests/engine/job.py."""

import shutil
from pathlib import Path
from typing import Any

import torch
from detectron2.utils import comm
from torch import Tensor, nn

from dimaskdino.config import Config
from dimaskdino.engine import GradientClipper, Trainer
from dimaskdino.engine.devices import whole_weights
from dimaskdino.layers.shards import local
from tests.engine.toy import train
from tests.tiny_model import TINY_OPTIONS, image

KINDS = ("", "optimizer", "full")
OPTIONS = TINY_OPTIONS | {
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 6,
    "MODEL.MaskDINO.DEC_LAYERS": 2,
    "SOLVER.MAX_ITER": 2,
    "SOLVER.STEPS": (1,),
    "SOLVER.CHECKPOINT_PERIOD": 0,
    "SOLVER.BASE_LR": 0.001,
    "SOLVER.CLIP_GRADIENTS.ENABLED": True,
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "full_model",
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 0.01,
    "SOLVER.EMA.ENABLED": True,
    "SOLVER.CHECKPOINT_WITHOUT_FROZEN": True,
    "SOLVER.ACTIVATION_CHECKPOINTING": ["encoder", "decoder"],
    "SOLVER.PARAM_GROUPS": [
        {"pattern": "backbone.convs.0", "frozen": True},
        {"pattern": "*.class_embed.*", "lr_factor": 0.1},
    ],
    "DATASETS.TEST": (),
}
# One step whose small gradients SGD does not blow up, so that it shows how they are added up.
PARTS = {
    "SOLVER.MAX_ITER": 1,
    "SOLVER.STEPS": (),
    "SOLVER.OPTIMIZER": "SGD",
    "SOLVER.ACCUMULATION_STEPS": 2,
    "SOLVER.IMS_PER_BATCH": 4,
    "SOLVER.AMP.ENABLED": True,
    "SOLVER.AMP.DTYPE": "bfloat16",
}
# Three images: one process has another number of them.
EVALUATED = {"DATASETS.TEST": ("shapes_val",), "LOG.PICTURES": 1}
LONGER = {"SOLVER.MAX_ITER": 3}
GRADIENTS = ([[3.0, -4.0], [0.0, 12.0], [0.5, 0.0]], [-84.0])
CLIPPERS = (("full_model", 2.0), ("norm", 2.0), ("value", 2.0), ("full_model", torch.inf))


def shard(cfg: Config, folder: Path) -> dict[str, Any]:
    """Train in each way, also from the checkpoint of the way before; returns what each process held."""
    found = {}
    train(_cfg(cfg, folder / "longer", "", **LONGER))
    for kind in KINDS:
        whole = folder / f"shared_{kind}"
        trainer = train(_cfg(cfg, whole, kind, **EVALUATED if kind == "full" else {}))
        found[kind] = {"moments": _moments(trainer), "results": trainer._last_eval_results}
        if kind == "full":
            found[kind]["scores"] = _scores_alone(trainer, whole / "model_final.pth")
        if kind != "optimizer":
            train(_cfg(cfg, folder / f"parts_{kind}", kind, **PARTS))
        if kind:
            resumed = folder / f"resumed_{kind}"
            if comm.is_main_process():
                shutil.copytree(folder / f"shared_{KINDS[KINDS.index(kind) - 1]}", resumed)
            comm.synchronize()
            train(_cfg(cfg, resumed, kind, **LONGER), resume=True)
    return found


def _scores_alone(trainer: Trainer, path: Path) -> list[Tensor]:
    """What the main process alone finds in an image with the shared-out weights, and with those of the file."""
    model = trainer.model
    with whole_weights(model), torch.no_grad():
        if not comm.is_main_process():
            return []
        torch.manual_seed(7)  # The file leaves out what is frozen.
        plain = Trainer.build_model(trainer.cfg)
        plain.load_state_dict(torch.load(path)["model"], strict=False)
        images = [{"image": image(64, 96)}]
        found = [each.eval()(images)[0]["instances"].scores for each in (model, plain)]
        model.train()
    return found


def _cfg(cfg: Config, output: Path, kind: str, **options: Any) -> Config:
    cfg = cfg.clone()
    pairs = OPTIONS | options | {"SOLVER.SHARDING": kind, "OUTPUT_DIR": str(output)}
    cfg.merge_from_list([item for pair in pairs.items() for item in pair])
    return cfg


def _moments(trainer: Trainer) -> int:
    """Elements of the moments in this process."""
    optimizer = getattr(trainer.optimizer, "optim", trainer.optimizer)
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(local(value).numel() for value in values if value.dim())


def clip_sharded(cfg: Config, folder: Path) -> list[tuple[Tensor, list[Tensor]]]:
    """The norm, and the gradients after clipping, of gradients of which each process has a part."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh, found = init_device_mesh("cpu", (comm.get_world_size(),)), []
    for kind, limit in CLIPPERS:
        for norm_type in (2.0, torch.inf):
            parameters = [nn.Parameter(distribute_tensor(torch.tensor(each), mesh, [Shard(0)])) for each in GRADIENTS]
            for parameter in parameters:
                parameter.grad = parameter.detach().clone()
            norm = GradientClipper(clip_type=kind, limit=limit, norm_type=norm_type)(parameters)
            found.append((norm, [parameter.grad.full_tensor() for parameter in parameters]))
    return found
