"""Denoising queries from noised ground truth (DN-DETR, Li et al., 2022; DINO, section 3.3; Mask DINO, section 3.4)."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from dimaskdino.layers.boxes import BOX_EPS, cxcywh_to_xyxy, inverse_sigmoid, xyxy_to_cxcywh
from dimaskdino.modeling.registry import DENOISING_REGISTRY
from dimaskdino.structures import DenoisingQueries, Targets, Tokens


@DENOISING_REGISTRY.register()
class Denoising(nn.Module):
    """Builds denoising queries from targets.

    Args:
        dim: channels C.
        num_classes: classes K.
        num_queries: at most this many denoising queries per image (MODEL.MaskDINO.DN_NUM); 0 for none.
        noise_scale: noise on labels (probability scale / 2) and boxes; 0 for none.
        fixed_size: pad to the same number of queries for every batch.
    """

    copies_per_group = 1
    eps = BOX_EPS

    @configurable
    def __init__(
        self, *, dim: int, num_classes: int, num_queries: int, noise_scale: float, fixed_size: bool = False
    ) -> None:
        super().__init__()
        self.label_embed = nn.Embedding(num_classes, dim)
        self.num_classes, self.num_queries, self.noise_scale = num_classes, num_queries, noise_scale
        self.fixed_size = fixed_size

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read MODEL.MaskDINO.DN and the keys beside it."""
        return {**_queries(cfg, cfg.MODEL.MaskDINO), "noise_scale": cfg.MODEL.MaskDINO.DN_NOISE_SCALE}

    def forward(self, targets: Sequence[Targets]) -> DenoisingQueries | None:
        """Queries for a batch; None where denoising is off, or no image has an object and nothing is padded.

        Deviation: the releases drop denoising for the whole batch when an image has more objects than ``num_queries``;
        here such an image denoises a random choice of that many objects, in one group.
        """
        largest = max(map(len, targets))
        if self.num_queries == 0 or (largest == 0 and not self.fixed_size):
            return None
        room = self._room(largest)
        num_groups = max(self.num_queries // max(room, 1), 1)
        copies = num_groups * self.copies_per_group
        padding = self.num_queries * self.copies_per_group - copies * room if self.fixed_size else 0
        device = self.label_embed.weight.device
        chosen = [self._choose(len(target), room, device) for target in targets]
        images = torch.cat([torch.full_like(index, image) for image, index in enumerate(chosen)]).repeat(copies)
        places = torch.cat([torch.arange(len(index), device=device) for index in chosen])
        places = torch.cat([places + padding + copy * room for copy in range(copies)])
        labels = torch.cat([target.labels[index] for target, index in zip(targets, chosen, strict=True)])
        boxes = torch.cat([target.boxes[index] for target, index in zip(targets, chosen, strict=True)])
        known = Tokens(
            self.label_embed(self.noise_labels(labels.expand(copies, -1)).flatten()),
            self.noise_boxes(boxes.expand(copies, -1, -1)).flatten(0, 1),
        )
        content = known.content.new_zeros(len(targets), padding + copies * room, known.content.shape[-1])
        box_logits = known.boxes.new_zeros(*content.shape[:2], 4)
        tokens = Tokens(
            content.index_put((images, places), known.content),
            box_logits.index_put((images, places), inverse_sigmoid(known.boxes, self.eps)).sigmoid(),
        )
        group_size = room * self.copies_per_group
        matches = [_matches(index, num_groups, group_size) for index in chosen]
        return DenoisingQueries(tokens, matches, num_groups, group_size, padding)

    def num_denoised(self, num_objects: int) -> int:
        """How many of the objects of an image one group denoises."""
        return min(num_objects, self.num_queries)

    def _room(self, largest: int) -> int:
        """Places for the objects of an image among the copies of a group, given the most objects of an image."""
        return min(largest, self.num_queries)

    def _choose(self, num_objects: int, room: int, device: torch.device) -> Tensor:
        """Indices of the objects to denoise: all, or a random choice where there are too many."""
        if num_objects <= room:
            return torch.arange(num_objects, device=device)
        return torch.randperm(num_objects, device=device)[:room]

    def noise_labels(self, labels: Tensor) -> Tensor:
        """Noised classes of the objects' copies, (copies, n) int64."""
        if self.noise_scale <= 0:
            return labels
        uniform, classes = self.draw_labels(labels)
        return torch.where(uniform < self.noise_scale * 0.5, classes, labels)

    def draw_labels(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Random numbers in [0, 1) and random classes of the shape of ``labels``."""
        return torch.rand(labels.shape, device=labels.device), torch.randint_like(labels, self.num_classes)

    def noise_boxes(self, boxes: Tensor) -> Tensor:
        """Noised boxes of the objects' copies, (copies, n, 4): centers by up to half the size, sizes by up to all."""
        if self.noise_scale > 0:
            size = boxes[..., 2:]
            noise = torch.rand_like(boxes) * 2 - 1
            boxes = boxes + noise * torch.cat((size / 2, size), dim=-1) * self.noise_scale
        return boxes


@DENOISING_REGISTRY.register()
class ContrastiveDenoising(Denoising):
    """Denoising queries of DINO: each object with little noise, to be found, and with more, to be told apart from it.

    Every object is denoised, however many an image has; with ``fixed_size``, at most ``num_queries`` of an image.

    Args:
        dim: channels C.
        num_classes: classes K.
        num_queries: at most this many pairs of queries per image (MODEL.DINO.DN_NUM), but at least one per object; 0
            for none.
        label_noise: a label is redrawn with half this probability.
        box_noise: corners move by up to this many halves of the box size, those of negatives by up to twice as many.
        negatives: whether there are any; without them this is plain denoising.
        fixed_size: see :class:`Denoising`.

    Source: DINO (Zhang et al., 2023), section 3.3.
    Deviation: the release takes a 2 * DN_NUM below 100 as the number of groups.
    """

    eps = 1e-3

    @configurable
    def __init__(self, *, label_noise: float, box_noise: float, negatives: bool, **options: Any) -> None:
        super().__init__(noise_scale=label_noise, **options)
        self.box_noise, self.copies_per_group = box_noise, 2 if negatives else 1

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the keys MODEL.DINO.DN*."""
        node = cfg.MODEL.DINO
        return {
            **_queries(cfg, node),
            "label_noise": node.DN_LABEL_NOISE,
            "box_noise": node.DN_BOX_NOISE,
            "negatives": node.DN == "contrastive",
        }

    def num_denoised(self, num_objects: int) -> int:
        """How many of the objects of an image one group denoises: all, if there is room."""
        if self.fixed_size or self.num_queries == 0:
            return super().num_denoised(num_objects)
        return num_objects

    def _room(self, largest: int) -> int:
        return super()._room(largest) if self.fixed_size else largest

    def noise_boxes(self, boxes: Tensor) -> Tensor:
        """Noised boxes of the objects' copies, (copies, n, 4); corners may cross, which gives a negative size."""
        sign, part = self.draw_boxes(boxes)
        is_negative = torch.arange(len(boxes), device=boxes.device) % self.copies_per_group
        half = (boxes[..., 2:] / 2).repeat(1, 1, 2)
        corners = cxcywh_to_xyxy(boxes) + sign * (part + is_negative[:, None, None]) * half * self.box_noise
        return xyxy_to_cxcywh(corners.clamp(0, 1))

    def draw_boxes(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Random signs and random numbers in [0, 1) of the shape of ``boxes``."""
        return torch.randint_like(boxes, 2) * 2 - 1, torch.rand_like(boxes)


def _queries(cfg: CfgNode, node: CfgNode) -> dict[str, int]:
    """What MODEL.MaskDINO and MODEL.DINO call by the same names."""
    return {
        "dim": node.HIDDEN_DIM,
        "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
        "num_queries": node.DN_NUM if node.DN != "no" else 0,
        "fixed_size": node.DN_FIXED_SIZE,
    }


def _matches(chosen: Tensor, num_groups: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Which query stands for which target of one image, group after group."""
    places = torch.arange(len(chosen), device=chosen.device)
    starts = torch.arange(num_groups, device=chosen.device) * group_size
    return (starts[:, None] + places).flatten(), chosen.repeat(num_groups)
