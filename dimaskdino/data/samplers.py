"""The order in which a training draws its images."""

import itertools
from collections.abc import Iterator

from detectron2.config import CfgNode
from detectron2.data.samplers import TrainingSampler


class ResumableSampler(TrainingSampler):
    """detectron2's endless shuffled stream, without the images that were drawn before the run was resumed.

    With the same seed, an interrupted and resumed training draws the images in the order of an uninterrupted one.
    Without DATALOADER.ASPECT_RATIO_GROUPING it also sees the same batches. With grouping (detectron2's default), wide
    and tall images wait until a batch of their kind is full. A resumed run begins with none waiting, so a few images
    around the interruption come twice or are skipped, and later batches group images differently.
    Without a seed, the resumed run shuffles anew.

    Args:
        size: number of images.
        num_drawn: number of images that all processes together have drawn before.
        seed: seed of the shuffles; None draws one that the processes share.
    """

    def __init__(self, size: int, *, num_drawn: int = 0, seed: int | None = None) -> None:
        super().__init__(size, seed=seed)
        self._num_drawn = num_drawn

    @classmethod
    def from_config(cls, cfg: CfgNode, size: int, start_iter: int) -> "ResumableSampler":
        """The stream after ``start_iter`` iterations of SOLVER.IMS_PER_BATCH images, seeded by SEED unless negative."""
        num_drawn = start_iter * cfg.SOLVER.IMS_PER_BATCH
        return cls(size, num_drawn=num_drawn, seed=cfg.SEED if cfg.SEED >= 0 else None)

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(self._infinite_indices(), self._num_drawn + self._rank, None, self._world_size)
