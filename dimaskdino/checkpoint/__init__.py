"""Weight files: reading them safely, the names that others use, and fitting them to the model."""

from dimaskdino.checkpoint.checkpointer import AVERAGE, BEST, Checkpointer, check_weights
from dimaskdino.checkpoint.dino import pick_coco_rows
from dimaskdino.checkpoint.folder import FINAL
from dimaskdino.checkpoint.hub import local_path
from dimaskdino.checkpoint.reading import DESCRIPTIONS, class_names_of, read_weights, replacing, write_weights
from dimaskdino.checkpoint.releases import from_release, is_release, to_release

__all__ = [
    "AVERAGE",
    "BEST",
    "DESCRIPTIONS",
    "FINAL",
    "Checkpointer",
    "check_weights",
    "class_names_of",
    "from_release",
    "is_release",
    "local_path",
    "pick_coco_rows",
    "read_weights",
    "replacing",
    "to_release",
    "write_weights",
]
