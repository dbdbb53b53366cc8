"""Small models and the files that others would have saved of them."""

import os
from pathlib import Path
from typing import Any

import torch
from detectron2.modeling import build_model
from torch import Tensor, nn

import dimaskdino.modeling.meta_arch  # noqa: F401  (registers the model)
from dimaskdino.config import Config, get_cfg

SMALL: dict[str, Any] = {
    "MODEL.META_ARCHITECTURE": "DIMaskDINO",
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.BACKBONE.NAME": "D2SwinTransformer",
    "MODEL.SWIN.EMBED_DIM": 8,
    "MODEL.SWIN.DEPTHS": [1, 1, 1, 1],
    "MODEL.SWIN.NUM_HEADS": [1, 1, 2, 2],
    "MODEL.SWIN.WINDOW_SIZE": 2,
    "MODEL.SEM_SEG_HEAD.NAME": "MaskDINOHead",
    "MODEL.SEM_SEG_HEAD.NORM": "GN",
    "MODEL.SEM_SEG_HEAD.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 32,
    "MODEL.SEM_SEG_HEAD.DIM_FEEDFORWARD": 16,
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 1,
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 5,
    "MODEL.MaskDINO.TRANSFORMER_DECODER_NAME": "DIMaskDINODecoder",
    "MODEL.MaskDINO.HIDDEN_DIM": 32,
    "MODEL.MaskDINO.DIM_FEEDFORWARD": 16,
    "MODEL.MaskDINO.DEC_LAYERS": 2,
    "MODEL.MaskDINO.NUM_OBJECT_QUERIES": 6,
    "MODEL.MaskDINO.FIRST_SELECTED_QUERIES": 9,
    "MODEL.MaskDINO.NUM_GUIDING_TOKENS": 3,
}


class RunsCode:
    """Unpickling it makes the folder `path`, or runs something harmless where there is no path."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),)) if self.path else (os.getpid, ())


def small_cfg(options: dict[str, Any] | None = None) -> Config:
    cfg = get_cfg()
    for key, value in {**SMALL, **(options or {})}.items():
        cfg.merge_from_list([key, value])
    return cfg


def small_model(options: dict[str, Any] | None = None) -> nn.Module:
    return build_model(small_cfg(options))


def randomised(model: nn.Module) -> dict[str, Tensor]:
    """A state dict for `model` in which every number differs from a fresh model's."""
    return {
        key: value if value.dtype == torch.int64 else torch.rand_like(value) + 0.5
        for key, value in model.state_dict().items()
    }


def save(content: Any, path: Path) -> str:
    torch.save(content, path)
    return str(path)


def assert_loaded(model: nn.Module, expected: dict[str, Tensor], but: tuple[str, ...] = ()) -> None:
    """Every tensor of `model` equals `expected`, but those named in `but`, which differ."""
    assert model.state_dict().keys() == expected.keys() | set(but)
    for key, value in model.state_dict().items():
        same = key in expected and value.shape == expected[key].shape and torch.equal(value, expected[key])
        assert same != (key in but), key


class Counter:
    """A state that a trainer saves with the weights."""

    def __init__(self, count: int) -> None:
        self.count = count

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]
