"""Weight files: reading them safely, the names that others use, fitting them to the model."""

from dimaskdino.checkpoint.checkpointer import Checkpointer
from dimaskdino.checkpoint.names import from_release, is_release, to_release
from dimaskdino.checkpoint.reading import read_weights

__all__ = ["Checkpointer", "from_release", "is_release", "read_weights", "to_release"]
