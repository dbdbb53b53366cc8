"""What the releases hold: keys, shapes and settings, recorded in tests/data/*release_keys.json.gz."""

import functools
import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dimaskdino.config import Config, get_cfg
from tests.parity.weights import reference_state_dict

DATA = Path(__file__).parents[1] / "data"
NAMES = (
    "dimaskdino_r50_12ep",
    "dimaskdino_r50_24ep",
    "dimaskdino_r50_50ep",
    "maskdino_r50_50ep",
    "dimaskdino_tiny",
    "maskdino_tiny",
    "maskdino_panoptic_tiny",
    "maskdino_semantic_tiny",
)


@dataclass(frozen=True)
class Release:
    """One configuration of a release: its state dict's names and shapes, and its resolved settings."""

    name: str
    keys: dict[str, list[int]]
    alias: dict[str, str]
    config_values: dict[str, Any]
    frozen: list[str]
    loss_weights: dict[str, float]
    options: list[str]

    def state_dict(self) -> dict[str, Tensor]:
        """Its state dict with the made-up weights of :mod:`tests.parity.weights`."""
        return dict(_state_dict(self.name))

    def cfg(self) -> Config:
        """Our configuration with its settings, on the CPU and without weights."""
        cfg = get_cfg()
        values = self.config_values | {"MODEL.WEIGHTS": "", "MODEL.DEVICE": "cpu"}
        cfg.merge_from_list([item for pair in values.items() for item in pair])
        return cfg


@functools.cache
def _recorded() -> dict[str, dict[str, Any]]:
    files = sorted(DATA.glob("*release_keys.json.gz"))
    return {name: kept for file in files for name, kept in json.loads(gzip.decompress(file.read_bytes())).items()}


@functools.cache
def _state_dict(name: str) -> dict[str, Tensor]:
    return reference_state_dict(_recorded()[name]["keys"], _recorded()[name]["alias"])


def release(name: str) -> Release:
    """The configuration of that name, one of NAMES."""
    recorded = _recorded()[name]
    kept = (recorded.get(key, []) for key in ("frozen", "loss_weights", "options"))
    return Release(name, recorded["keys"], recorded["alias"], recorded["config_values"], *kept)
