"""A training without random points, in one or several processes: writes the record of every iteration as JSON.

[torchrun --nproc_per_node 2] -m tests.engine.grid_training --config-file FILE OUTPUT_DIR FOLDER ...
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from torch import Tensor

from dimaskdino.data.datasets.shapes_drawing import SHAPES
from dimaskdino.engine import Trainer, argument_parser, launch, setup


class GridPoints:
    """The same 8 x 8 points for every mask, so that processes need not draw the same random numbers."""

    def shared(self, device: torch.device) -> Tensor:
        """(64, 2) as (x, y)."""
        centres = (torch.arange(8, device=device) + 0.5) / 8
        return torch.cartesian_prod(centres, centres)

    def per_mask(self, logits: Tensor) -> Tensor:
        """(N, 64, 2)."""
        return self.shared(logits.device).expand(len(logits), -1, -1)


def images_with_two_objects() -> list[dict[str, Any]]:
    """Images of shapes_train cut to two objects.

    Denoising pads its queries to the most objects of an image of the batch, and padding counts as background in the
    class loss, as in the releases: batches divide evenly only where all images have equally many objects.
    """
    entries = [entry for entry in DatasetCatalog.get("shapes_train") if len(entry["annotations"]) >= 2]
    return [{**entry, "annotations": entry["annotations"][:2]} for entry in entries]


def main(args: argparse.Namespace) -> None:
    """Train as train_net.py does."""
    DatasetCatalog.register("shapes_pairs", images_with_two_objects)
    MetadataCatalog.get("shapes_pairs").thing_classes = list(SHAPES)
    cfg = setup(args)
    trainer = Trainer(cfg)
    criterion = getattr(trainer.model, "module", trainer.model).criterion
    criterion.sampler = criterion.matcher.sampler = GridPoints()
    trainer.train()
    if comm.is_main_process():
        histories = trainer.storage.histories().items()
        record = {name: [value for value, _ in history.values()] for name, history in histories}
        (Path(cfg.OUTPUT_DIR) / "record.json").write_text(json.dumps(record))


if __name__ == "__main__":
    launch(main, argument_parser().parse_args())
