"""What all stages of one training step share, worked out once."""

import itertools
from collections.abc import Sequence

import torch
from detectron2.utils import comm
from torch import Tensor

from dimaskdino.layers.autocast import to_autocast_dtype
from dimaskdino.losses.matcher import Matches
from dimaskdino.modeling.denoising import DenoisingQueries
from dimaskdino.modeling.targets import Targets


class JoinedTargets:
    """The objects of a whole batch in one row, so that a stage takes one kernel and not one per image.

    Args:
        targets: of each image.
    """

    def __init__(self, targets: Sequence[Targets]) -> None:
        self.labels = torch.cat([target.labels for target in targets])
        self.boxes = torch.cat([target.boxes for target in targets])
        self.masks = torch.cat([target.masks for target in targets])
        ends = itertools.accumulate(len(target) for target in targets)
        self.starts = [0, *ends][:-1]

    def join(self, matches: Matches) -> tuple[Tensor, Tensor, Tensor]:
        """Image, query and object (in the row) of every matched pair, each (N,) int64."""
        image = torch.cat([torch.full_like(query, index) for index, (query, _) in enumerate(matches)])
        query = torch.cat([query for query, _ in matches])
        obj = torch.cat([obj + start for (_, obj), start in zip(matches, self.starts, strict=True)])
        return image, query, obj


class FeaturesByImage:
    """The mask features of every image, taken out of the batch once for all stages that share them.

    A stage that took them by itself would keep its own copy for the backward pass under autocast, and there fill a
    whole batch with zeros for every image. Gradients of the stages are added up in the dtype of autocast, as it does
    with those of weights.
    """

    def __init__(self) -> None:
        self._features: dict[int, tuple[Tensor, ...]] = {}

    def __call__(self, features: Tensor) -> tuple[Tensor, ...]:
        """(B, C, h, w) to (C, h, w) of each image, in the dtype of autocast where that is on."""
        if id(features) not in self._features:
            self._features[id(features)] = to_autocast_dtype(features).unbind()
        return self._features[id(features)]


class ObjectCounts:
    """What losses are divided by: averages over the processes, at least 1, that stay on the device.

    Args:
        targets: of each image of this process.
        denoising: the denoising queries of this process.

    Attributes:
        objects: scalar, objects per process.
        denoised: scalar, those that are denoised, one group; fewer in images with more of them than DN_NUM.
    """

    def __init__(self, targets: Sequence[Targets], denoising: DenoisingQueries | None) -> None:
        objects = sum(len(target) for target in targets)
        pairs = sum(len(query) for query, _ in denoising.matches) if denoising else 0
        denoised = pairs // denoising.num_groups if denoising else 0
        # Filled on the device: numbers from the host would have to be waited for.
        device = targets[0].labels.device
        counts = torch.stack([torch.full((), float(count), device=device) for count in (objects, denoised)])
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(counts)
        self.objects, self.denoised = (counts / comm.get_world_size()).clamp(min=1).unbind()
