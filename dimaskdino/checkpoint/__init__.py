"""Weight files: reading them safely, the names that others use, and fitting them to the model."""

from dimaskdino.checkpoint.checkpointer import Checkpointer
from dimaskdino.checkpoint.names import from_release, is_release, to_release
from dimaskdino.checkpoint.reading import DESCRIPTIONS, class_names_of, read_weights, write_weights

__all__ = [
    "DESCRIPTIONS",
    "Checkpointer",
    "class_names_of",
    "from_release",
    "is_release",
    "read_weights",
    "to_release",
    "write_weights",
]
